r"""The backward pass on the lists: no product of all queries with all keys is made again.

With r_j = [(alpha-1) z_j - tau]_+, s = r^(p-1) and dp_j = do . v_j (Peters, Niculae & Martins 2019):

    dz_j = s_j (dp_j - sum(s dp) / sum(s)),   dq = scale sum_j dz_j k_j,   dk_j += scale dz_j q,   dv_j += p_j do

A key's gradient is summed over all rows that list it, by atomic additions: in float32, or, where two runs must agree
bit by bit, in 64-bit integers, whose sum does not depend on the order. Their unit is a power of two, so small against
the largest possible term that float32 would round more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import support_powers
from .sparse_lists import gather_rows, list_scores, listed_keys

__all__ = ["fixed_to_float_kernel", "list_backward_kernel"]


@triton.jit
def _add_to_keys(sums, kv_group, kv_len, keys, listed, terms, unit, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """sums[kv_group, keys] += terms (rows, keys, D); in units of 1 / unit where sums are integers."""
    dim = tl.arange(0, D)
    pointers = sums + ((kv_group * kv_len + keys) * HEAD_DIM)[:, :, None] + dim[None, None, :]
    mask = listed[:, :, None]
    if HEAD_DIM != D:
        mask = mask & (dim[None, None, :] < HEAD_DIM)
    if sums.dtype.element_ty == tl.int64:
        terms = (terms * unit).to(tl.int64)
    tl.atomic_add(pointers, terms, mask=mask, sem="relaxed")


@triton.jit
def _chunk_terms(
    q, grad, tau, lists, number, count, exists, position, slope, key_pointer, key_row, value_pointer, value_row,
    scoring,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, DV: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """(keys, k, p, s, dp) of a chunk of the rows' lists."""
    keys, inside = listed_keys(lists, number, count, exists)
    k = gather_rows(key_pointer, key_row, keys, inside, D, HEAD_DIM)
    v = gather_rows(value_pointer, value_row, keys, inside, DV, VALUE_DIM)
    score = list_scores(q, k, keys, inside, position, slope, scoring)
    p, s = support_powers(tl.maximum(score - tau[:, None], 0.0), scoring.exponent)
    return keys, k, p, s, tl.sum(grad[:, None, :] * v, 2)


