r"""Exact alpha-entmax attention over dense tiles, backward, without atomics (two runs are bit-equal).

With p and s = p^(2-alpha) recomputed from tau, dp_ij = do_i . v_j and rho_i = do_i . (sum_j s_ij v_j / sum_j s_ij):

    dz_ij = s_ij (dp_ij - rho_i),  dq_i = scale sum_j dz_ij k_j,  dk_j = scale sum_i dz_ij q_i,  dv_j = sum_i p_ij do_i

(Peters, Niculae & Martins 2019, for one row; with soft-capping dz carries the factor 1 - tanh^2.) Only the blocks that
the forward pass marked as live are visited.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.device import (
    excess_over,
    load_rows,
    products_to_scores,
    score_derivative,
    store_rows,
    support_powers,
    visible_interval,
    visible_pairs,
)

__all__ = ["key_gradient_kernel", "query_gradient_kernel"]

_FULL = tl.constexpr(1)
_MASKED = tl.constexpr(2)
_CHUNK = tl.constexpr(128)


@triton.jit
def _list_blocks(blocks, live, stride, total, kind: tl.constexpr):
    """Lists the indices i < total with live[i * stride] == kind; how many there are."""
    count = 0
    for chunk in range(0, total, _CHUNK):
        index = chunk + tl.arange(0, _CHUNK)
        keep = tl.load(live + index.to(tl.int64) * stride, mask=index < total, other=0) == kind
        ones = keep.to(tl.int32)
        tl.store(blocks + count + tl.cumsum(ones, 0) - 1, index.to(tl.int16), mask=keep)
        count += tl.sum(ones, 0)
    return count


@triton.jit
def _any_active(active, total):
    """Is one of the flags [0, total) set?"""
    found = 0
    for chunk in range(0, total, _CHUNK):
        index = chunk + tl.arange(0, _CHUNK)
        found = tl.maximum(found, tl.max(tl.load(active + index, mask=index < total, other=0).to(tl.int32), 0))
    return found > 0


@triton.jit
def _query_gradient_pass(
    acc, blocks, first, last, q, do, tau, rho,
    key, value, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop, q_len, kv_len,
    MASKED: tl.constexpr, BN: tl.constexpr, KB: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    DV: tl.constexpr, VALUE_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds sum_j dz_ij k_j over listed key blocks [first, last)."""
    parts: tl.constexpr = KB // BN
    for step in range(first * parts, last * parts):
        block = tl.load(blocks + step // parts).to(tl.int32)
        first_key = block * KB + (step % parts) * BN
        k = load_rows(key, batch, kv_head, first_key, BN, kv_len, MASKED, D, HEAD_DIM)
        v = load_rows(value, batch, kv_head, first_key, BN, kv_len, MASKED, DV, VALUE_DIM)
        keys = first_key + tl.arange(0, BN)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        score = products_to_scores(
            product, scoring, slope, row_position[:, None], (keys - base).to(tl.float32)[None, :]
        )
        excess = excess_over(score, tau[:, None])
        if MASKED:
            seen = visible_pairs(masks, batch, head, rows, keys, start, stop, q_len, kv_len)
            excess = tl.where(seen, excess, 0.0)
        _, s = support_powers(excess, scoring.exponent)
        dz = s * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - rho[:, None])
        if scoring.softcap is not None:
            dz *= score_derivative(product, scoring)
        acc = tl.dot(dz.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit
def query_gradient_kernel(
    query, key, value, grad, tau_in, rho_out, mean_value, query_grad, block_map, block_lists, active,
    masks, scoring, scale, heads, kv_heads, q_len, kv_len,
    BM: tl.constexpr, BN: tl.constexpr, KB: tl.constexpr, MAP_ROWS: tl.constexpr, ACTIVE_ROWS: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, DV: tl.constexpr, VALUE_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BM query rows, and their rho for key_gradient_kernel.

    tau_in, rho_out: (batch * heads, q_len) float32. block_map: as the forward pass left it. block_lists: int16
    workspace, (programs, key blocks). Row blocks where active is 0 are left alone.
    """
    row_blocks = tl.cdiv(q_len, BM)
    key_blocks = tl.cdiv(kv_len, KB)
    pid = tl.program_id(0)
    group = pid // row_blocks
    row_block = row_blocks - 1 - pid % row_blocks
    map_row = group.to(tl.int64) * tl.cdiv(q_len, MAP_ROWS) + row_block * BM // MAP_ROWS
    if active is not None:  # noqa: SIM102 (one is decided at compile time)
        if tl.load(active + group.to(tl.int64) * tl.cdiv(q_len, ACTIVE_ROWS) + row_block * BM // ACTIVE_ROWS) == 0:
            return
    batch = group // heads
    head = group % heads
    kv_head = head // (heads // kv_heads)
    first_row = row_block * BM
    rows = first_row + tl.arange(0, BM)
    base = first_row + kv_len - q_len
    row_position = tl.arange(0, BM).to(tl.float32)
    live = block_map + map_row * key_blocks
    blocks = block_lists + (group.to(tl.int64) * row_blocks + row_block) * key_blocks
    masked = _list_blocks(blocks, live, 1, key_blocks, _MASKED)
    total = masked + _list_blocks(blocks + masked, live, 1, key_blocks, _FULL)
    tl.debug_barrier()

    start, stop = visible_interval(masks, batch, rows, q_len, kv_len)
    q = load_rows(query, batch, head, first_row, BM, q_len, True, D, HEAD_DIM)
    do = load_rows(grad, batch, head, first_row, BM, q_len, True, DV, VALUE_DIM)
    tau = tl.load(tau_in + group.to(tl.int64) * q_len + rows, mask=rows < q_len, other=float("inf"))
    mean = load_rows(mean_value, batch, head, first_row, BM, q_len, True, DV, VALUE_DIM)
    rho = tl.sum(do.to(tl.float32) * mean.to(tl.float32), 1)
    tl.store(rho_out + group.to(tl.int64) * q_len + rows, rho, mask=rows < q_len)
    slope = 0.0
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + head) * scoring.slope_factor
    acc = tl.zeros([BM, D], tl.float32)
    acc = _query_gradient_pass(
        acc, blocks, 0, masked, q, do, tau, rho,
        key, value, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop, q_len, kv_len,
        True, BN, KB, D, HEAD_DIM, DV, VALUE_DIM, PRECISION,
    )  # fmt: skip
    acc = _query_gradient_pass(
        acc, blocks, masked, total, q, do, tau, rho,
        key, value, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop, q_len, kv_len,
        False, BN, KB, D, HEAD_DIM, DV, VALUE_DIM, PRECISION,
    )  # fmt: skip
    store_rows(query_grad, batch, head, first_row, acc * scale, q_len, D, HEAD_DIM)


@triton.jit
def _key_gradient_pass(
    acc_k, acc_v, blocks, first, last, k, v, query, grad, tau_in, rho_in,
    masks, scoring, slope, batch, head, group, keys, base, q_len, kv_len,
    MASKED: tl.constexpr, BM: tl.constexpr, MAP_ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    DV: tl.constexpr, VALUE_DIM: tl.constexpr, PRECISION: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """Adds sum_i dz_ij q_i and sum_i p_ij do_i (times P_SCALE) over listed row blocks [first, last)."""
    parts: tl.constexpr = MAP_ROWS // BM
    for step in range(first * parts, last * parts):
        first_row = tl.load(blocks + step // parts).to(tl.int32) * MAP_ROWS + (step % parts) * BM
        rows = first_row + tl.arange(0, BM)
        q = load_rows(query, batch, head, first_row, BM, q_len, True, D, HEAD_DIM)
        do = load_rows(grad, batch, head, first_row, BM, q_len, True, DV, VALUE_DIM)
        tau = tl.load(tau_in + group.to(tl.int64) * q_len + rows, mask=rows < q_len, other=float("inf"))
        rho = tl.load(rho_in + group.to(tl.int64) * q_len + rows, mask=rows < q_len, other=0.0)
        product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        position = (rows + (kv_len - q_len - base)).to(tl.float32)
        score = products_to_scores(product, scoring, slope, position[None, :], (keys - base).to(tl.float32)[:, None])
        excess = excess_over(score, tau[None, :])
        if MASKED:
            start, stop = visible_interval(masks, batch, rows, q_len, kv_len)
            seen = visible_pairs(masks, batch, head, rows, keys, start, stop, q_len, kv_len, KEYS_FIRST=True)
            excess = tl.where(seen, excess, 0.0)
        p, s = support_powers(excess, scoring.exponent)
        acc_v = tl.dot((p * P_SCALE).to(do.dtype), do, acc_v, input_precision=PRECISION)
        dz = s * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - rho[None, :])
        if scoring.softcap is not None:
            dz *= score_derivative(product, scoring)
        acc_k = tl.dot(dz.to(q.dtype), q, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit
def key_gradient_kernel(
    query, key, value, grad, tau_in, rho_in, key_grad, value_grad, block_map, block_lists, active,
    masks, scoring, scale, heads, kv_heads, q_len, kv_len,
    BM: tl.constexpr, BN: tl.constexpr, KB: tl.constexpr, MAP_ROWS: tl.constexpr, ACTIVE_ROWS: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, DV: tl.constexpr, VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys of one key head, over all query heads that share it.

    block_lists is int16 workspace, (programs, row blocks). With active, key_grad and value_grad hold the gradients of
    the row blocks where it is 0, whose part of the block map is empty; those of the others are added.
    """
    programs = tl.cdiv(kv_len, BN)
    key_blocks = tl.cdiv(kv_len, KB)
    row_blocks = tl.cdiv(q_len, MAP_ROWS)
    pid = tl.program_id(0)
    kv_group = pid // programs
    batch = kv_group // kv_heads
    kv_head = kv_group % kv_heads
    first_key = (pid % programs) * BN
    if active is not None:
        flags = heads // kv_heads * tl.cdiv(q_len, ACTIVE_ROWS)
        if not _any_active(active + kv_group.to(tl.int64) * flags, flags):
            return
    keys = first_key + tl.arange(0, BN)
    blocks = block_lists + pid.to(tl.int64) * row_blocks
    k = load_rows(key, batch, kv_head, first_key, BN, kv_len, True, D, HEAD_DIM)
    v = load_rows(value, batch, kv_head, first_key, BN, kv_len, True, DV, VALUE_DIM)
    acc_k = tl.zeros([BN, D], tl.float32)
    acc_v = tl.zeros([BN, DV], tl.float32)
    for member in range(0, heads // kv_heads):
        head = kv_head * (heads // kv_heads) + member
        group = batch * heads + head
        live = block_map + group.to(tl.int64) * row_blocks * key_blocks + first_key // KB
        tl.debug_barrier()
        masked = _list_blocks(blocks, live, key_blocks, row_blocks, _MASKED)
        total = masked + _list_blocks(blocks + masked, live, key_blocks, row_blocks, _FULL)
        tl.debug_barrier()
        slope = 0.0
        if scoring.slopes is not None:
            slope = tl.load(scoring.slopes + head) * scoring.slope_factor
        acc_k, acc_v = _key_gradient_pass(
            acc_k, acc_v, blocks, 0, masked, k, v, query, grad, tau_in, rho_in,
            masks, scoring, slope, batch, head, group, keys, first_key, q_len, kv_len,
            True, BM, MAP_ROWS, D, HEAD_DIM, DV, VALUE_DIM, PRECISION, P_SCALE,
        )  # fmt: skip
        acc_k, acc_v = _key_gradient_pass(
            acc_k, acc_v, blocks, masked, total, k, v, query, grad, tau_in, rho_in,
            masks, scoring, slope, batch, head, group, keys, first_key, q_len, kv_len,
            False, BM, MAP_ROWS, D, HEAD_DIM, DV, VALUE_DIM, PRECISION, P_SCALE,
        )  # fmt: skip
    acc_k *= scale
    acc_v *= 1.0 / P_SCALE
    if active is not None:
        acc_k += load_rows(key_grad, batch, kv_head, first_key, BN, kv_len, True, D, HEAD_DIM)
        acc_v += load_rows(value_grad, batch, kv_head, first_key, BN, kv_len, True, DV, VALUE_DIM)
    store_rows(key_grad, batch, kv_head, first_key, acc_k, kv_len, D, HEAD_DIM)
    store_rows(value_grad, batch, kv_head, first_key, acc_v, kv_len, DV, VALUE_DIM)
