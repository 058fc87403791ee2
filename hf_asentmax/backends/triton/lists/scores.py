r"""Passes over the scores for the sparse regime: each row's maximum in each key block, and the keys above a bound.

Both passes make the products q k and nothing else; the score of a pair is (alpha-1)(scale q k - slope |i - j|).

1. ``block_maxima_kernel`` keeps one number for each row and key block. tau of a subset of the keys never exceeds tau of
   all, so tau of the block maxima is a rigorous lower bound (``sparse_bounds``), and it leaves few keys beyond the
   support.
2. ``candidates_kernel`` visits the key blocks that hold something above the bound and writes each row's candidates.
   Four threads share a row of a tensor-core accumulator: of 64 keys, thread w holds 8a + 2w + b, a < 8, b < 2. It
   makes them a word in which bit a + 8b stands for that key, and appends it to a list of its own if it is not zero, so
   that no thread asks another. An entry is the number of the 64 keys in the upper 16 bits and the word in the lower.
   Comparisons are made on pairs of float16: x > bound implies float16(x) >= float16(bound), as rounding keeps order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.device import load_rows, visible_interval, visible_pairs

__all__ = ["LARGEST_BOUND", "LISTERS", "block_maxima_kernel", "candidates_kernel"]

# Triton's interpreter knows no inline assembly; what stands for it there computes the same.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Threads that hold a row's keys, each with a list of words of its own.
LISTERS = tl.constexpr(4)
# Bounds of products beyond it in absolute value do not fit into float16.
LARGEST_BOUND = tl.constexpr(60000.0)


@triton.jit
def _scatter(pointers, values, mask):
    """tl.store of 16- or 32-bit integers without its change of layout, which would pass the tile through shared
    memory."""
    if _INTERPRETED:
        tl.store(pointers, values, mask=mask)
    elif values.dtype == tl.int16:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b16 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,h,r", [pointers, values, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r", [pointers, values, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _half_bound(bound):
    """(factor, shift) int32, each a pair of equal float16, with saturate(factor x + shift) = 1 for every float16 x that
    a number above `bound` rounds to, and 0 for all that are smaller.

    With h = float16(bound), raised from near 0, and the float16 c next below h: factor = 1 / (h - c), a power of two,
    and shift = -c factor, at most 2,048. For bound = +inf both are 0, which gives 0.
    """
    half = tl.where(tl.abs(bound) < 2.0**-5, -(2.0**-5), bound).to(tl.float16)
    bits = half.to(tl.int16, bitcast=True)
    below = (bits + tl.where(half > 0.0, -1, 1).to(tl.int16)).to(tl.float16, bitcast=True).to(tl.float32)
    some = bound < float("inf")
    factor = tl.where(some, 1.0 / (half.to(tl.float32) - below), 0.0)
    shift = tl.where(some, -below * factor, 0.0)
    return _pair(factor), _pair(shift)


@triton.jit
def _pair(value):
    bits = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


# In what follows, two numbers share an int32: float16 on a GPU, 16-bit integers in the interpreter. All are small.


@triton.jit
def _above(even, odd, factor, shift):
    """The pair (even, odd) of 1 where above the bound and 0 elsewhere; factor and shift are of `_half_bound`."""
    if _INTERPRETED:
        steep = (factor & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        least = (shift & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        low = (even.to(tl.float16).to(tl.float32) * steep + least > 0.0).to(tl.int32)
        return low | ((odd.to(tl.float16).to(tl.float32) * steep + least > 0.0).to(tl.int32) << 16)
    return tl.inline_asm_elementwise(
        "{ .reg .b32 x; cvt.rn.f16x2.f32 x, $2, $1; fma.rn.sat.f16x2 $0, x, $3, $4; }",
        "=r,f,f,r,r", [even, odd, factor, shift], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _joined(pairs, SHIFT: tl.constexpr):
    """low + 2^SHIFT high, for (low, high) along the last axis."""
    low, high = tl.split(pairs)
    if _INTERPRETED:
        return low + (high << SHIFT)
    return tl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $3;",
        "=r,r,r,r", [high, ((15 + SHIFT) << 10) * 0x10001, low], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _append_word(lists, count, pairs, number, LAST: tl.constexpr):
    """Appends the entries of words that are not zero, given as pairs of bytes, to the lists; the new counts.

    A list of LAST entries is full: what follows overwrites the place after them.
    """
    if _INTERPRETED:
        entry = (number << 16) | (pairs & 0xFF) | ((pairs >> 8) & 0xFF00)
        tl.store(lists + count, entry, mask=pairs != 0)
        return tl.minimum(count + (pairs != 0).to(tl.int32), LAST)
    # 1024 in float16 has its last 8 bits free
    return tl.inline_asm_elementwise(
        """{
            .reg .pred some; .reg .b32 word; .reg .b64 place;
            setp.ne.b32 some, $3, 0;
            add.rn.f16x2 word, $3, $5;
            prmt.b32 word, word, $4, 0x5420;
            mad.wide.u32 place, $2, 4, $1;
            @some st.global.b32 [place], word;
            mov.b32 $0, $2;
            @some add.s32 $0, $2, 1;
            min.s32 $0, $0, $6;
        }""",
        "=r,l,r,r,r,r,r", [lists, count, pairs, number, 0x64006400, LAST], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _tile_of(first_tile, heads, kv_heads, q_len, BM: tl.constexpr):
    """(batch, head, kv_head, first_row) of this program's row tile: a head's longest rows first."""
    row_tiles = tl.cdiv(q_len, BM)
    tile = first_tile + tl.program_id(0)
    group = tile // row_tiles
    row_tile = row_tiles - 1 - tile % row_tiles
    head = group % heads
    return group // heads, head, head // (heads // kv_heads), row_tile * BM


@triton.jit
def _masked_scores(
    q, key, masks, scoring, slope, batch, head, kv_head, rows, start, stop, first, q_len, kv_len,
    BN: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(rows, BN) scores of the keys from `first` on, with ALiBi; -inf where the row does not see the key."""
    k = load_rows(key, batch, kv_head, first, BN, kv_len, True, D, HEAD_DIM)
    keys = first + tl.arange(0, BN)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scoring.scale
    if scoring.slopes is not None:
        score -= slope * tl.abs((rows + (kv_len - q_len))[:, None] - keys[None, :]).to(tl.float32)
    seen = visible_pairs(masks, batch, head, rows, keys, start, stop, q_len, kv_len)
    return tl.where(seen, score, float("-inf"))


