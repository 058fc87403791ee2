r"""From candidate words to lists of keys, and the forward pass on the lists: exact tau, output.

A row's list holds its candidates, the support and a few keys more. Their scores are made again in float32 from the
gathered keys; with u_j = (alpha-1) z_j, tau solves sum [u_j - tau]_+^p = 1, p = 1/(alpha-1), over the list alone,
because no other key has a weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.device import newton_step, support_powers
from .scores import LISTERS

__all__ = ["expand_kernel", "gather_rows", "list_forward_kernel", "list_scores", "unpacked_entry"]

# Newton's method from the block maxima's bound needs 2 to 4 steps at alpha = 1.5; the loop stops when no row moves.
_MAX_STEPS = tl.constexpr(24)


@triton.jit
def _count_bits(word):
    """Ones in each of the sixteen-bit words."""
    word = word - ((word >> 1) & 0x5555)
    word = (word & 0x3333) + ((word >> 2) & 0x3333)
    word = (word + (word >> 4)) & 0x0F0F
    return (word + (word >> 8)) & 0x1F


@triton.jit
def _in_lists(CHUNK: tl.constexpr):
    """(lister, number) of each of CHUNK words, the first words of all lists."""
    word = tl.arange(0, CHUNK)
    each: tl.constexpr = CHUNK // LISTERS
    return word // each, word % each


@triton.jit
def _load_words(entries, source, first, written, ROOM: tl.constexpr, CHUNK: tl.constexpr):
    """(rows, CHUNK) entries, the same number of each list from number `first` on, 0 beyond what was `written`."""
    lister, number = _in_lists(CHUNK)
    number += first
    place = source[:, None] * ROOM + (lister * (ROOM // LISTERS) + number)[None, :]
    return tl.load(entries + place, mask=number[None, :] < written, other=0)


@triton.jit(do_not_specialize=["first_tile"])
def expand_kernel(
    entries, entry_counts, listed, offsets, counts, used, overflow, q_len, capacity, first_tile,
    ROOM: tl.constexpr, LIST_ROOM: tl.constexpr, CHUNK: tl.constexpr, ROW_BLOCK: tl.constexpr, BM: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """R rows of a tile: their words (see sparse_scores) become key indices, one row's list after another's.

    Args:
        entries, entry_counts: (tiles, BM, LISTERS, ROOM / LISTERS) and (tiles, BM, LISTERS) int32, from
            `candidates_kernel`.
        listed: (batch * heads, capacity) int32, the keys of all rows.
        offsets, counts: (batch * heads, q_len) int32: where in `listed` a row's list begins, and how long it is; 0 keys
            for rows that do not fit.
        used: (batch * heads,) int32, how much of `listed` is taken; programs draw their part in no particular order.
        overflow: (batch * heads, ceil(q_len / ROW_BLOCK)) uint8, set to 1 where a row does not fit.
    """
    parts: tl.constexpr = BM // R
    slot = tl.program_id(0) // parts
    row_tiles = tl.cdiv(q_len, BM)
    tile = first_tile + slot
    group = (tile // row_tiles).to(tl.int64)
    in_tile = (tl.program_id(0) % parts) * R + tl.arange(0, R)
    rows = (row_tiles - 1 - tile % row_tiles) * BM + in_tile
    exists = rows < q_len
    source = slot.to(tl.int64) * BM + in_tile
    lister, _ = _in_lists(CHUNK)
    written = tl.load(entry_counts + source[:, None] * LISTERS + lister[None, :], mask=exists[:, None], other=0)
    fits = tl.max(written, 1) < ROOM // LISTERS - 1
    written = tl.where(fits[:, None], written, 0)
    longest = tl.max(tl.max(written, 1), 0)
    total = tl.zeros([R], tl.int32)
    for first in range(0, longest, CHUNK // LISTERS):
        total += tl.sum(_count_bits(_load_words(entries, source, first, written, ROOM, CHUNK) & 0xFFFF), 1)
    fits = fits & (total <= LIST_ROOM)
    total = tl.where(fits, total, 0)
    all_rows = tl.sum(total, 0)
    begin = tl.atomic_add(used + group, all_rows, sem="relaxed")
    fits = fits & (begin + all_rows <= capacity)
    total = tl.where(fits, total, 0)
    offset = begin + tl.cumsum(total, 0) - total
    row_number = group * q_len + rows
    tl.store(counts + row_number, total, mask=exists)
    tl.store(offsets + row_number, offset, mask=exists)
    row_blocks = tl.cdiv(q_len, ROW_BLOCK)
    tl.store(overflow + group * row_blocks + rows // ROW_BLOCK, tl.full([R], 1, tl.uint8), mask=exists & (fits == 0))

    written = tl.where(fits[:, None], written, 0)
    target = listed + group * capacity + offset[:, None]
    for first in range(0, tl.max(tl.max(written, 1), 0), CHUNK // LISTERS):
        entry = _load_words(entries, source, first, written, ROOM, CHUNK)
        word = entry & 0xFFFF
        first_key = ((entry >> 16) & 0xFFFF) * 64 + lister[None, :] * 2
        ones = _count_bits(word)
        place = tl.cumsum(ones, 1) - ones
        for step in range(0, tl.max(tl.max(ones, 1), 0)):
            lowest = word & (-word)
            bit = _count_bits(lowest - 1)
            key = first_key + (bit & 7) * 8 + (bit >> 3)
            tl.store(target + place + step, key, mask=word != 0)
            word = word ^ lowest
        target += tl.sum(ones, 1)[:, None]


@triton.jit
def packed_entry(key, excess):
    """int32 of a key below 2^18, in the upper bits, and r = [u - tau]_+ in [0, 1] as the 14 bits of a float16."""
    bits = excess.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return (key << 14) | (bits & 0x3FFF)


@triton.jit
def unpacked_entry(entry):
    """(key, r) of `packed_entry`, r in float32."""
    excess = (entry & 0x3FFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (entry >> 14) & 0x3FFFF, excess


@triton.jit
def gather_rows(pointer, row_stride, keys, inside, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(..., D) float32: the rows of a matrix at the indices `keys` (..., 1), zeros where not `inside`."""
    dim = tl.arange(0, D)[None, :]
    if len(keys.shape) == 3:
        dim = dim[None, :, :]
    pointers = pointer + keys.to(tl.int64) * row_stride + dim
    if HEAD_DIM != D:
        inside = inside & (dim < HEAD_DIM)
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def list_scores(product, keys, inside, position, slope, scoring):
    """(alpha-1)(scale q k - slope |position - j|) of listed keys from their products q k, -inf where not `inside`."""
    score = product * scoring.scale
    if scoring.slopes is not None:
        score -= slope * tl.abs(position - keys).to(tl.float32)
    return tl.where(inside, score, float("-inf"))


