r"""Alpha-entmax attention for short rows, at most 256 keys: all scores of a tile of rows stay in registers.

Newton's method on ||[u - tau]_+||_q = 1, q = 1/(alpha-1) (see dense/forward.py), starts at max u - 1, which is at most
tau. It runs to the precision of the output's type without touching memory.

Up to 128 keys one program can also hold all rows of a head. The whole backward pass is then one kernel: the forward
pass saves nothing for it but tau, and no program waits for another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.device import (
    BLOCK_FULL,
    BLOCK_MASKED,
    QueryTile,
    entmax_norm,
    excess_over,
    head_slope,
    load_rows,
    query_tile,
    scaled_weights,
    score_derivative,
    store_rows,
    support_powers,
    tile_scores,
    tile_sees,
    visible_interval,
)

__all__ = ["HeadSizes", "ShortSizes", "short_backward_kernel", "short_forward_kernel"]

_MAX_STEPS = tl.constexpr(16)


class ShortSizes(NamedTuple):
    """Compile-time sizes of `short_forward_kernel`.

    Attributes:
        BM: query rows a program; W: a power of two that holds the keys.
        W_SMALL: tiles of rows that see at most this many keys (the first rows of a causal triangle) work on this many.
        KB: keys a block of the block map; MAP_BLOCKS: a power of two that holds the number of these blocks.
    """

    BM: Any
    W: Any
    W_SMALL: Any
    KB: Any
    MAP_BLOCKS: Any


class HeadSizes(NamedTuple):
    """Compile-time sizes of `short_backward_kernel`: powers of two, BM >= q_len and W >= kv_len."""

    BM: Any
    W: Any


@triton.jit
def _solve(score, near_enough, exponent: tl.constexpr):
    """tau of each row of scores (-inf where masked); +inf for rows without a key.

    Args:
        near_enough: how far the norm may be from 1 before the last step, which leaves about the square of that.
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
def _attend(
    q, key, value, output, mean_value, tile, first_row, low, masks, scoring, lengths, near_enough,
    W: tl.constexpr, dims, PRECISION: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """Attends to the W keys from `low` on: writes output, and mean_value unless it is None; returns tau."""
    DV: tl.constexpr = dims.DV
    k = load_rows(key, tile.batch, tile.kv_head, low, W, lengths.kv_len, True, dims.D, dims.HEAD_DIM)
    keys = low + tl.arange(0, W)
    score = tile_scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), scoring, tile, keys)
    score = tl.where(tile_sees(masks, tile, keys, lengths), score, float("-inf"))
    tau = _solve(score, near_enough, scoring.exponent)
    p, s = support_powers(excess_over(score, tau[:, None]), scoring.exponent)
    v = load_rows(value, tile.batch, tile.kv_head, low, W, lengths.kv_len, True, DV, dims.VALUE_DIM)
    weighted = tl.dot(scaled_weights(p, P_SCALE, v.dtype), v, input_precision=PRECISION) * (1.0 / P_SCALE)
    store_rows(output, tile.batch, tile.head, first_row, weighted, lengths.q_len, DV, dims.VALUE_DIM)
    if mean_value is not None:
        slope_sum = tl.sum(s, 1)
        mean = tl.dot(scaled_weights(s, P_SCALE, v.dtype), v, input_precision=PRECISION)
        mean = mean / tl.where(slope_sum > 0, slope_sum * P_SCALE, 1.0)[:, None]
        store_rows(mean_value, tile.batch, tile.head, first_row, mean, lengths.q_len, DV, dims.VALUE_DIM)
    return tau