@triton.jit
def _store_maxima(maxima, largest, block, index, BM: tl.constexpr):
    """Writes the (BM, parts) maxima of the key blocks in a tile."""
    parts: tl.constexpr = largest.shape[1]
    part = block * parts + tl.arange(0, parts)
    stored = largest.to(maxima.dtype.element_ty)
    bits = tl.int16 if stored.dtype == tl.bfloat16 else tl.int32
    pointers = maxima.to(tl.pointer_type(bits)) + part[None, :] * BM + index[:, None]
    _scatter(pointers, stored.to(bits, bitcast=True), part[None, :] >= 0)


@triton.jit
def _larger(top, largest):
    """The rows' running maxima; what is no number stays."""
    return tl.maximum(top, tl.max(largest, 1), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _alibi_low(q, key, masks, scoring, slope, largest_key, batch, kv_head, rows, start, stop, q_len, kv_len,
               D: tl.constexpr, HEAD_DIM: tl.constexpr):  # fmt: skip
    """The first key that may have a weight under ALiBi, for all rows of the tile together.

    A row's maximum is at least the score of its own key, so z_ij <= (alpha-1)(scale |q_i| max|k| - slope (i - j)) <=
    z_ii - 1 proves the weight zero. Rows that do not see their own key prove nothing.
    """
    own = rows + (kv_len - q_len)
    seen = (own >= start) & (own < stop)
    if masks.key_valid is not None:
        valid = tl.load(masks.key_valid + batch.to(tl.int64) * kv_len + own, mask=seen, other=0)
        seen = seen & (valid != 0)
    dim = tl.arange(0, D)
    pointer = key.pointer + batch.to(tl.int64) * key.batch + kv_head.to(tl.int64) * key.head
    inside = seen[:, None] & (dim[None, :] < HEAD_DIM)
    k = tl.load(pointer + own.to(tl.int64)[:, None] * key.row + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    q = q.to(tl.float32)
    score = tl.sum(q * k, 1) * scoring.scale
    bound = tl.sqrt(tl.sum(q * q, 1)) * (largest_key * scoring.scale)
    reach = tl.minimum((bound * 1.0001 - score + 1.0001) / slope + 1.0, 1e9).to(tl.int32)
    first = tl.where(seen, own - reach, start)
    return tl.min(tl.where(start < stop, tl.maximum(first, start), kv_len), 0)


@triton.jit(do_not_specialize=["first_tile", "blocks"])
def block_maxima_kernel(
    query, key, maxima, tops, spans, largest_key, overflow, masks, scoring,
    heads, kv_heads, q_len, kv_len, first_tile, blocks,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, D: tl.constexpr,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BM query rows of one head: the maximum score of each row in each block of BLOCK keys.

    A tile of a row block that has overflowed already is left as one that sees no key, so that nothing after has work.

    Blocks that all rows see are compared as integers, the bits of float32, of which the GPU compares three at once. The
    order is theirs but among negative numbers, where it is reversed: a block of negative scores leaves its smallest.
    That is a key's score too, so bounds stay bounds. Only where a row has nothing but negative scores they would be
    loose; then the tile's blocks are gone through again in float32.

    Args:
        query, key: Rows.
        maxima: (tiles, blocks, BM) float32 or bfloat16 (rounded to nearest), written within the tile's span.
        tops: (tiles, BM) float32, the rows' maxima; -inf for rows that see no key, nan where all that a row's range
            holds are padding or scores that are no numbers.
        spans: (tiles, 5) int32: key blocks [span0, span3) may hold weights; those of [span1, span2) are seen by every
            row and carry no ALiBi. span4 is 1 where the maxima of these, if negative, may be smaller than they should.
        largest_key: (batch * kv_heads,) float32, the largest Euclidean norm of a key.
        overflow: (batch * heads, ceil(q_len / ROW_BLOCK)) uint8, 1 for row blocks to leave alone.
        first_tile: number of this launch's first tile, counted over batch, heads and row tiles.
        blocks: key blocks of BLOCK that the row of `maxima` has room for.
    """
    slot = tl.program_id(0).to(tl.int64)
    batch, head, kv_head, first_row = _tile_of(first_tile, heads, kv_heads, q_len, BM)
    index = tl.arange(0, BM)
    row_block = (batch * heads + head) * tl.cdiv(q_len, ROW_BLOCK) + first_row // ROW_BLOCK
    if tl.load(overflow + row_block) != 0:
        tl.store(spans + slot * 5 + 3, 0)
        tl.store(tops + slot * BM + index, float("-inf"))
        return
    rows = first_row + index
    start, stop = visible_interval(masks, batch, rows, q_len, kv_len)
    sees = start < stop
    low = tl.min(tl.where(sees, start, kv_len), 0)
    high = tl.max(tl.where(sees, stop, 0), 0)
    all_low = tl.max(tl.where(sees, start, 0), 0)
    all_high = tl.min(tl.where(sees, stop, kv_len), 0)

    q = load_rows(query, batch, head, first_row, BM, q_len, True, D, HEAD_DIM)
    slope = 0.0
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + head) * scoring.slope_factor
        if slope > 0:
            largest = tl.load(largest_key + batch * kv_heads + kv_head)
            low = tl.maximum(low, _alibi_low(
                q, key, masks, scoring, slope, largest, batch, kv_head, rows, start, stop, q_len, kv_len, D, HEAD_DIM
            ))  # fmt: skip
    low = tl.minimum(low, high) // BN
    high = tl.cdiv(high, BN)
    full_low = tl.minimum(tl.maximum(tl.cdiv(all_low, BN), low), high)
    full_high = tl.maximum(tl.minimum(all_high // BN, high), full_low)
    if masks.has_holes is not None:
        full_high = tl.where(tl.load(masks.has_holes + batch) != 0, full_low, full_high)
    full_high = tl.where(slope > 0, full_low, full_high)
    parts: tl.constexpr = BN // BLOCK
    spans += slot * 5
    tl.store(spans, low * parts)
    tl.store(spans + 1, full_low * parts)
    tl.store(spans + 2, full_high * parts)
    tl.store(spans + 3, high * parts)

    maxima += slot * blocks * BM
    best = tl.full([BM], -(2**31), tl.int32)
    for step in range(0, full_high - full_low):
        block = full_low + step
        k = load_rows(key, batch, kv_head, block * BN, BN, kv_len, False, D, HEAD_DIM)
        product = tl.reshape(tl.dot(q, tl.trans(k), input_precision=PRECISION), [BM, parts, BLOCK])
        largest = tl.max(product.to(tl.int32, bitcast=True), 2)
        best = tl.maximum(best, tl.max(largest, 1))
        _store_maxima(maxima, largest.to(tl.float32, bitcast=True) * scoring.scale, block, index, BM)
    top = best.to(tl.float32, bitcast=True) * scoring.scale
    some_negative = tl.min(tl.where(sees, best, 0), 0) < 0
    tl.store(spans + 4, tl.where(some_negative, 0, 1))
    if some_negative:
        top = tl.full([BM], float("-inf"), tl.float32)
        for step in range(0, full_high - full_low):
            block = full_low + step
            k = load_rows(key, batch, kv_head, block * BN, BN, kv_len, False, D, HEAD_DIM)
            product = tl.reshape(tl.dot(q, tl.trans(k), input_precision=PRECISION), [BM, parts, BLOCK])
            largest = tl.max(product, 2) * scoring.scale
            top = _larger(top, largest)
            _store_maxima(maxima, largest, block, index, BM)
    edges = (full_low - low) + (high - full_high)
    for edge in range(0, edges):
        block = tl.where(low + edge < full_low, low + edge, full_high + edge - (full_low - low))
        score = _masked_scores(
            q, key, masks, scoring, slope, batch, head, kv_head, rows, start, stop, block * BN, q_len, kv_len,
            BN, D, HEAD_DIM, PRECISION,
        )  # fmt: skip
        largest = tl.max(tl.reshape(score, [BM, parts, BLOCK]), 2)
        top = _larger(top, largest)
        _store_maxima(maxima, largest, block, index, BM)
    # a maximum passes over scores that are no numbers: where nothing else was seen, say so
    top = tl.where(top == float("-inf"), float("nan"), top)
    tl.store(tops + slot * BM + index, tl.where(sees, top, float("-inf")))


@triton.jit
def _append(lists, count, score, factor, shift, block, BM: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr):
    """Appends the words of a (BM, BLOCK) tile of scores to the (BM, LISTERS) lists; the new counts."""
    groups: tl.constexpr = BLOCK // 64
    even, odd = tl.split(tl.reshape(score, [BM, groups, 8, LISTERS, 2]))
    pairs = _above(even, odd, factor[:, None, None, None], shift[:, None, None, None])
    pairs = tl.reshape(pairs, [BM, groups, 2, 2, 2, LISTERS])
    pairs = _joined(tl.permute(pairs, [0, 1, 2, 3, 5, 4]), 1)
    pairs = _joined(tl.permute(pairs, [0, 1, 2, 4, 3]), 2)
    pairs = _joined(tl.permute(pairs, [0, 1, 3, 2]), 4)
    tl.static_assert(groups == 1 or groups == 2)
    if groups == 1:
        count = _append_word(lists, count, tl.reshape(pairs, [BM, LISTERS]), block, LAST)
    else:
        first, second = tl.split(tl.permute(pairs, [0, 2, 1]))
        count = _append_word(lists, count, first, 2 * block, LAST)
        count = _append_word(lists, count, second, 2 * block + 1, LAST)
    return count


@triton.jit(do_not_specialize=["first_tile", "blocks"])
def candidates_kernel(
    query, key, bounds, active, active_counts, entries, entry_counts, masks, scoring,
    heads, kv_heads, q_len, kv_len, first_tile, blocks,
    BM: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BM query rows: the words of the keys whose score lies above the row's bound.

    Args:
        bounds: (tiles, BM) float32; +inf for rows without a key.
        active, active_counts: (tiles, blocks) and (tiles, 2) int32: the key blocks to visit, the masked ones first, and
            how many are masked and how many there are.
        entries: (tiles, BM, LISTERS, ROOM / LISTERS) int32, see the module.
        entry_counts: (tiles, BM, LISTERS) int32; ROOM / LISTERS - 1 where a list is full: it may lack some.
    """
    slot = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BM)
    count = tl.zeros([BM, LISTERS], tl.int32)
    lister = index[:, None] * LISTERS + tl.arange(0, LISTERS)[None, :]
    entry_counts += slot * BM * LISTERS
    masked = tl.load(active_counts + slot * 2)
    total = tl.load(active_counts + slot * 2 + 1)
    if total == 0:
        tl.store(entry_counts + lister, count)
        return
    last: tl.constexpr = ROOM // LISTERS - 1
    batch, head, kv_head, first_row = _tile_of(first_tile, heads, kv_heads, q_len, BM)
    rows = first_row + index
    bound = tl.load(bounds + slot * BM + index)
    q = load_rows(query, batch, head, first_row, BM, q_len, True, D, HEAD_DIM)
    active += slot * blocks
    lists = entries + slot * BM * ROOM + lister * (ROOM // LISTERS)
    if masked > 0:
        start, stop = visible_interval(masks, batch, rows, q_len, kv_len)
        slope = 0.0
        if scoring.slopes is not None:
            slope = tl.load(scoring.slopes + head) * scoring.slope_factor
        factor, shift = _half_bound(bound)
        for step in range(0, masked):
            block = tl.load(active + step)
            score = _masked_scores(
                q, key, masks, scoring, slope, batch, head, kv_head, rows, start, stop, block * BLOCK, q_len, kv_len,
                BLOCK, D, HEAD_DIM, PRECISION,
            )  # fmt: skip
            count = _append(lists, count, score, factor, shift, block, BM, BLOCK, last)
    factor, shift = _half_bound(bound / scoring.scale)
    for step in range(masked, total):
        block = tl.load(active + step)
        k = load_rows(key, batch, kv_head, block * BLOCK, BLOCK, kv_len, False, D, HEAD_DIM)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        count = _append(lists, count, product, factor, shift, block, BM, BLOCK, last)
    tl.store(entry_counts + lister, count)
