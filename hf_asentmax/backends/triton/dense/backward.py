r"""The backward pass over dense tiles, without atomics: two runs are equal bit by bit.

With p and s = p^(2-alpha) recomputed from tau, dp_ij = do_i . v_j and rho_i = do_i . (sum_j s_ij v_j / sum_j s_ij):

    dz_ij = s_ij (dp_ij - rho_i),  dq_i = scale sum_j dz_ij k_j,  dk_j = scale sum_i dz_ij q_i,  dv_j = sum_i p_ij do_i

(Peters, Niculae & Martins 2019, for one row). With soft-capping dz has the factor 1 - tanh^2. Programs visit only the
blocks that the forward pass marked in the block map.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.device import (
    BLOCK_FULL,
    BLOCK_MASKED,
    excess_over,
    head_slope,
    load_rows,
    products_to_scores,
    query_tile,
    scaled_weights,
    score_derivative,
    store_rows,
    support_powers,
    tile_scores,
    tile_sees,
    visible_interval,
    visible_pairs,
)

__all__ = ["BackwardSizes", "key_gradient_kernel", "query_gradient_kernel"]

_CHUNK = tl.constexpr(128)  # block map entries, or flags, read at a time


class BackwardSizes(NamedTuple):
    """Compile-time sizes of the backward kernels.

    Attributes:
        BM: query rows, and BN: keys, of a tile.
        KB: keys, and MAP_ROWS: query rows, of a block of the block map.
        ROWS: query rows a flag of `active`.
    """

    BM: Any
    BN: Any
    KB: Any
    MAP_ROWS: Any
    ROWS: Any


@triton.jit
def _list_blocks(blocks, live, stride, total, kind: tl.constexpr):
    """Writes the indices i < total with live[i * stride] == kind to `blocks`; returns how many there are."""
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
    """Whether one of the flags [0, total) is set."""
    found = 0
    for chunk in range(0, total, _CHUNK):
        index = chunk + tl.arange(0, _CHUNK)
        found = tl.maximum(found, tl.max(tl.load(active + index, mask=index < total, other=0).to(tl.int32), 0))
    return found > 0


@triton.jit
def _query_gradient_pass(
    acc, blocks, first, last, q, do, tau, rho, key, value, tile, masks, scoring, lengths,
    MASKED: tl.constexpr, BN: tl.constexpr, KB: tl.constexpr, dims, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds sum_j dz_ij k_j over listed key blocks [first, last)."""
    parts: tl.constexpr = (KB // BN).value  # a plain number: the interpreter has no remainder by a constexpr
    for step in range(first * parts, last * parts):
        block = tl.load(blocks + step // parts).to(tl.int32)
        first_key = block * KB + (step % parts) * BN
        k = load_rows(key, tile.batch, tile.kv_head, first_key, BN, lengths.kv_len, MASKED, dims.D, dims.HEAD_DIM)
        v = load_rows(value, tile.batch, tile.kv_head, first_key, BN, lengths.kv_len, MASKED, dims.DV, dims.VALUE_DIM)
        keys = first_key + tl.arange(0, BN)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        excess = excess_over(tile_scores(product, scoring, tile, keys), tau[:, None])
        if MASKED:
            excess = tl.where(tile_sees(masks, tile, keys, lengths), excess, 0.0)
        _, s = support_powers(excess, scoring.exponent)
        dz = s * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - rho[:, None])
        if scoring.softcap is not None:
            dz *= score_derivative(product, scoring)
        acc = tl.dot(dz.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit
def query_gradient_kernel(
    query, key, value, grad, tau_in, rho_out, mean_value, query_grad, block_map, block_lists, active,
    masks, scoring, scale, lengths, sizes, dims, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq_i = scale sum_j dz_ij k_j of BM query rows of one head, and their rho_i for key_gradient_kernel.

    Grid: batch * heads * ceil(q_len / BM). A program reads its queries, grad and mean values, and the keys and values
    of the blocks that its row of the block map marks. It leaves row blocks alone where `active` is 0.

    Args:
        query, key, value, grad, mean_value: Rows, read; query_grad: Rows, written.
        tau_in, rho_out: (batch * heads, q_len) float32, read and written.
        block_map: as the forward pass left it.
        block_lists: (programs, key blocks) int16 workspace.
        active: as in dense_forward_kernel.
        sizes: BackwardSizes; dims: Dims.
    """
    BM: tl.constexpr = sizes.BM
    q_len = lengths.q_len
    row_blocks = tl.cdiv(q_len, BM)
    key_blocks = tl.cdiv(lengths.kv_len, sizes.KB)
    pid = tl.program_id(0)
    group = pid // row_blocks
    row_block = row_blocks - 1 - pid % row_blocks
    map_row = group.to(tl.int64) * tl.cdiv(q_len, sizes.MAP_ROWS) + row_block * BM // sizes.MAP_ROWS
    if active is not None:  # noqa: SIM102 (one is decided at compile time)
        if tl.load(active + group.to(tl.int64) * tl.cdiv(q_len, sizes.ROWS) + row_block * BM // sizes.ROWS) == 0:
            return
    first_row = row_block * BM
    tile = query_tile(group, first_row, masks, scoring, lengths, BM)
    batch, head, rows = tile.batch, tile.head, tile.rows
    live = block_map + map_row * key_blocks
    blocks = block_lists + (group.to(tl.int64) * row_blocks + row_block) * key_blocks
    masked = _list_blocks(blocks, live, 1, key_blocks, BLOCK_MASKED)
    total = masked + _list_blocks(blocks + masked, live, 1, key_blocks, BLOCK_FULL)
    tl.debug_barrier()

    q = load_rows(query, batch, head, first_row, BM, q_len, True, dims.D, dims.HEAD_DIM)
    do = load_rows(grad, batch, head, first_row, BM, q_len, True, dims.DV, dims.VALUE_DIM)
    tau = tl.load(tau_in + group.to(tl.int64) * q_len + rows, mask=rows < q_len, other=float("inf"))
    mean = load_rows(mean_value, batch, head, first_row, BM, q_len, True, dims.DV, dims.VALUE_DIM)
    rho = tl.sum(do.to(tl.float32) * mean.to(tl.float32), 1)
    tl.store(rho_out + group.to(tl.int64) * q_len + rows, rho, mask=rows < q_len)
    acc = tl.zeros([BM, dims.D], tl.float32)
    acc = _query_gradient_pass(
        acc, blocks, 0, masked, q, do, tau, rho, key, value, tile, masks, scoring, lengths,
        True, sizes.BN, sizes.KB, dims, PRECISION,
    )  # fmt: skip
    acc = _query_gradient_pass(
        acc, blocks, masked, total, q, do, tau, rho, key, value, tile, masks, scoring, lengths,
        False, sizes.BN, sizes.KB, dims, PRECISION,
    )  # fmt: skip
    store_rows(query_grad, batch, head, first_row, acc * scale, q_len, dims.D, dims.HEAD_DIM)


class _KeyTile(NamedTuple):
    """The keys that a program works on for one query head.

    Attributes:
        batch, head: which batch entry and query head; group: batch * heads + head.
        keys: (keys,) int32, their numbers; base: the first of them, from which positions are counted.
        slope: as in QueryTile.
    """

    batch: Any
    head: Any
    group: Any
    keys: Any
    base: Any
    slope: Any


@triton.jit
def _key_gradient_pass(
    acc_k, acc_v, blocks, first, last, k, v, query, grad, tau_in, rho_in, tile, masks, scoring, lengths,
    MASKED: tl.constexpr, sizes, dims, PRECISION: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """Adds sum_i dz_ij q_i and sum_i p_ij do_i (times P_SCALE) over listed row blocks [first, last)."""
    BM: tl.constexpr = sizes.BM
    parts: tl.constexpr = (sizes.MAP_ROWS // BM).value
    q_len = lengths.q_len
    kv_len = lengths.kv_len
    for step in range(first * parts, last * parts):
        first_row = tl.load(blocks + step // parts).to(tl.int32) * sizes.MAP_ROWS + (step % parts) * BM
        rows = first_row + tl.arange(0, BM)
        q = load_rows(query, tile.batch, tile.head, first_row, BM, q_len, True, dims.D, dims.HEAD_DIM)
        do = load_rows(grad, tile.batch, tile.head, first_row, BM, q_len, True, dims.DV, dims.VALUE_DIM)
        tau = tl.load(tau_in + tile.group.to(tl.int64) * q_len + rows, mask=rows < q_len, other=float("inf"))
        rho = tl.load(rho_in + tile.group.to(tl.int64) * q_len + rows, mask=rows < q_len, other=0.0)
        product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        position = (rows + (kv_len - q_len - tile.base)).to(tl.float32)
        key_position = (tile.keys - tile.base).to(tl.float32)
        score = products_to_scores(product, scoring, tile.slope, position[None, :], key_position[:, None])
        excess = excess_over(score, tau[None, :])
        if MASKED:
            start, stop = visible_interval(masks, tile.batch, rows, q_len, kv_len)
            seen = visible_pairs(
                masks, tile.batch, tile.head, rows, tile.keys, start, stop, q_len, kv_len, KEYS_FIRST=True
            )
            excess = tl.where(seen, excess, 0.0)
        p, s = support_powers(excess, scoring.exponent)
        acc_v = tl.dot(scaled_weights(p, P_SCALE, do.dtype), do, acc_v, input_precision=PRECISION)
        dz = s * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - rho[None, :])
        if scoring.softcap is not None:
            dz *= score_derivative(product, scoring)
        acc_k = tl.dot(dz.to(q.dtype), q, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit
def key_gradient_kernel(
    query, key, value, grad, tau_in, rho_in, key_grad, value_grad, block_map, block_lists, active,
    masks, scoring, scale, lengths, sizes, dims, PRECISION: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """dk_j = scale sum_i dz_ij q_i and dv_j = sum_i p_ij do_i of BN keys of one key head, over its query heads.

    Grid: batch * kv_heads * ceil(kv_len / BN). A program reads its keys and values, and the queries, grad, tau and rho
    of the row blocks that its columns of the block map mark. With `active`, key_grad and value_grad hold the gradients
    of the row blocks where it is 0, which the block map leaves out; the program adds those of the other row blocks.

    Args:
        query, key, value, grad: Rows, read; key_grad, value_grad: Rows, written.
        tau_in, rho_in: (batch * heads, q_len) float32, read.
        block_map: as the forward pass left it.
        block_lists: (programs, row blocks) int16 workspace.
        active: as in dense_forward_kernel.
        sizes: BackwardSizes; dims: Dims.
    """
    BN: tl.constexpr = sizes.BN
    kv_len = lengths.kv_len
    programs = tl.cdiv(kv_len, BN)
    key_blocks = tl.cdiv(kv_len, sizes.KB)
    row_blocks = tl.cdiv(lengths.q_len, sizes.MAP_ROWS)
    pid = tl.program_id(0)
    kv_group = pid // programs
    batch = kv_group // lengths.kv_heads
    kv_head = kv_group % lengths.kv_heads
    first_key = (pid % programs) * BN
    if active is not None:
        flags = lengths.heads // lengths.kv_heads * tl.cdiv(lengths.q_len, sizes.ROWS)
        if not _any_active(active + kv_group.to(tl.int64) * flags, flags):
            return
    keys = first_key + tl.arange(0, BN)
    blocks = block_lists + pid.to(tl.int64) * row_blocks
    k = load_rows(key, batch, kv_head, first_key, BN, kv_len, True, dims.D, dims.HEAD_DIM)
    v = load_rows(value, batch, kv_head, first_key, BN, kv_len, True, dims.DV, dims.VALUE_DIM)
    acc_k = tl.zeros([BN, dims.D], tl.float32)
    acc_v = tl.zeros([BN, dims.DV], tl.float32)
    for member in range(0, lengths.heads // lengths.kv_heads):
        head = kv_head * (lengths.heads // lengths.kv_heads) + member
        group = batch * lengths.heads + head
        live = block_map + group.to(tl.int64) * row_blocks * key_blocks + first_key // sizes.KB
        tl.debug_barrier()
        masked = _list_blocks(blocks, live, key_blocks, row_blocks, BLOCK_MASKED)
        total = masked + _list_blocks(blocks + masked, live, key_blocks, row_blocks, BLOCK_FULL)
        tl.debug_barrier()
        tile = _KeyTile(batch, head, group, keys, first_key, head_slope(scoring, head))
        acc_k, acc_v = _key_gradient_pass(
            acc_k, acc_v, blocks, 0, masked, k, v, query, grad, tau_in, rho_in, tile, masks, scoring, lengths,
            True, sizes, dims, PRECISION, P_SCALE,
        )  # fmt: skip
        acc_k, acc_v = _key_gradient_pass(
            acc_k, acc_v, blocks, masked, total, k, v, query, grad, tau_in, rho_in, tile, masks, scoring, lengths,
            False, sizes, dims, PRECISION, P_SCALE,
        )  # fmt: skip
    acc_k *= scale
    acc_v *= 1.0 / P_SCALE
    if active is not None:
        acc_k += load_rows(key_grad, batch, kv_head, first_key, BN, kv_len, True, dims.D, dims.HEAD_DIM)
        acc_v += load_rows(value_grad, batch, kv_head, first_key, BN, kv_len, True, dims.DV, dims.VALUE_DIM)
    store_rows(key_grad, batch, kv_head, first_key, acc_k, kv_len, dims.D, dims.HEAD_DIM)
    store_rows(value_grad, batch, kv_head, first_key, acc_v, kv_len, dims.DV, dims.VALUE_DIM)