@triton.jit
def _sum_keys(values):
    """(rows,): the sums over (chunks, rows, CHUNK). In this order a row's keys lie in few lanes."""
    return tl.sum(tl.sum(values, 0), 1)


@triton.jit
def _solve(scores, start, longest, exponent: tl.constexpr):
    """tau of the rows of scores (chunks, rows, CHUNK), relative to a row's maximum of 0; from `start`, at most tau."""
    tau = start
    steps = 0
    going = longest > 0
    while going:
        p, s = support_powers(tl.maximum(scores - tau[None, :, None], 0.0), exponent)
        total = _sum_keys(p)
        _, step = newton_step(total, _sum_keys(s), exponent)
        step = tl.maximum(step, 0.0)
        tau += tl.where(total > 0, step, 0.0)
        steps += 1
        going = (tl.max(step, 0) > 3e-7) & (steps < _MAX_STEPS)
    return tau


@triton.jit
def _attend(
    q, key_pointer, key_row, value_pointer, value_row, listed, column_counts, count, exists, position, slope, start,
    scoring,
    ROOM: tl.constexpr, CHUNK: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    DV: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """R rows with at most ROOM keys each: (output, mean value, tau); tau is +inf for rows without a key.

    listed points to each row's first entry, (R, 1); if PACK, the entries get their r (see `packed_entry`)
    and keys with r > 0 are counted in column_counts.
    """
    R: tl.constexpr = q.shape[0]
    chunks: tl.constexpr = ROOM // CHUNK
    part = tl.arange(0, chunks)[:, None, None]
    in_chunk = tl.arange(0, CHUNK)[None, :]
    longest = tl.max(count, 0)
    scores = tl.full([chunks, R, CHUNK], float("-inf"), tl.float32)
    for chunk in range(0, tl.cdiv(longest, CHUNK)):
        number = chunk * CHUNK + in_chunk
        inside = number < count[:, None]
        keys = tl.load(listed + number, mask=inside, other=0)
        k = gather_rows(key_pointer, key_row, keys[:, :, None], inside[:, :, None], D, HEAD_DIM)
        score = list_scores(tl.sum(q[:, None, :] * k, 2), keys, inside, position[:, None], slope, scoring)
        scores = tl.where(part == chunk, score[None, :, :], scores)

    top = tl.max(tl.max(scores, 0), 1)
    some = top > float("-inf")
    top = tl.where(some, top, 0.0)
    # relative to the maximum, where float32 is fine
    start = tl.where(some, tl.maximum(start - top, -1.0), 0.0)
    tau = _solve(scores - top[None, :, None], start, longest, scoring.exponent) + top

    excess = tl.maximum(scores - tau[None, :, None], 0.0)
    p, s = support_powers(excess, scoring.exponent)
    total = _sum_keys(p)
    slope_sum = _sum_keys(s)
    out = tl.zeros([R, DV], tl.float32)
    mean = tl.zeros([R, DV], tl.float32)
    for chunk in range(0, tl.cdiv(longest, CHUNK)):
        number = chunk * CHUNK + in_chunk
        inside = number < count[:, None]
        keys = tl.load(listed + number, mask=inside, other=0)
        v = gather_rows(value_pointer, value_row, keys[:, :, None], inside[:, :, None], DV, VALUE_DIM)
        r = tl.sum(tl.where(part == chunk, excess, 0.0), 0)
        if PACK:
            entry = packed_entry(keys, r)
            tl.store(listed + number, entry, mask=inside)
            tl.atomic_add(column_counts + keys, 1, mask=inside & ((entry & 0x3FFF) != 0), sem="relaxed")
        weight, derivative = support_powers(r, scoring.exponent)
        out += tl.sum(weight[:, :, None] * v, 1)
        mean += tl.sum(derivative[:, :, None] * v, 1)
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    mean = mean / tl.where(slope_sum > 0, slope_sum, 1.0)[:, None]
    return out, mean, tl.where(some, tau, float("inf"))


@triton.jit
def _store_list_rows(rows, batch, head, index, exists, values, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Writes (R, D) values to the rows `index` of one head."""
    dim = tl.arange(0, D)
    pointer = rows.pointer + batch * rows.batch + head.to(tl.int64) * rows.head
    tl.store(
        pointer + index.to(tl.int64)[:, None] * rows.row + dim[None, :],
        values.to(rows.pointer.dtype.element_ty),
        mask=exists[:, None] & (dim[None, :] < HEAD_DIM),
    )


@triton.jit(do_not_specialize=["first_tile"])
def list_forward_kernel(
    query, key, value, output, mean_value, tau_out, bounds, listed, offsets, counts, column_counts, overflow, scoring,
    heads, kv_heads, q_len, kv_len, capacity, first_tile,
    LIST_ROOM: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, ROW_BLOCK: tl.constexpr,
    PACK: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, DV: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """R rows of a tile: tau, the output and the mean value from their lists. Rows with an empty list get zeros and
    tau = +inf; overflowed row blocks are left alone.

    Args:
        query, key, value, output: Rows; mean_value: Rows or None.
        tau_out: (batch * heads, q_len) float32.
        bounds: (tiles, BM) float32, where Newton's method starts.
        listed, offsets, counts, overflow: the lists, see `expand_kernel`.
        column_counts: (batch * kv_heads, kv_len) int32, added to if PACK: how many rows give each key a weight.
        PACK: write each entry's r into the lists, for the backward pass.
    """
    parts: tl.constexpr = BM // R
    slot = tl.program_id(0) // parts
    row_tiles = tl.cdiv(q_len, BM)
    tile = first_tile + slot
    group = tile // row_tiles
    first_row = (row_tiles - 1 - tile % row_tiles) * BM + (tl.program_id(0) % parts) * R
    row_blocks = tl.cdiv(q_len, ROW_BLOCK)
    if first_row >= q_len:
        return
    if tl.load(overflow + group.to(tl.int64) * row_blocks + first_row // ROW_BLOCK) != 0:
        return
    batch = (group // heads).to(tl.int64)
    head = group % heads
    kv_head = (head // (heads // kv_heads)).to(tl.int64)
    in_tile = (tl.program_id(0) % parts) * R + tl.arange(0, R)
    rows = first_row + tl.arange(0, R)
    exists = rows < q_len
    row_number = group.to(tl.int64) * q_len + rows
    count = tl.load(counts + row_number, mask=exists, other=0)
    offset = tl.load(offsets + row_number, mask=exists, other=0)
    start = tl.load(bounds + slot.to(tl.int64) * BM + in_tile)
    dim = tl.arange(0, D)
    q_pointer = query.pointer + batch * query.batch + head.to(tl.int64) * query.head
    q_mask = exists[:, None] & (dim[None, :] < HEAD_DIM)
    q = tl.load(q_pointer + rows.to(tl.int64)[:, None] * query.row + dim[None, :], mask=q_mask, other=0.0)
    q = q.to(tl.float32)
    slope = 0.0
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + head) * scoring.slope_factor
    position = rows + (kv_len - q_len)
    key_pointer = key.pointer + batch * key.batch + kv_head * key.head
    value_pointer = value.pointer + batch * value.batch + kv_head * value.head
    lists = listed + group.to(tl.int64) * capacity + offset[:, None]
    if PACK:
        column_counts += (batch * kv_heads + kv_head) * kv_len
    half: tl.constexpr = LIST_ROOM // 2
    if tl.max(count, 0) <= half:
        out, mean, tau = _attend(
            q, key_pointer, key.row, value_pointer, value.row, lists, column_counts, count, exists, position, slope,
            start, scoring, half, CHUNK, PACK, D, HEAD_DIM, DV, VALUE_DIM,
        )  # fmt: skip
    else:
        out, mean, tau = _attend(
            q, key_pointer, key.row, value_pointer, value.row, lists, column_counts, count, exists, position, slope,
            start, scoring, LIST_ROOM, CHUNK, PACK, D, HEAD_DIM, DV, VALUE_DIM,
        )  # fmt: skip
    _store_list_rows(output, batch, head, rows, exists, out, DV, VALUE_DIM)
    if mean_value is not None:
        _store_list_rows(mean_value, batch, head, rows, exists, mean, DV, VALUE_DIM)
    tl.store(tau_out + row_number, tau, mask=exists)
