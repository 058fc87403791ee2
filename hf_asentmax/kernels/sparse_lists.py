r"""From candidate words to lists of keys, and the forward pass on the lists: exact tau, output.

A row's list holds its candidates, the support and a few keys more. Their scores are made again in float32 from the
gathered keys; with u_j = (alpha-1) z_j, tau solves sum [u_j - tau]_+^p = 1, p = 1/(alpha-1), over the list alone,
because no other key has a weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import entmax_norm, support_powers

__all__ = ["expand_kernel", "gather_rows", "list_forward_kernel", "list_scores", "listed_keys"]

# Newton's method from the block maxima's bound needs 2 to 4 steps at alpha = 1.5; the loop stops when no row moves.
_MAX_STEPS = tl.constexpr(24)


@triton.jit
def _count_bits(word):
    """Ones in each of the sixteen-bit words."""
    word = word - ((word >> 1) & 0x5555)
    word = (word & 0x3333) + ((word >> 2) & 0x3333)
    word = (word + (word >> 4)) & 0x0F0F
    return (word + (word >> 8)) & 0x1F


@triton.jit(do_not_specialize=["first_tile"])
def expand_kernel(
    entries, entry_counts, indices, counts, overflow, q_len, first_tile,
    ROOM: tl.constexpr, LIST_ROOM: tl.constexpr, CHUNK: tl.constexpr, ROW_BLOCK: tl.constexpr, BM: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """R rows of a tile: their words (see sparse_scores) become key indices.

    Args:
        entries, entry_counts: (tiles, BM, ROOM) and (tiles, BM) int32, from `candidates_kernel`.
        indices: (batch * heads, q_len, LIST_ROOM) int32, written up to the row's count.
        counts: (batch * heads, q_len) int32; 0 for rows that do not fit.
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
    written = tl.load(entry_counts + source, mask=exists, other=0)
    target = indices + (group * q_len + rows)[:, None] * LIST_ROOM
    total = tl.zeros([R], tl.int32)
    for first in range(0, tl.minimum(tl.max(written, 0), ROOM), CHUNK):
        number = first + tl.arange(0, CHUNK)
        inside = number[None, :] < written[:, None]
        entry = tl.load(entries + source[:, None] * ROOM + number[None, :], mask=inside, other=0)
        word = entry & 0xFFFF
        first_key = ((entry >> 18) & 0x3FFF) * 64 + ((entry >> 16) & 3) * 2
        ones = _count_bits(word)
        place = total[:, None] + tl.cumsum(ones, 1) - ones
        total += tl.sum(ones, 1)
        for step in range(0, tl.max(tl.max(ones, 1), 0)):
            lowest = word & (-word)
            bit = _count_bits(lowest - 1)
            key = first_key + (bit >> 1) * 8 + (bit & 1)
            tl.store(target + place + step, key, mask=(word != 0) & (place + step < LIST_ROOM))
            word = word ^ lowest
    fits = (written <= ROOM) & (total <= LIST_ROOM)
    tl.store(counts + group * q_len + rows, tl.where(fits, total, 0), mask=exists)
    row_blocks = tl.cdiv(q_len, ROW_BLOCK)
    tl.store(overflow + group * row_blocks + rows // ROW_BLOCK, tl.full([R], 1, tl.uint8), mask=exists & (fits == 0))


@triton.jit
def listed_keys(lists, number, count, exists):
    """(keys, inside) of the lists' places `number`: key indices (rows, keys), 0 beyond a row's count.

    The load does not wait for the count.
    """
    keys = tl.load(lists + number, mask=exists[:, None], other=0)
    inside = number < count[:, None]
    return tl.where(inside, keys, 0), inside


@triton.jit
def gather_rows(pointer, row_stride, keys, inside, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(rows, keys, D) float32: the rows of a matrix at the indices `keys` (rows, keys), zeros where not `inside`."""
    dim = tl.arange(0, D)
    pointers = pointer + keys.to(tl.int64)[:, :, None] * row_stride + dim[None, None, :]
    mask = inside[:, :, None]
    if HEAD_DIM != D:
        mask = mask & (dim[None, None, :] < HEAD_DIM)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def list_scores(q, k, keys, inside, position, slope, scoring):
    """(rows, keys) float32: (alpha-1)(scale q k - slope |position - j|) of the listed keys, -inf where not `inside`."""
    score = tl.sum(q[:, None, :] * k, 2) * scoring.scale
    if scoring.slopes is not None:
        score -= slope * tl.abs(position[:, None] - keys).to(tl.float32)
    return tl.where(inside, score, float("-inf"))


@triton.jit(do_not_specialize=["first_tile"])
def list_forward_kernel(
    query, key, value, output, tau_out, bounds, indices, counts, scoring, heads, kv_heads, q_len, kv_len, first_tile,
    LIST_ROOM: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    HEAD_DIM: tl.constexpr, DV: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """R rows of a tile: tau and the output from their lists. Rows with an empty list get zeros and tau = +inf.

    Args:
        query, key, value, output: Rows.
        tau_out: (batch * heads, q_len) float32.
        bounds: (tiles, BM) float32, where Newton's method starts.
        indices, counts: the lists, (batch * heads, q_len, LIST_ROOM) and (batch * heads, q_len) int32.
    """
    parts: tl.constexpr = BM // R
    slot = tl.program_id(0) // parts
    row_tiles = tl.cdiv(q_len, BM)
    tile = first_tile + slot
    group = tile // row_tiles
    batch = (group // heads).to(tl.int64)
    head = group % heads
    kv_head = (head // (heads // kv_heads)).to(tl.int64)
    in_tile = (tl.program_id(0) % parts) * R + tl.arange(0, R)
    rows = (row_tiles - 1 - tile % row_tiles) * BM + in_tile
    exists = rows < q_len
    row_number = group.to(tl.int64) * q_len + rows
    count = tl.load(counts + row_number, mask=exists, other=0)
    longest = tl.max(count, 0)
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
    lists = indices + row_number[:, None] * LIST_ROOM

    chunks: tl.constexpr = LIST_ROOM // CHUNK
    part = tl.arange(0, chunks)[None, :, None]
    in_chunk = tl.arange(0, CHUNK)[None, :]
    scores = tl.full([R, chunks, CHUNK], float("-inf"), tl.float32)
    for chunk in range(0, tl.cdiv(longest, CHUNK)):
        number = chunk * CHUNK + in_chunk
        keys, inside = listed_keys(lists, number, count, exists)
        k = gather_rows(key_pointer, key.row, keys, inside, D, HEAD_DIM)
        score = list_scores(q, k, keys, inside, position, slope, scoring)
        scores = tl.where(part == chunk, score[:, None, :], scores)

    flat = tl.reshape(scores, [R, LIST_ROOM])
    top = tl.max(flat, 1)
    some = top > float("-inf")
    top = tl.where(some, top, 0.0)
    start = tl.load(bounds + slot.to(tl.int64) * BM + in_tile)
    # relative to the maximum, where float32 is fine
    flat = flat - top[:, None]
    tau = tl.where(some, tl.maximum(start - top, -1.0), 0.0)
    steps = 0
    going = longest > 0
    while going:
        p, s = support_powers(tl.maximum(flat - tau[:, None], 0.0), scoring.exponent)
        total = tl.sum(p, 1)
        norm = entmax_norm(tl.where(total > 0, total, 1.0), scoring.exponent)
        slope_sum = tl.sum(s, 1)
        step = tl.maximum((norm - 1.0) * total / (norm * tl.where(slope_sum > 0, slope_sum, 1.0)), 0.0)
        tau += tl.where(total > 0, step, 0.0)
        steps += 1
        going = (tl.max(step, 0) > 3e-7) & (steps < _MAX_STEPS)

    p, s = support_powers(tl.maximum(scores - (top + tau)[:, None, None], 0.0), scoring.exponent)
    total = tl.sum(tl.reshape(p, [R, LIST_ROOM]), 1)
    p = p / tl.where(total > 0, total, 1.0)[:, None, None]
    out = tl.zeros([R, DV], tl.float32)
    for chunk in range(0, tl.cdiv(longest, CHUNK)):
        number = chunk * CHUNK + in_chunk
        keys, inside = listed_keys(lists, number, count, exists)
        v = gather_rows(value_pointer, value.row, keys, inside, DV, VALUE_DIM)
        weight = tl.sum(tl.where(part == chunk, p, 0.0), 1)
        out += tl.sum(weight[:, :, None] * v, 1)

    value_dim = tl.arange(0, DV)
    out_pointer = output.pointer + batch * output.batch + head.to(tl.int64) * output.head
    tl.store(
        out_pointer + rows.to(tl.int64)[:, None] * output.row + value_dim[None, :],
        out.to(output.pointer.dtype.element_ty),
        mask=exists[:, None] & (value_dim[None, :] < VALUE_DIM),
    )
    tl.store(tau_out + row_number, tl.where(some, top + tau, float("inf")), mask=exists)