@triton.jit
def short_forward_kernel(
    query, key, value, output, mean_value, tau_out, block_map,
    masks, scoring, lengths, near_enough, sizes, dims, PRECISION: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """o_i = sum_j p_ij v_j and tau_i of BM query rows of one head, against all keys that they see, at most W.

    Grid: batch * heads * ceil(q_len / BM). A program reads its queries, and once the keys and values that they see. It
    writes its rows of output, mean_value and tau and its row of the block map.

    Args:
        query, key, value, output: Rows; mean_value: Rows or None.
        tau_out: (batch * heads, q_len) float32; +inf for rows without a visible key.
        block_map: (batch * heads, row tiles, key blocks) uint8 for the dense backward pass, or None; all of it is
            written.
        near_enough: see _solve.
        sizes: ShortSizes; dims: Dims.
    """
    BM: tl.constexpr = sizes.BM
    KB: tl.constexpr = sizes.KB
    q_len = lengths.q_len
    kv_len = lengths.kv_len
    row_blocks = tl.cdiv(q_len, BM)
    pid = tl.program_id(0)
    group = pid // row_blocks
    row_block = pid % row_blocks
    first_row = row_block * BM
    tile = query_tile(group, first_row, masks, scoring, lengths, BM)
    batch, head, rows, start, stop = tile.batch, tile.head, tile.rows, tile.start, tile.stop
    sees = start < stop
    high = tl.max(tl.where(sees, stop, 0), 0)
    low = tl.minimum(tl.min(tl.where(sees, start, kv_len), 0), high)
    q = load_rows(query, batch, head, first_row, BM, q_len, True, dims.D, dims.HEAD_DIM)

    if sizes.W_SMALL < sizes.W:
        if high - low <= sizes.W_SMALL:
            tau = _attend(
                q, key, value, output, mean_value, tile, first_row, low, masks, scoring, lengths, near_enough,
                sizes.W_SMALL, dims, PRECISION, P_SCALE,
            )  # fmt: skip
        else:
            tau = _attend(
                q, key, value, output, mean_value, tile, first_row, low, masks, scoring, lengths, near_enough,
                sizes.W, dims, PRECISION, P_SCALE,
            )  # fmt: skip
    else:
        tau = _attend(
            q, key, value, output, mean_value, tile, first_row, low, masks, scoring, lengths, near_enough,
            sizes.W, dims, PRECISION, P_SCALE,
        )  # fmt: skip
    tl.store(tau_out + group.to(tl.int64) * q_len + rows, tau, mask=rows < q_len)
    if block_map is not None:
        key_blocks = tl.cdiv(kv_len, KB)
        block = tl.arange(0, sizes.MAP_BLOCKS)
        all_low = tl.max(tl.where(sees, start, 0), 0)
        all_high = tl.min(tl.where(sees, stop, kv_len), 0)
        full = (block * KB >= all_low) & ((block + 1) * KB <= all_high)
        if masks.has_holes is not None:
            full = full & (tl.load(masks.has_holes + batch) == 0)
        if masks.dense is not None:
            full = full & (block < 0)
        live = (block * KB < high) & ((block + 1) * KB > low)
        kind = tl.where(live, tl.where(full, BLOCK_FULL, BLOCK_MASKED), 0)
        tl.store(block_map + pid.to(tl.int64) * key_blocks + block, kind.to(tl.uint8), mask=block < key_blocks)


@triton.jit
def short_backward_kernel(
    query, key, value, grad, tau_in, query_grad, key_grad, value_grad,
    masks, scoring, scale, lengths, sizes, dims, PRECISION: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """dq = scale dz k, dk = scale dz^T q and dv = p^T do, with dz = s (dp - sum(s dp) / sum(s)), of one key head.

    Grid: batch * kv_heads. A program holds all keys of its head, reads the query heads that share it one after the
    other, and writes their dq and its own dk and dv.

    Args:
        query, key, value, grad: Rows, read; query_grad, key_grad, value_grad: Rows, written.
        tau_in: (batch * heads, q_len) float32, read.
        sizes: HeadSizes; dims: Dims.
    """
    BM: tl.constexpr = sizes.BM
    W: tl.constexpr = sizes.W
    D: tl.constexpr = dims.D
    DV: tl.constexpr = dims.DV
    q_len = lengths.q_len
    kv_len = lengths.kv_len
    pid = tl.program_id(0)
    batch = pid // lengths.kv_heads
    kv_head = pid % lengths.kv_heads
    rows = tl.arange(0, BM)
    keys = tl.arange(0, W)
    start, stop = visible_interval(masks, batch, rows, q_len, kv_len)
    zero = kv_head * 0
    k = load_rows(key, batch, kv_head, zero, W, kv_len, True, D, dims.HEAD_DIM)
    v = load_rows(value, batch, kv_head, zero, W, kv_len, True, DV, dims.VALUE_DIM)
    acc_k = tl.zeros([W, D], tl.float32)
    acc_v = tl.zeros([W, DV], tl.float32)
    for member in range(0, lengths.heads // lengths.kv_heads):
        head = kv_head * (lengths.heads // lengths.kv_heads) + member
        q = load_rows(query, batch, head, zero, BM, q_len, True, D, dims.HEAD_DIM)
        do = load_rows(grad, batch, head, zero, BM, q_len, True, DV, dims.VALUE_DIM)
        tau = tl.load(
            tau_in + (batch * lengths.heads + head).to(tl.int64) * q_len + rows, mask=rows < q_len, other=float("inf")
        )
        slope = head_slope(scoring, head)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        position = (rows + (kv_len - q_len)).to(tl.float32)
        tile = QueryTile(batch, head, kv_head, rows, start, stop, position, zero, slope)
        score = tile_scores(product, scoring, tile, keys)
        seen = tile_sees(masks, tile, keys, lengths)
        p, s = support_powers(tl.where(seen, excess_over(score, tau[:, None]), 0.0), scoring.exponent)
        acc_v = tl.dot(tl.trans(scaled_weights(p, P_SCALE, do.dtype)), do, acc_v, input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        total = tl.sum(s, 1)
        rho = tl.sum(s * dp, 1) / tl.where(total > 0, total, 1.0)
        dz = s * (dp - rho[:, None])
        if scoring.softcap is not None:
            dz *= score_derivative(product, scoring)
        dz = dz.to(k.dtype)
        query_rows = tl.dot(dz, k, input_precision=PRECISION) * scale
        store_rows(query_grad, batch, head, zero, query_rows, q_len, D, dims.HEAD_DIM)
        acc_k = tl.dot(tl.trans(dz), q, acc_k, input_precision=PRECISION)
    store_rows(key_grad, batch, kv_head, zero, acc_k * scale, kv_len, D, dims.HEAD_DIM)
    store_rows(value_grad, batch, kv_head, zero, acc_v * (1.0 / P_SCALE), kv_len, DV, dims.VALUE_DIM)
