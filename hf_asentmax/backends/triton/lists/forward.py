r"""The forward pass on the lists: exact tau, output and mean value.

A row's list holds its candidates: the support and a few keys more. Their scores are computed again in float32 from the
gathered keys. With u_j = (alpha-1) z_j, tau solves sum_j [u_j - tau]_+^p = 1, p = 1/(alpha-1), over the list alone,
because no other key has a weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.device import newton_step, support_powers
from .device import Matrix, gather_rows

__all__ = ["list_forward_kernel", "list_scores", "packed_entry", "unpacked_entry"]

# Newton's method from the block maxima's bound needs 2 to 4 steps at alpha = 1.5; the loop stops when no row moves.
_MAX_STEPS = tl.constexpr(24)


class _ListRows(NamedTuple):
    """R rows of one head and their lists.

    Attributes:
        entries: (R, 1) pointers to each row's first entry; counts: (R,), how many entries a row has.
        column_counts: pointer to the counts of the key head, or None.
        position: (R,), the key that a row stands at; slope: of ALiBi, times alpha - 1.
        start: (R,), a lower bound on tau.
    """

    entries: Any
    counts: Any
    column_counts: Any
    position: Any
    slope: Any
    start: Any


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
def list_scores(product, keys, inside, position, slope, scoring):
    """(alpha-1)(scale q k - slope |position - j|) of listed keys from their products q k, -inf where not `inside`."""
    score = product * scoring.scale
    if scoring.slopes is not None:
        score -= slope * tl.abs(position - keys).to(tl.float32)
    return tl.where(inside, score, float("-inf"))


@triton.jit
def _sum_keys(values):
    """(rows,): the sums over (chunks, rows, CHUNK). In this order, few lanes hold a row's keys."""
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
def _attend(q, keys_of, values_of, rows, scoring, dims, ROOM: tl.constexpr, CHUNK: tl.constexpr, PACK: tl.constexpr):
    """(output, mean value, tau) of R rows with at most ROOM keys each; tau is +inf for rows without a key.

    Args:
        q: (R, D) float32; keys_of, values_of: Matrix, of the key head; rows: _ListRows; dims: Dims.
        PACK: give the entries their r (`packed_entry`), and count keys with r > 0 in rows.column_counts.
    """
    R: tl.constexpr = q.shape[0]
    chunks: tl.constexpr = ROOM // CHUNK
    part = tl.arange(0, chunks)[:, None, None]
    in_chunk = tl.arange(0, CHUNK)[None, :]
    longest = tl.max(rows.counts, 0)
    scores = tl.full([chunks, R, CHUNK], float("-inf"), tl.float32)
    for chunk in range(0, tl.cdiv(longest, CHUNK)):
        number = chunk * CHUNK + in_chunk
        inside = number < rows.counts[:, None]
        keys = tl.load(rows.entries + number, mask=inside, other=0)
        k = gather_rows(keys_of, keys[:, :, None], inside[:, :, None], dims.D, dims.HEAD_DIM)
        product = tl.sum(q[:, None, :] * k, 2)
        score = list_scores(product, keys, inside, rows.position[:, None], rows.slope, scoring)
        scores = tl.where(part == chunk, score[None, :, :], scores)

    top = tl.max(tl.max(scores, 0), 1)
    some = top > float("-inf")
    top = tl.where(some, top, 0.0)
    # relative to the maximum, where float32 resolves tau best
    start = tl.where(some, tl.maximum(rows.start - top, -1.0), 0.0)
    tau = _solve(scores - top[None, :, None], start, longest, scoring.exponent) + top

    excess = tl.maximum(scores - tau[None, :, None], 0.0)
    p, s = support_powers(excess, scoring.exponent)
    total = _sum_keys(p)
    slope_sum = _sum_keys(s)
    out = tl.zeros([R, dims.DV], tl.float32)
    mean = tl.zeros([R, dims.DV], tl.float32)
    for chunk in range(0, tl.cdiv(longest, CHUNK)):
        number = chunk * CHUNK + in_chunk
        inside = number < rows.counts[:, None]
        keys = tl.load(rows.entries + number, mask=inside, other=0)
        v = gather_rows(values_of, keys[:, :, None], inside[:, :, None], dims.DV, dims.VALUE_DIM)
        r = tl.sum(tl.where(part == chunk, excess, 0.0), 0)
        if PACK:
            entry = packed_entry(keys, r)
            tl.store(rows.entries + number, entry, mask=inside)
            tl.atomic_add(rows.column_counts + keys, 1, mask=inside & ((entry & 0x3FFF) != 0), sem="relaxed")
        weight, derivative = support_powers(r, scoring.exponent)
        out += tl.sum(weight[:, :, None] * v, 1)
        mean += tl.sum(derivative[:, :, None] * v, 1)
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    mean = mean / tl.where(slope_sum > 0, slope_sum, 1.0)[:, None]
    return out, mean, tl.where(some, tau, float("inf"))


