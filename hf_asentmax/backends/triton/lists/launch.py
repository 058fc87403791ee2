"""The sparse regime: forward and backward on lists of the few keys that can have a weight.

Row blocks whose lists do not fit are flagged on the device and left to the dense regime. Nothing waits for the host:
the launches depend on shapes alone.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from ..common.blocks import ROW_BLOCK
from ..common.launching import on_device
from ..common.problem import Problem, rows_of
from .backward import column_gradient_kernel, fixed_to_float_kernel, list_backward_kernel
from .bounds import row_bounds_kernel
from .forward import expand_kernel, list_forward_kernel
from .pilot import SAMPLED_KEYS, SAMPLED_ROWS, pilot_kernel
from .scores import LISTERS, block_maxima_kernel, candidates_kernel

__all__ = [
    "ROW_BLOCK",
    "SparseLists",
    "SparseTiles",
    "column_ends",
    "keeps_weights",
    "list_capacity",
    "sparse_backward",
    "sparse_forward",
    "sparse_tiles",
    "sparse_unsupported_reason",
]

# Bytes for the block maxima and candidate words of the row tiles that are worked on at a time.
_WORKSPACE_BYTES = 312 << 20
# Room in the lists, in keys a row on average: trained models have supports of 1 to 50.
_KEYS_A_ROW = 56


class SparseLists(NamedTuple):
    """What the backward pass reads, and what the dense regime has to do.

    Attributes:
        listed: (batch * heads, capacity) int32, the rows' lists one after another: keys, or keys with their r
            (`keeps_weights`).
        offsets, counts: (batch * heads, q_len) int32, where a row's list begins and how long it is.
        column_counts: (batch * kv_heads, kv_len) int32, how many rows list a key with r > 0; empty unless
            `keeps_weights`.
        overflow: (batch * heads, ceil(q_len / ROW_BLOCK)) uint8, 1 where a row did not fit: output, tau and gradients
            of these row blocks are the dense regime's.
    """

    listed: torch.Tensor
    offsets: torch.Tensor
    counts: torch.Tensor
    column_counts: torch.Tensor
    overflow: torch.Tensor


class SparseTiles(NamedTuple):
    """Sizes of the tiles, and warps and registers a program, for one type and head_dim.

    Attributes:
        rows: query rows a tile; ROW_BLOCK where lists keep weights, so that a block's overflow is known in one launch.
        maxima_keys: keys a step of the first pass.
        block: keys a block maximum stands for, and a step of the second pass.
        maxima_warps, maxima_stages, maxima_registers: of the first pass; registers a thread, None for no limit.
        candidate_warps, candidate_stages, candidate_registers: of the second pass.
        steps: Newton steps on the block maxima; bound_unit: blocks read at a time; bound_warps: warps there.
        words: room for a row's words of 16 keys.
        room: the most keys that a row may list.
        expand_rows, expand_warps: rows a program and warps where words become indices.
        list_rows, list_chunk, list_warps, list_registers: rows a program, keys gathered at a time, warps, and registers
            a thread, forward on the list.
        grad_rows, grad_chunk, grad_warps, grad_registers: the same backward, where a program does its rows one after
            the other.
        column_keys, column_chunk: keys that a program of the last pass does one after the other, and rows gathered at
            a time.
    """

    rows: int = 128
    maxima_keys: int = 128
    block: int = 128
    maxima_warps: int = 8
    maxima_stages: int = 3
    maxima_registers: int | None = None
    candidate_warps: int = 8
    candidate_stages: int = 3
    candidate_registers: int | None = None
    steps: int = 3
    bound_unit: int = 32
    bound_warps: int = 4
    words: int = 256
    room: int = 128
    expand_rows: int = 8
    expand_warps: int = 1
    list_rows: int = 4
    list_chunk: int = 8
    list_warps: int = 1
    list_registers: int | None = None
    grad_rows: int = 4
    grad_chunk: int = 16
    grad_warps: int = 1
    grad_registers: int | None = None
    column_keys: int = 4
    column_chunk: int = 8


def sparse_tiles(dtype: torch.dtype, head_dim: int) -> SparseTiles:
    """The tile sizes for a type and head_dim, by timings on an H100 (recipes/benchmark/NOTES.md).

    Two programs of 8 warps share a multiprocessor if each thread has 128 registers and shared memory holds both: one
    multiplies while the other looks at its scores.
    """
    if dtype == torch.float32:
        return SparseTiles(
            rows=64, maxima_keys=64, block=64, maxima_warps=4, maxima_stages=2, candidate_warps=4, candidate_stages=2
        )
    if head_dim <= 64:
        return SparseTiles(maxima_registers=128, candidate_registers=128, grad_registers=80)
    if head_dim <= 128:
        return SparseTiles(
            maxima_stages=2, candidate_stages=2, maxima_registers=128, candidate_registers=128, list_rows=2,
            grad_chunk=8,
        )  # fmt: skip
    return SparseTiles(maxima_stages=2, candidate_stages=2, list_rows=1, grad_chunk=4)


def sparse_unsupported_reason(problem: Problem) -> str | None:
    """Why the sparse regime can't do a call (the dense one can), or None."""
    if problem.softcap is not None:
        return "scores are soft-capped"
    if problem.ranges.dense_mask is not None:
        return "the mask is free"
    if not problem.scale > 0:
        return "the scale is not positive"
    if problem.key.shape[2] > 1 << 18:
        return "an entry of a list has 18 bits for the key"
    if problem.query.dtype == torch.float32 and problem.constants["D"] > 128:
        return "float32 tiles of this head_dim do not fit into a multiprocessor"
    return None


