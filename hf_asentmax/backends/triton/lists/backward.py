r"""The backward pass on the lists, which needs no product of all queries with all keys.

With r_j = [(alpha-1) z_j - tau]_+, s = r^(p-1) and dp_j = do . v_j (Peters, Niculae & Martins 2019):

    dz_j = s_j (dp_j - rho),   dq = scale sum_j dz_j k_j,   dk_j = scale sum_i dz_ij q_i,   dv_j = sum_i p_ij do_i

with rho = do . mean_value and mean_value = sum_j s_j v_j / sum_j s_j from the forward pass. The forward pass also left
r in the lists' entries where half precision is enough, so that keys and values are gathered once.

The gradient of a key is a sum over all rows that list it. For 16-bit inputs each row writes a record of p and dz for
each of its keys. How many rows list each key says where the records of a key lie, and then each key gathers the rows of
its records. Atomic additions would move twice the bytes. For float32 inputs, and where two runs must agree bit for bit,
the terms are added by atomics: in float32, or in 64-bit integers, whose sum does not depend on the order. The unit of
the integers is a power of two, so small against the largest possible term that float32 would round more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.device import support_powers
from .device import Matrix, gather_rows
from .forward import list_scores, unpacked_entry

__all__ = ["column_gradient_kernel", "fixed_to_float_kernel", "list_backward_kernel"]


@triton.jit
def packed_record(row, p, dz, dtype: tl.constexpr):
    """int64 of a row's number, of dz and of p.

    The number counts the rows of the heads that share a key head. dz is in the inputs' 16-bit type, p in [0, 1] in
    float16.
    """
    p = p.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
    dz = dz.to(dtype).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
    return (row.to(tl.int64) << 32) | (dz << 16) | p


@triton.jit
def _unpacked_record(record, dtype: tl.constexpr):
    """(row, p, dz) of `packed_record`, p and dz in float32."""
    p = (record & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    dz = ((record >> 16) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return (record >> 32).to(tl.int32), p, dz


@triton.jit
def _add_to_keys(sums, keys, listed, terms, unit, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """sums[keys] += terms (CHUNK, D) where `listed`, keys and listed (CHUNK, 1); in units of 1 / unit for integers."""
    dim = tl.arange(0, D)[None, :]
    if HEAD_DIM != D:
        listed = listed & (dim < HEAD_DIM)
    if sums.dtype.element_ty == tl.int64:
        terms = (terms * unit).to(tl.int64)
    tl.atomic_add(sums + keys * HEAD_DIM + dim, terms, mask=listed, sem="relaxed")


@triton.jit
def _load_row(rows, batch, head, index, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(1, D) float32: row `index` of one head."""
    dim = tl.arange(0, D)[None, :]
    pointer = rows.pointer + batch * rows.batch + head.to(tl.int64) * rows.head + index.to(tl.int64) * rows.row
    return tl.load(pointer + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def list_backward_kernel(
    query, key, value, grad_output, mean_value, grad_query, sums, columns, tau_in, lists, scoring, scale, lengths,
    capacity, dims, CHUNK: tl.constexpr, ROW_BLOCK: tl.constexpr, R: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dq_i = scale sum_j dz_ij k_j, and the terms of dk and dv, of R rows, one after the other.

    dz_ij = s_ij (do_i . v_j - do_i . mean_i), s = r^(p-1), r = [u - tau]_+, p = 1/(alpha-1).

    Grid: ceil(q_len / R) programs for each query head. A program reads its rows of query, grad_output, mean_value and
    their lists, and gathers the listed keys and values. It writes its rows of grad_query. The terms of dk and dv it
    either adds to `sums` or writes into `columns` for `column_gradient_kernel`. Overflowed row blocks are left alone.

    Args:
        query, key, value, grad_output, mean_value, grad_query: Rows.
        sums: KeySums, of None where there are records.
        columns: KeyRecords, of None where there are sums.
        tau_in: (batch * heads, q_len) float32, read unless PACKED.
        lists: Lists, with room for `capacity` entries a head.
        scale: the factor on q k^T; dims: Dims.
        CHUNK: keys gathered at a time.
        PACKED: the entries hold r; otherwise it is computed from q, k and tau.
    """
    q_len = lengths.q_len
    parts = tl.cdiv(q_len, R)
    group = tl.program_id(0) // parts
    first_row = (tl.program_id(0) % parts) * R
    row_blocks = tl.cdiv(q_len, ROW_BLOCK)
    if tl.load(lists.overflow + group.to(tl.int64) * row_blocks + first_row // ROW_BLOCK) != 0:
        return
    batch = (group // lengths.heads).to(tl.int64)
    head = group % lengths.heads
    members = lengths.heads // lengths.kv_heads
    kv_head = (head // members).to(tl.int64)
    kv_group = batch * lengths.kv_heads + kv_head
    keys_of = Matrix(key.pointer + batch * key.batch + kv_head * key.head, key.row)
    values_of = Matrix(value.pointer + batch * value.batch + kv_head * value.head, value.row)
    key_sums = sums.of_keys
    value_sums = sums.of_values
    cursors = columns.cursors
    records = columns.records
    if records is None:
        key_sums += kv_group * lengths.kv_len * dims.HEAD_DIM
        value_sums += kv_group * lengths.kv_len * dims.VALUE_DIM
    else:
        cursors += kv_group * lengths.kv_len
        records += kv_group * members * capacity
    listed = lists.listed + group.to(tl.int64) * capacity
    dim = tl.arange(0, dims.D)[None, :]
    slope = 0.0
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + head) * scoring.slope_factor
    key_unit = 1.0
    value_unit = 1.0
    if sums.units is not None:
        key_unit = tl.load(sums.units)
        value_unit = tl.load(sums.units + 1)
    for step in range(0, tl.minimum(R, q_len - first_row)):
        row = first_row + step
        row_number = group.to(tl.int64) * q_len + row
        count = tl.load(lists.counts + row_number)
        offset = tl.load(lists.offsets + row_number)
        q = _load_row(query, batch, head, row, dims.D, dims.HEAD_DIM)
        grad = _load_row(grad_output, batch, head, row, dims.DV, dims.VALUE_DIM)
        rho = tl.sum(grad * _load_row(mean_value, batch, head, row, dims.DV, dims.VALUE_DIM), 1, keep_dims=True)
        tau = 0.0
        if not PACKED:
            tau = tl.load(tau_in + row_number)
        grad_q = tl.zeros([1, dims.D], tl.float32)
        for first in range(0, count, CHUNK):
            number = first + tl.arange(0, CHUNK)
            entry = tl.load(listed + offset + number, mask=number < count, other=0)[:, None]
            inside = (number < count)[:, None]
            if PACKED:
                keys, r = unpacked_entry(entry)
                listed_here = inside & (r > 0)
                k = gather_rows(keys_of, keys, listed_here, dims.D, dims.HEAD_DIM)
            else:
                keys = entry
                k = gather_rows(keys_of, keys, inside, dims.D, dims.HEAD_DIM)
                product = tl.sum(q * k, 1, keep_dims=True)
                r = list_scores(product, keys, inside, row + (lengths.kv_len - q_len), slope, scoring) - tau
                r = tl.maximum(r, 0.0)
                listed_here = inside & (r > 0)
            v = gather_rows(values_of, keys, listed_here, dims.DV, dims.VALUE_DIM)
            p, s = support_powers(r, scoring.exponent)
            dz = s * (tl.sum(v * grad, 1, keep_dims=True) - rho)
            grad_q += tl.sum(dz * k, 0, keep_dims=True)
            if records is None:
                _add_to_keys(key_sums, keys, listed_here, dz * scale * q, key_unit, dims.D, dims.HEAD_DIM)
                _add_to_keys(value_sums, keys, listed_here, p * grad, value_unit, dims.DV, dims.VALUE_DIM)
            else:
                place = tl.atomic_add(cursors + keys, -1, mask=listed_here, sem="relaxed") - 1
                record = packed_record((head % members) * q_len + row, p, dz, query.pointer.dtype.element_ty)
                tl.store(records + place, record, mask=listed_here)
        pointer = grad_query.pointer + batch * grad_query.batch + head.to(tl.int64) * grad_query.head
        pointer += row.to(tl.int64) * grad_query.row
        tl.store(pointer + dim, (grad_q * scale).to(grad_query.pointer.dtype.element_ty), mask=dim < dims.HEAD_DIM)


@triton.jit
def column_gradient_kernel(
    query, grad_output, key_grad, value_grad, columns, scale, lengths, capacity, dims,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """dk_j = scale sum_i dz_ij q_i and dv_j = sum_i p_ij do_i over the records of KEYS keys, one key after the other.

    Grid: ceil(kv_len / KEYS) programs for each key head. A program reads its keys' records, gathers the rows of query
    and grad_output that they name, and writes its rows of key_grad and value_grad.

    Args:
        query, grad_output, key_grad, value_grad: Rows.
        columns: KeyRecords; scale: the factor on q k^T; dims: Dims.
        capacity: as in `list_backward_kernel`.
        CHUNK: records read at a time.
        GROUPED: several query heads share a key head.
    """
    q_len = lengths.q_len
    kv_len = lengths.kv_len
    parts = tl.cdiv(kv_len, KEYS)
    kv_group = tl.program_id(0) // parts
    first_key = (tl.program_id(0) % parts) * KEYS
    batch = (kv_group // lengths.kv_heads).to(tl.int64)
    kv_head = kv_group % lengths.kv_heads
    members = lengths.heads // lengths.kv_heads
    first_head = (kv_head * members).to(tl.int64)
    query_pointer = query.pointer + batch * query.batch + first_head * query.head
    grad_pointer = grad_output.pointer + batch * grad_output.batch + first_head * grad_output.head
    key_pointer = key_grad.pointer + batch * key_grad.batch + kv_head.to(tl.int64) * key_grad.head
    value_pointer = value_grad.pointer + batch * value_grad.batch + kv_head.to(tl.int64) * value_grad.head
    cursors = columns.cursors + kv_group.to(tl.int64) * kv_len
    counts = columns.counts + kv_group.to(tl.int64) * kv_len
    records = columns.records + kv_group.to(tl.int64) * members * capacity
    dim = tl.arange(0, dims.D)
    value_dim = tl.arange(0, dims.DV)
    for step in range(0, tl.minimum(KEYS, kv_len - first_key)):
        key = first_key + step
        begin = tl.load(cursors + key)
        end = begin + tl.load(counts + key)
        acc_k = tl.zeros([dims.D], tl.float32)
        acc_v = tl.zeros([dims.DV], tl.float32)
        for first in range(begin, end, CHUNK):
            number = first + tl.arange(0, CHUNK)
            inside = (number < end)[:, None]
            row, p, dz = _unpacked_record(
                tl.load(records + number, mask=number < end, other=0)[:, None], query.pointer.dtype.element_ty
            )
            q_base = query_pointer
            grad_base = grad_pointer
            if GROUPED:
                q_base += (row // q_len).to(tl.int64) * query.head
                grad_base += (row // q_len).to(tl.int64) * grad_output.head
                row = row % q_len
            q = gather_rows(Matrix(q_base, query.row), row, inside, dims.D, dims.HEAD_DIM)
            grad = gather_rows(Matrix(grad_base, grad_output.row), row, inside, dims.DV, dims.VALUE_DIM)
            acc_k += tl.sum(dz * q, 0)
            acc_v += tl.sum(p * grad, 0)
        key_row = key_pointer + key.to(tl.int64) * key_grad.row + dim
        value_row = value_pointer + key.to(tl.int64) * value_grad.row + value_dim
        tl.store(key_row, (acc_k * scale).to(key_grad.pointer.dtype.element_ty), mask=dim < dims.HEAD_DIM)
        tl.store(value_row, acc_v.to(value_grad.pointer.dtype.element_ty), mask=value_dim < dims.VALUE_DIM)


@triton.jit
def fixed_to_float_kernel(sums, result, units, which, size, BLOCK: tl.constexpr):
    """result = sums / units[which], the int64 sums of `list_backward_kernel` in float32.

    Grid: ceil(size / BLOCK) programs, BLOCK elements each, contiguous.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    value = tl.load(sums + index, mask=inside, other=0).to(tl.float32) / tl.load(units + which)
    tl.store(result + index, value, mask=inside)