@triton.jit
def list_backward_kernel(
    query, key, value, grad_output, grad_query, key_sums, value_sums, tau_in, indices, counts, overflow, units,
    scoring, scale, heads, kv_heads, q_len, kv_len,
    LIST_ROOM: tl.constexpr, CHUNK: tl.constexpr, ROW_BLOCK: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, DV: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """R rows: grad_query written, and their terms added to key_sums and value_sums.

    Args:
        query, key, value, grad_output, grad_query: Rows; grad_query is not written in overflowed row blocks.
        key_sums, value_sums: (batch * kv_heads, kv_len, head_dim or value_dim) float32 or int64, contiguous.
        tau_in: (batch * heads, q_len) float32.
        indices, counts: the lists.
        overflow: (batch * heads, ceil(q_len / ROW_BLOCK)) uint8, 1 for the row blocks to leave out.
        units: (2,) float32, terms per unit of the integer key_sums and value_sums; None for float32.
        scale: the factor on q k^T.
    """
    parts = tl.cdiv(q_len, R)
    group = tl.program_id(0) // parts
    first_row = (tl.program_id(0) % parts) * R
    batch = (group // heads).to(tl.int64)
    head = group % heads
    kv_head = (head // (heads // kv_heads)).to(tl.int64)
    kv_group = batch * kv_heads + kv_head
    rows = first_row + tl.arange(0, R)
    # nothing here waits for the flag: the loads below go out together
    row_blocks = tl.cdiv(q_len, ROW_BLOCK)
    # one flag for all rows, a copy each: the interpreter of Triton 3.9 has no mask from a scalar condition
    kept = tl.load(overflow + group.to(tl.int64) * row_blocks + rows // ROW_BLOCK) == 0
    exists = rows < q_len
    row_number = group.to(tl.int64) * q_len + rows
    count = tl.where(kept, tl.load(counts + row_number, mask=exists, other=0), 0)
    tau = tl.load(tau_in + row_number, mask=exists, other=float("inf"))
    longest = tl.max(count, 0)
    dim = tl.arange(0, D)
    value_dim = tl.arange(0, DV)
    q_mask = exists[:, None] & (dim[None, :] < HEAD_DIM)
    long_rows = rows.to(tl.int64)[:, None]
    q_pointer = query.pointer + batch * query.batch + head.to(tl.int64) * query.head
    q = tl.load(q_pointer + long_rows * query.row + dim[None, :], mask=q_mask, other=0.0).to(tl.float32)
    grad_pointer = grad_output.pointer + batch * grad_output.batch + head.to(tl.int64) * grad_output.head
    grad = tl.load(
        grad_pointer + long_rows * grad_output.row + value_dim[None, :],
        mask=exists[:, None] & (value_dim[None, :] < VALUE_DIM),
        other=0.0,
    ).to(tl.float32)
    slope = 0.0
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + head) * scoring.slope_factor
    position = rows + (kv_len - q_len)
    key_pointer = key.pointer + batch * key.batch + kv_head * key.head
    value_pointer = value.pointer + batch * value.batch + kv_head * value.head
    lists = indices + row_number[:, None] * LIST_ROOM
    in_chunk = tl.arange(0, CHUNK)[None, :]
    key_unit = 1.0
    value_unit = 1.0
    if units is not None:
        key_unit = tl.load(units)
        value_unit = tl.load(units + 1)

    sum_s = tl.zeros([R], tl.float32)
    sum_s_dp = tl.zeros([R], tl.float32)
    if longest > CHUNK:
        for chunk in range(0, tl.cdiv(longest, CHUNK)):
            _, _, _, s, dp = _chunk_terms(
                q, grad, tau, lists, chunk * CHUNK + in_chunk, count, exists, position, slope, key_pointer, key.row,
                value_pointer, value.row, scoring, D, HEAD_DIM, DV, VALUE_DIM,
            )  # fmt: skip
            sum_s += tl.sum(s, 1)
            sum_s_dp += tl.sum(s * dp, 1)

    grad_q = tl.zeros([R, D], tl.float32)
    for chunk in range(0, tl.cdiv(longest, CHUNK)):
        keys, k, p, s, dp = _chunk_terms(
            q, grad, tau, lists, chunk * CHUNK + in_chunk, count, exists, position, slope, key_pointer, key.row,
            value_pointer, value.row, scoring, D, HEAD_DIM, DV, VALUE_DIM,
        )  # fmt: skip
        if longest <= CHUNK:
            sum_s = tl.sum(s, 1)
            sum_s_dp = tl.sum(s * dp, 1)
        mean = sum_s_dp / tl.where(sum_s > 0, sum_s, 1.0)
        dz = s * (dp - mean[:, None]) * scale
        grad_q += tl.sum(dz[:, :, None] * k, 1)
        listed = s > 0
        _add_to_keys(key_sums, kv_group, kv_len, keys, listed, dz[:, :, None] * q[:, None, :], key_unit, D, HEAD_DIM)
        terms = p[:, :, None] * grad[:, None, :]
        _add_to_keys(value_sums, kv_group, kv_len, keys, listed, terms, value_unit, DV, VALUE_DIM)

    dq_pointer = grad_query.pointer + batch * grad_query.batch + head.to(tl.int64) * grad_query.head
    tl.store(
        dq_pointer + long_rows * grad_query.row + dim[None, :], grad_q.to(grad_query.pointer.dtype.element_ty),
        mask=q_mask & kept[:, None],
    )  # fmt: skip


@triton.jit
def fixed_to_float_kernel(sums, result, units, which, size, BLOCK: tl.constexpr):
    """result += sums / units[which]: int64 sums of `list_backward_kernel` into float32."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    value = tl.load(sums + index, mask=inside, other=0).to(tl.float32) / tl.load(units + which)
    tl.store(result + index, tl.load(result + index, mask=inside, other=0.0) + value, mask=inside)