def keeps_weights(problem: Problem) -> bool:
    """Whether the lists keep r = [u - tau]_+ for the backward pass, as float16: for 16-bit inputs.

    p = r^(1/(alpha-1)) has 1/(alpha-1) times r's relative error of 2^-12.
    """
    return problem.query.dtype != torch.float32 and problem.alpha >= 1.25


def list_capacity(problem: Problem, tiles: SparseTiles) -> int:
    """Keys that the lists of a head have room for together.

    Programs draw their part in no particular order: where two runs must agree, there has to be room for all.
    """
    keys_a_row = tiles.room if torch.are_deterministic_algorithms_enabled() else min(_KEYS_A_ROW, tiles.room)
    return problem.query.shape[2] * keys_a_row


def sparse_forward(
    problem: Problem,
    output: torch.Tensor,
    tau: torch.Tensor,
    mean_value: torch.Tensor | None,
    largest_key: torch.Tensor,
    tiles: SparseTiles | None = None,
) -> SparseLists:
    r"""Exact alpha-entmax attention by lists: p_j = [(alpha-1) z_j - tau]_+^(1/(alpha-1)), output = sum_j p_j v_j.

    Args:
        problem: the call; see `sparse_unsupported_reason`.
        output: (batch, heads, q_len, value_dim), written.
        tau: (batch, heads, q_len) float32, contiguous, written: the threshold of (alpha-1) z; +inf for rows without
            keys.
        mean_value: (batch, heads, q_len, value_dim), written: sum_j s_j v_j / sum_j s_j, s = p^(2-alpha); None if no
            backward pass will follow: the lists then hold no r.
        largest_key: (batch * kv_heads,) float32, the largest Euclidean norm of a key.
        tiles: for measurements; default: what `sparse_tiles` says.

    Returns:
        The lists; output, tau and mean_value are not meaningful in overflowed row blocks.
    """
    query = problem.query
    q_len, kv_len = query.shape[2], problem.key.shape[2]
    tiles = tiles or sparse_tiles(query.dtype, query.shape[3])
    groups = problem.groups
    launch, empty = problem.launch, problem.launch.empty
    capacity = list_capacity(problem, tiles)
    listed = empty((groups, capacity), torch.int32)
    offsets, counts = (empty((groups, q_len), torch.int32) for _ in range(2))
    used = launch.zeros((groups,), torch.int32)
    packed = mean_value is not None and keeps_weights(problem)
    columns = (problem.key.shape[0] * problem.key.shape[1], kv_len) if packed else (0,)
    column_counts = launch.zeros(columns, torch.int32)
    overflow = launch.zeros((groups, -(-q_len // ROW_BLOCK)), torch.uint8)

    maxima_type = torch.float32 if query.dtype == torch.float32 else torch.bfloat16
    blocks = -(-kv_len // tiles.maxima_keys) * (tiles.maxima_keys // tiles.block)
    all_tiles = groups * -(-q_len // tiles.rows)
    tile_bytes = tiles.rows * (blocks * maxima_type.itemsize + tiles.words * 4) + blocks * 4
    at_once = max(1, min(all_tiles, _WORKSPACE_BYTES // tile_bytes))
    maxima = empty((at_once, blocks, tiles.rows), maxima_type)
    tops, bounds = (empty((at_once, tiles.rows), torch.float32) for _ in range(2))
    spans = empty((at_once, 5), torch.int32)
    active, active_counts = empty((at_once, blocks), torch.int32), empty((at_once, 2), torch.int32)
    entries = empty((at_once, tiles.rows, tiles.words), torch.int32)
    entry_counts = empty((at_once, tiles.rows, LISTERS.value), torch.int32)

    q, k, v, out = (rows_of(tensor) for tensor in (query, problem.key, problem.value, output))
    mean = None if mean_value is None else rows_of(mean_value)
    masks, scoring, lengths, constants = problem.masks, problem.scoring, problem.lengths._asdict(), problem.constants
    dims = {name: constants[name] for name in ("D", "HEAD_DIM")}
    value_dims = {name: constants[name] for name in ("DV", "VALUE_DIM")}
    with on_device(query.device):
        problem.launch(
            pilot_kernel, overflow.numel(),
            q, k, largest_key, overflow, masks, scoring, **lengths, ROOM=tiles.room, ROW_BLOCK=ROW_BLOCK,
            R=SAMPLED_ROWS, SAMPLE=SAMPLED_KEYS, **dims, PRECISION=constants["PRECISION"],
            num_warps=1 if query.itemsize == 2 and dims["D"] <= 64 else 4,
        )  # fmt: skip
        for first in range(0, all_tiles, at_once):
            count = min(at_once, all_tiles - first)
            common = {**lengths, "first_tile": first, "BM": tiles.rows}
            problem.launch(
                block_maxima_kernel, count,
                q, k, maxima, tops, spans, largest_key, overflow, masks, scoring, **common, blocks=blocks,
                BN=tiles.maxima_keys, BLOCK=tiles.block, ROW_BLOCK=ROW_BLOCK, **dims,
                PRECISION=constants["PRECISION"],
                num_warps=tiles.maxima_warps, num_stages=tiles.maxima_stages, maxnreg=tiles.maxima_registers,
            )  # fmt: skip
            problem.launch(
                row_bounds_kernel, count,
                q, maxima, tops, spans, largest_key, scoring, bounds, active, active_counts, overflow,
                **common, blocks=blocks, STEPS=tiles.steps, ROOM=tiles.words, LIST_ROOM=tiles.room,
                ROW_BLOCK=ROW_BLOCK, UNIT=tiles.bound_unit, **dims, num_warps=tiles.bound_warps,
            )  # fmt: skip
            problem.launch(
                candidates_kernel, count,
                q, k, bounds, active, active_counts, entries, entry_counts, masks, scoring, **common, blocks=blocks,
                BLOCK=tiles.block, ROOM=tiles.words, **dims, PRECISION=constants["PRECISION"],
                num_warps=tiles.candidate_warps, num_stages=tiles.candidate_stages, maxnreg=tiles.candidate_registers,
            )  # fmt: skip
            problem.launch(
                expand_kernel, count * (tiles.rows // tiles.expand_rows),
                entries, entry_counts, listed, offsets, counts, used, overflow, q_len, capacity, first,
                ROOM=tiles.words, LIST_ROOM=tiles.room, CHUNK=32, ROW_BLOCK=ROW_BLOCK, BM=tiles.rows,
                R=tiles.expand_rows, num_warps=tiles.expand_warps,
            )  # fmt: skip
            problem.launch(
                list_forward_kernel, count * (tiles.rows // tiles.list_rows),
                q, k, v, out, mean, tau, bounds, listed, offsets, counts, column_counts if packed else None, overflow,
                scoring, **common, capacity=capacity, LIST_ROOM=tiles.room, CHUNK=tiles.list_chunk, R=tiles.list_rows,
                ROW_BLOCK=ROW_BLOCK, PACK=packed, **dims, **value_dims,
                num_warps=tiles.list_warps, maxnreg=tiles.list_registers,
            )  # fmt: skip
    return SparseLists(listed, offsets, counts, column_counts, overflow)


def column_ends(column_counts: torch.Tensor) -> torch.Tensor:
    """(batch * kv_heads, kv_len) int32: where each key's records end, in the backward pass."""
    return torch.cumsum(column_counts, -1, dtype=torch.int32)


def sparse_backward(
    problem: Problem,
    tau: torch.Tensor,
    mean_value: torch.Tensor,
    lists: SparseLists,
    grad: torch.Tensor,
    query_grad: torch.Tensor,
    key_grad: torch.Tensor,
    value_grad: torch.Tensor,
    cursors: torch.Tensor,
    *,
    deterministic: bool,
    tiles: SparseTiles | None = None,
) -> None:
    """dq of the row blocks that did not overflow, and their part of dk and dv.

    Args:
        problem, tau, mean_value, lists: of `sparse_forward`.
        grad: (batch, heads, q_len, value_dim), unit stride in the last dimension.
        query_grad: (batch, heads, q_len, head_dim), written outside of the overflowed row blocks.
        key_grad, value_grad: as key and value, written.
        cursors: of `column_ends`, changed.
        deterministic: two runs agree bit by bit (through sums in 64-bit integers, slower and with more workspace).
    """
    query = problem.query
    tiles = tiles or sparse_tiles(query.dtype, query.shape[3])
    packed = keeps_weights(problem)
    launch = problem.launch
    dims = {name: problem.constants[name] for name in ("D", "HEAD_DIM", "DV", "VALUE_DIM")}
    capacity = lists.listed.shape[1]
    kv_groups, kv_len = problem.key.shape[0] * problem.key.shape[1], problem.key.shape[2]
    members = problem.groups // kv_groups
    by_columns = packed and not deterministic
    keys = values = units = records = None
    if by_columns:
        records = launch.empty((kv_groups, members * capacity), torch.int64)
    else:
        dtype = torch.int64 if deterministic else torch.float32
        units = None
        if deterministic:
            units = launch.torch(partial(_units, problem.scale), problem.query, problem.value, grad)
        keys, values = (launch.zeros(t.shape, dtype) for t in (problem.key, problem.value))
    q, do = rows_of(query), rows_of(grad)
    with on_device(query.device):
        problem.launch(
            list_backward_kernel, problem.groups * -(-query.shape[2] // tiles.grad_rows),
            q, rows_of(problem.key), rows_of(problem.value), do, rows_of(mean_value), rows_of(query_grad),
            keys, values, units, cursors, records, tau, lists.listed, lists.offsets, lists.counts, lists.overflow,
            problem.scoring, problem.scale, **problem.lengths._asdict(), capacity=capacity,
            CHUNK=tiles.grad_chunk, ROW_BLOCK=ROW_BLOCK, R=tiles.grad_rows, PACKED=packed,
            **dims, num_warps=tiles.grad_warps, maxnreg=tiles.grad_registers,
        )  # fmt: skip
        if by_columns:
            problem.launch(
                column_gradient_kernel, kv_groups * -(-kv_len // tiles.column_keys),
                q, do, rows_of(key_grad), rows_of(value_grad), cursors, lists.column_counts, records, problem.scale,
                **problem.lengths._asdict(), capacity=capacity,
                CHUNK=tiles.column_chunk, KEYS=tiles.column_keys, GROUPED=members > 1, **dims, num_warps=1,
            )  # fmt: skip
            return
        assert keys is not None and values is not None
        for which, (sums, result) in enumerate(((keys, key_grad), (values, value_grad))):
            if units is not None:
                exact = launch.empty(sums.shape, torch.float32)
                problem.launch(
                    fixed_to_float_kernel,
                    -(-sums.numel() // 1024),
                    sums,
                    exact,
                    units,
                    which,
                    sums.numel(),
                    BLOCK=1024,
                )
                sums = exact
            launch.torch(_copy, result, sums)


def _copy(result: torch.Tensor, values: torch.Tensor) -> None:
    result.copy_(values)


def _units(scale: float, query: torch.Tensor, value: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """(2,) float32 powers of two: 2^40 over the largest term that a row can add to dk and dv.

    p <= 1 and s <= 1, so |dz| <= 2 max|do||v|; up to 2^22 terms then fit into 63 bits.
    """
    value_norm = value.float().square().sum(-1).amax().sqrt()
    product = grad.float().square().sum(-1).amax().sqrt() * value_norm
    key_term = 2.0 * product * query.abs().amax().float() * scale
    terms = torch.stack([key_term, grad.abs().amax().float()]).clamp_min(1e-20)
    return torch.exp2(40.0 - torch.ceil(torch.log2(terms)))
