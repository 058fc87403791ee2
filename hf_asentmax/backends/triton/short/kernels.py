r"""Alpha-entmax attention for short rows, at most 256 keys: all scores of a block of rows stay in registers.

Newton's method on ||[u - tau]_+||_p = 1 (see dense_forward) starts at max u - 1, a rigorous lower bound, and runs to
the precision of the output's type without touching memory. Up to 128 keys one program also holds all rows of a head,
so that the whole backward pass is one kernel: nothing but tau is saved for it, and no program waits for another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.device import (
    entmax_norm,
    excess_over,
    load_rows,
    products_to_scores,
    score_derivative,
    store_rows,
    support_powers,
    visible_interval,
    visible_pairs,
)

__all__ = ["short_backward_kernel", "short_forward_kernel"]

_FULL = tl.constexpr(1)
_MASKED = tl.constexpr(2)
_MAX_STEPS = tl.constexpr(16)


@triton.jit
def _solve(score, near_enough, exponent: tl.constexpr):
    """tau of each row of scores (-inf where masked), +inf for rows without a key.

    near_enough: how far the norm may be from 1 before the last step, which leaves about the square of it.
    """
    top = tl.max(score, 1)
    some = top > float("-inf")
    tau = tl.where(some, top - 1.0, float("inf"))
    going = tl.max(some.to(tl.int32), 0) > 0
    for _ in range(_MAX_STEPS):
        if going:
            p, s = support_powers(excess_over(score, tau[:, None]), exponent)
            total = tl.where(some, tl.sum(p, 1), 1.0)
            norm = entmax_norm(total, exponent)
            step = (norm - 1.0) * total / (norm * tl.where(some, tl.sum(s, 1), 1.0))
            tau += tl.where(some, tl.maximum(step, 0.0), 0.0)
            residual = tl.where(some & (step > 2e-7 * tl.abs(tau)), norm - 1.0, 0.0)
            going = tl.max(residual, 0) > near_enough
    return tau


@triton.jit
def _short_rows(
    q, key, value, output, mean_value, masks, scoring, slope, batch, head, kv_head, first_row, rows, base,
    row_position, start, stop, low, q_len, kv_len, near_enough,
    W: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, DV: tl.constexpr, VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """Attends to the W keys from `low` on: writes output, and mean_value unless it is None; returns tau."""
    k = load_rows(key, batch, kv_head, low, W, kv_len, True, D, HEAD_DIM)
    keys = low + tl.arange(0, W)
    score = products_to_scores(
        tl.dot(q, tl.trans(k), input_precision=PRECISION), scoring, slope, row_position[:, None],
        (keys - base).to(tl.float32)[None, :],
    )  # fmt: skip
    seen = visible_pairs(masks, batch, head, rows, keys, start, stop, q_len, kv_len)
    score = tl.where(seen, score, float("-inf"))
    tau = _solve(score, near_enough, scoring.exponent)
    p, s = support_powers(excess_over(score, tau[:, None]), scoring.exponent)
    v = load_rows(value, batch, kv_head, low, W, kv_len, True, DV, VALUE_DIM)
    weighted = tl.dot((p * P_SCALE).to(v.dtype), v, input_precision=PRECISION) * (1.0 / P_SCALE)
    store_rows(output, batch, head, first_row, weighted, q_len, DV, VALUE_DIM)
    if mean_value is not None:
        slope_sum = tl.sum(s, 1)
        mean = tl.dot((s * P_SCALE).to(v.dtype), v, input_precision=PRECISION)
        mean = mean / tl.where(slope_sum > 0, slope_sum * P_SCALE, 1.0)[:, None]
        store_rows(mean_value, batch, head, first_row, mean, q_len, DV, VALUE_DIM)
    return tau


@triton.jit
def short_forward_kernel(
    query, key, value, output, mean_value, tau_out, block_map,
    masks, scoring, heads, kv_heads, q_len, kv_len, near_enough,
    BM: tl.constexpr, W: tl.constexpr, W_SMALL: tl.constexpr, KB: tl.constexpr, MAP_BLOCKS: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, DV: tl.constexpr, VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """BM query rows of one head against all keys that they see, at most W.

    Args:
        query, key, value, output: Rows; mean_value: Rows or None.
        tau_out: (batch * heads, q_len) float32; +inf for rows without a visible key.
        block_map: (batch * heads, row blocks, key blocks) uint8 for the dense backward pass, or None; all written.
        W_SMALL: row blocks that see at most so many keys (first rows of a causal triangle) work on that many.
        near_enough: see _solve.
        MAP_BLOCKS: a power of two that holds the number of key blocks.
    """
    row_blocks = tl.cdiv(q_len, BM)
    pid = tl.program_id(0)
    group = pid // row_blocks
    row_block = pid % row_blocks
    batch = group // heads
    head = group % heads
    kv_head = head // (heads // kv_heads)
    first_row = row_block * BM
    rows = first_row + tl.arange(0, BM)
    base = first_row + kv_len - q_len
    row_position = tl.arange(0, BM).to(tl.float32)
    start, stop = visible_interval(masks, batch, rows, q_len, kv_len)
    sees = start < stop
    high = tl.max(tl.where(sees, stop, 0), 0)
    low = tl.minimum(tl.min(tl.where(sees, start, kv_len), 0), high)
    q = load_rows(query, batch, head, first_row, BM, q_len, True, D, HEAD_DIM)
    slope = 0.0
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + head) * scoring.slope_factor

    if W_SMALL < W:
        if high - low <= W_SMALL:
            tau = _short_rows(
                q, key, value, output, mean_value, masks, scoring, slope, batch, head, kv_head, first_row, rows, base,
                row_position, start, stop, low, q_len, kv_len, near_enough,
                W_SMALL, D, HEAD_DIM, DV, VALUE_DIM, PRECISION, P_SCALE,
            )  # fmt: skip
        else:
            tau = _short_rows(
                q, key, value, output, mean_value, masks, scoring, slope, batch, head, kv_head, first_row, rows, base,
                row_position, start, stop, low, q_len, kv_len, near_enough,
                W, D, HEAD_DIM, DV, VALUE_DIM, PRECISION, P_SCALE,
            )  # fmt: skip
    else:
        tau = _short_rows(
            q, key, value, output, mean_value, masks, scoring, slope, batch, head, kv_head, first_row, rows, base,
            row_position, start, stop, low, q_len, kv_len, near_enough,
            W, D, HEAD_DIM, DV, VALUE_DIM, PRECISION, P_SCALE,
        )  # fmt: skip
    tl.store(tau_out + group.to(tl.int64) * q_len + rows, tau, mask=rows < q_len)
    if block_map is not None:
        key_blocks = tl.cdiv(kv_len, KB)
        block = tl.arange(0, MAP_BLOCKS)
        all_low = tl.max(tl.where(sees, start, 0), 0)
        all_high = tl.min(tl.where(sees, stop, kv_len), 0)
        full = (block * KB >= all_low) & ((block + 1) * KB <= all_high)
        if masks.has_holes is not None:
            full = full & (tl.load(masks.has_holes + batch) == 0)
        if masks.dense is not None:
            full = full & (block < 0)
        live = (block * KB < high) & ((block + 1) * KB > low)
        kind = tl.where(live, tl.where(full, _FULL, _MASKED), 0)
        tl.store(block_map + pid.to(tl.int64) * key_blocks + block, kind.to(tl.uint8), mask=block < key_blocks)


@triton.jit
def short_backward_kernel(
    query, key, value, grad, tau_in, query_grad, key_grad, value_grad,
    masks, scoring, scale, heads, kv_heads, q_len, kv_len,
    BM: tl.constexpr, W: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    DV: tl.constexpr, VALUE_DIM: tl.constexpr, PRECISION: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of one key head and the query heads that share it; q_len <= BM and kv_len <= W.

    dz = s (dp - sum(s dp) / sum(s)); dq = scale dz k, dk = scale dz^T q, dv = p^T do (see dense_backward).
    """
    pid = tl.program_id(0)
    batch = pid // kv_heads
    kv_head = pid % kv_heads
    rows = tl.arange(0, BM)
    keys = tl.arange(0, W)
    start, stop = visible_interval(masks, batch, rows, q_len, kv_len)
    zero = kv_head * 0
    k = load_rows(key, batch, kv_head, zero, W, kv_len, True, D, HEAD_DIM)
    v = load_rows(value, batch, kv_head, zero, W, kv_len, True, DV, VALUE_DIM)
    acc_k = tl.zeros([W, D], tl.float32)
    acc_v = tl.zeros([W, DV], tl.float32)
    for member in range(0, heads // kv_heads):
        head = kv_head * (heads // kv_heads) + member
        q = load_rows(query, batch, head, zero, BM, q_len, True, D, HEAD_DIM)
        do = load_rows(grad, batch, head, zero, BM, q_len, True, DV, VALUE_DIM)
        tau = tl.load(
            tau_in + (batch * heads + head).to(tl.int64) * q_len + rows, mask=rows < q_len, other=float("inf")
        )
        slope = 0.0
        if scoring.slopes is not None:
            slope = tl.load(scoring.slopes + head) * scoring.slope_factor
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        score = products_to_scores(
            product, scoring, slope, (rows + (kv_len - q_len)).to(tl.float32)[:, None], keys.to(tl.float32)[None, :]
        )
        seen = visible_pairs(masks, batch, head, rows, keys, start, stop, q_len, kv_len)
        p, s = support_powers(tl.where(seen, excess_over(score, tau[:, None]), 0.0), scoring.exponent)
        acc_v = tl.dot(tl.trans((p * P_SCALE).to(do.dtype)), do, acc_v, input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        total = tl.sum(s, 1)
        rho = tl.sum(s * dp, 1) / tl.where(total > 0, total, 1.0)
        dz = s * (dp - rho[:, None])
        if scoring.softcap is not None:
            dz *= score_derivative(product, scoring)
        dz = dz.to(k.dtype)
        store_rows(query_grad, batch, head, zero, tl.dot(dz, k, input_precision=PRECISION) * scale, q_len, D, HEAD_DIM)
        acc_k = tl.dot(tl.trans(dz), q, acc_k, input_precision=PRECISION)
    store_rows(key_grad, batch, kv_head, zero, acc_k * scale, kv_len, D, HEAD_DIM)
    store_rows(value_grad, batch, kv_head, zero, acc_v * (1.0 / P_SCALE), kv_len, DV, VALUE_DIM)
