r"""Second pass over the scores: the keys above each row's bound on tau, as words of bits.

The pass visits the key blocks that hold something above the bound and writes each row's candidates. Four threads share
a row of a tensor-core accumulator: of 64 keys, thread w holds the keys 8a + 2w + b, a < 8, b < 2. Each thread makes
them a word in which bit a + 8b stands for such a key. It appends the word to a list of its own if it is not zero, so
that no thread waits for another. An entry is the number of the 64 keys in the upper 16 bits and the word in the lower.

Comparisons are made on pairs of float16: x > bound implies float16(x) >= float16(bound), because rounding keeps order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.device import load_rows, visible_interval
from .device import INTERPRETED, RowTile, masked_scores, tile_of

__all__ = ["LARGEST_BOUND", "LISTERS", "append_candidates", "candidates_kernel", "half_bound"]

# Threads that hold a row's keys, each with a list of words of its own.
LISTERS = tl.constexpr(4)
# Bounds of products beyond it in absolute value do not fit into float16.
LARGEST_BOUND = tl.constexpr(60000.0)


@triton.jit
def half_bound(bound):
    """(factor, shift) int32, each a pair of equal float16, that compare by one multiplication and addition.

    saturate(factor x + shift) is 1 for every float16 x that a number above `bound` rounds to, and 0 for all smaller x.
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
    """The pair (even, odd) of 1 where above the bound and 0 elsewhere; factor and shift are those of `half_bound`."""
    if INTERPRETED:
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
    if INTERPRETED:
        return low + (high << SHIFT)
    return tl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $3;",
        "=r,r,r,r", [high, ((15 + SHIFT) << 10) * 0x10001, low], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _append_word(lists, count, pairs, number, LAST: tl.constexpr):
    """Appends the entries of words that are not zero, given as pairs of bytes, to the lists; returns the new counts.

    A list of LAST entries is full: later entries overwrite the place after them.
    """
    if INTERPRETED:
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
def append_candidates(
    lists, count, score, factor, shift, block, BM: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr
):
    """Appends the words of a (BM, BLOCK) tile of scores to the (BM, LISTERS) lists; returns the new counts.

    Args:
        lists: (BM, LISTERS) pointers to the lists' first entries; count: how many entries each has.
        factor, shift: (BM,), `half_bound` of the rows' bounds.
        block: number of the key block.
        LAST: the most entries of a list.
    """
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
    query, key, key_blocks, words, masks, scoring, lengths, first_tile, blocks,
    BM: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The words of the keys whose score u_ij lies above the row's bound.

    Grid: one program for each row tile, BM query rows of one head. It reads its queries and the keys of the tile's
    active blocks, and writes the tile's `words`.

    Args:
        query, key: Rows.
        key_blocks: KeyBlocks, from `row_bounds_kernel`; words: CandidateWords, written.
        first_tile: number of this launch's first tile; blocks: how many key blocks `key_blocks.active` has room for.
        ROOM: words that a row has room for.
    """
    slot = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BM)
    count = tl.zeros([BM, LISTERS], tl.int32)
    lister = index[:, None] * LISTERS + tl.arange(0, LISTERS)[None, :]
    word_counts = words.counts + slot * BM * LISTERS
    masked = tl.load(key_blocks.counts + slot * 2)
    total = tl.load(key_blocks.counts + slot * 2 + 1)
    if total == 0:
        tl.store(word_counts + lister, count)
        return
    last: tl.constexpr = ROOM // LISTERS - 1
    batch, head, kv_head, first_row = tile_of(first_tile, lengths, BM)
    rows = first_row + index
    bound = tl.load(key_blocks.bounds + slot * BM + index)
    q = load_rows(query, batch, head, first_row, BM, lengths.q_len, True, D, HEAD_DIM)
    active = key_blocks.active + slot * blocks
    lists = words.entries + slot * BM * ROOM + lister * (ROOM // LISTERS)
    if masked > 0:
        start, stop = visible_interval(masks, batch, rows, lengths.q_len, lengths.kv_len)
        slope = 0.0
        if scoring.slopes is not None:
            slope = tl.load(scoring.slopes + head) * scoring.slope_factor
        tile = RowTile(batch, head, kv_head, rows, start, stop, slope)
        factor, shift = half_bound(bound)
        for step in range(0, masked):
            block = tl.load(active + step)
            score = masked_scores(q, key, tile, block * BLOCK, masks, scoring, lengths, BLOCK, D, HEAD_DIM, PRECISION)
            count = append_candidates(lists, count, score, factor, shift, block, BM, BLOCK, last)
    factor, shift = half_bound(bound / scoring.scale)
    for step in range(masked, total):
        block = tl.load(active + step)
        k = load_rows(key, batch, kv_head, block * BLOCK, BLOCK, lengths.kv_len, False, D, HEAD_DIM)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        count = append_candidates(lists, count, product, factor, shift, block, BM, BLOCK, last)
    tl.store(word_counts + lister, count)