@triton.jit
def _store_list_rows(rows, batch, head, index, exists, values, dims):
    """Writes (R, DV) values to the rows `index` of one head."""
    dim = tl.arange(0, dims.DV)
    pointer = rows.pointer + batch * rows.batch + head.to(tl.int64) * rows.head
    tl.store(
        pointer + index.to(tl.int64)[:, None] * rows.row + dim[None, :],
        values.to(rows.pointer.dtype.element_ty),
        mask=exists[:, None] & (dim[None, :] < dims.VALUE_DIM),
    )


@triton.jit(do_not_specialize=["first_tile"])
def list_forward_kernel(
    query, key, value, output, mean_value, tau_out, bounds, lists, scoring, lengths, capacity, first_tile, dims,
    LIST_ROOM: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, ROW_BLOCK: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    """tau, the output sum_j p_j v_j and the mean value sum_j s_j v_j / sum_j s_j of R rows, on their lists of keys.

    p_j = [u_j - tau]_+^(1/(alpha-1)), sum_j p_j = 1, s_j = p_j^(2-alpha).

    Grid: BM / R programs for each row tile, R rows each. A program reads its queries, lists and bounds, gathers the
    listed keys and values, and writes its rows of output, mean_value and tau_out. Rows with an empty list get zeros and
    tau = +inf. Overflowed row blocks are left alone.

    Args:
        query, key, value, output: Rows; mean_value: Rows or None.
        tau_out: (batch * heads, q_len) float32.
        bounds: (tiles, BM) float32, where Newton's method starts.
        lists: Lists. If PACK, each entry gets its r = [u - tau]_+ for the backward pass, and column_counts is added to.
        capacity, first_tile: as in `expand_kernel`; dims: Dims.
        LIST_ROOM: the most keys of a row; CHUNK: keys gathered at a time.
    """
    parts: tl.constexpr = BM // R
    slot = tl.program_id(0) // parts
    q_len = lengths.q_len
    row_tiles = tl.cdiv(q_len, BM)
    tile = first_tile + slot
    group = tile // row_tiles
    first_row = (row_tiles - 1 - tile % row_tiles) * BM + (tl.program_id(0) % parts) * R
    row_blocks = tl.cdiv(q_len, ROW_BLOCK)
    if first_row >= q_len:
        return
    if tl.load(lists.overflow + group.to(tl.int64) * row_blocks + first_row // ROW_BLOCK) != 0:
        return
    batch = (group // lengths.heads).to(tl.int64)
    head = group % lengths.heads
    kv_head = (head // (lengths.heads // lengths.kv_heads)).to(tl.int64)
    in_tile = (tl.program_id(0) % parts) * R + tl.arange(0, R)
    rows = first_row + tl.arange(0, R)
    exists = rows < q_len
    row_number = group.to(tl.int64) * q_len + rows
    count = tl.load(lists.counts + row_number, mask=exists, other=0)
    offset = tl.load(lists.offsets + row_number, mask=exists, other=0)
    start = tl.load(bounds + slot.to(tl.int64) * BM + in_tile)
    dim = tl.arange(0, dims.D)
    q_pointer = query.pointer + batch * query.batch + head.to(tl.int64) * query.head
    q_mask = exists[:, None] & (dim[None, :] < dims.HEAD_DIM)
    q = tl.load(q_pointer + rows.to(tl.int64)[:, None] * query.row + dim[None, :], mask=q_mask, other=0.0)
    q = q.to(tl.float32)
    slope = 0.0
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + head) * scoring.slope_factor
    position = rows + (lengths.kv_len - q_len)
    keys_of = Matrix(key.pointer + batch * key.batch + kv_head * key.head, key.row)
    values_of = Matrix(value.pointer + batch * value.batch + kv_head * value.head, value.row)
    entries = lists.listed + group.to(tl.int64) * capacity + offset[:, None]
    column_counts = lists.column_counts
    if PACK:
        column_counts += (batch * lengths.kv_heads + kv_head) * lengths.kv_len
    listed = _ListRows(entries, count, column_counts, position, slope, start)
    half: tl.constexpr = LIST_ROOM // 2
    if tl.max(count, 0) <= half:
        out, mean, tau = _attend(q, keys_of, values_of, listed, scoring, dims, half, CHUNK, PACK)
    else:
        out, mean, tau = _attend(q, keys_of, values_of, listed, scoring, dims, LIST_ROOM, CHUNK, PACK)
    _store_list_rows(output, batch, head, rows, exists, out, dims)
    if mean_value is not None:
        _store_list_rows(mean_value, batch, head, rows, exists, mean, dims)
    tl.store(tau_out + row_number, tau, mask=exists)
