"""Launches of the lists' kernels, forward and backward. README.md in this folder describes the steps.

Row blocks whose lists do not fit are flagged on the device and left to the dense regime. Nothing waits for the host:
the launches depend on shapes alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from ..common.blocks import ROW_BLOCK
from ..common.device import Rows
from ..common.launching import on_device
from ..common.problem import Problem, rows_of
from ..common.state import Gradients
from .backward import column_gradient_kernel, fixed_to_float_kernel, list_backward_kernel
from .bounds import row_bounds_kernel
from .candidates import candidates_kernel
from .device import KeyRecords, KeySums, Lists
from .expand import expand_kernel
from .forward import list_forward_kernel
from .maxima import block_maxima_kernel
from .pilot import SAMPLED_KEYS, SAMPLED_ROWS, pilot_kernel
from .tiles import ListTiles, keeps_weights, list_tiles
from .workspace import TileWorkspace, new_lists, new_workspace

__all__ = ["column_ends", "lists_backward", "lists_forward"]

# Elements a program of fixed_to_float_kernel.
_CONVERTED_AT_ONCE = 1024


class _ForwardRows(NamedTuple):
    """What `list_forward_kernel` reads and writes, and what tells it how."""

    output: Rows
    mean_value: Rows | None
    tau: torch.Tensor
    lists: Lists
    used: torch.Tensor
    packed: bool


def _score_constants(problem: Problem) -> dict[str, Any]:
    return {name: problem.constants[name] for name in ("D", "HEAD_DIM", "PRECISION")}


def lists_forward(
    problem: Problem,
    output: torch.Tensor,
    tau: torch.Tensor,
    mean_value: torch.Tensor | None,
    largest_key: torch.Tensor,
    tiles: ListTiles | None = None,
) -> Lists:
    r"""Exact alpha-entmax attention by lists: p_j = [(alpha-1) z_j - tau]_+^(1/(alpha-1)), output = sum_j p_j v_j.

    Args:
        problem: the call; `lists_unsupported_reason` says which calls cannot be done.
        output: (batch, heads, q_len, value_dim), written.
        tau: (batch, heads, q_len) float32, contiguous, written: the threshold of (alpha-1) z; +inf for rows without
            keys.
        mean_value: (batch, heads, q_len, value_dim), written: sum_j s_j v_j / sum_j s_j, s = p^(2-alpha). None if no
            backward pass will follow; the lists then hold no r.
        largest_key: (batch * kv_heads,) float32, the largest Euclidean norm of a key.
        tiles: sizes instead of `list_tiles`'s choice, for measurements.

    Returns:
        The lists. output, tau and mean_value are not meaningful in overflowed row blocks.
    """
    tiles = tiles or list_tiles(problem.query.dtype, problem.query.shape[3])
    packed = mean_value is not None and keeps_weights(problem)
    lists, used = new_lists(problem, tiles, packed)
    workspace = new_workspace(problem, tiles)
    mean_rows = None if mean_value is None else rows_of(mean_value)
    rows = _ForwardRows(rows_of(output), mean_rows, tau, lists, used, packed)
    with on_device(problem.query.device):
        _flag_flat_rows(problem, tiles, largest_key, lists.overflow)
        for first in range(0, workspace.tiles, workspace.at_once):
            count = min(workspace.at_once, workspace.tiles - first)
            _find_candidates(problem, tiles, workspace, largest_key, lists.overflow, first, count)
            _attend_to_lists(problem, tiles, workspace, rows, first, count)
    return lists


def _flag_flat_rows(problem: Problem, tiles: ListTiles, largest_key: torch.Tensor, overflow: torch.Tensor) -> None:
    """Step 1: row blocks whose lists cannot fit, by a sample of the keys."""
    problem.launch(
        pilot_kernel, overflow.numel(),
        rows_of(problem.query), rows_of(problem.key), largest_key, overflow, problem.masks, problem.scoring,
        problem.lengths, ROOM=tiles.room, ROW_BLOCK=ROW_BLOCK, R=SAMPLED_ROWS, SAMPLE=SAMPLED_KEYS,
        **_score_constants(problem),
        num_warps=1 if problem.query.itemsize == 2 and problem.constants["D"] <= 64 else 4,
    )  # fmt: skip


def _find_candidates(
    problem: Problem,
    tiles: ListTiles,
    workspace: TileWorkspace,
    largest_key: torch.Tensor,
    overflow: torch.Tensor,
    first: int,
    count: int,
) -> None:
    """Steps 2 to 4, of `count` row tiles from tile `first` on: block maxima, bounds on tau, candidate words."""
    query, key, lengths = rows_of(problem.query), rows_of(problem.key), problem.lengths
    maxima, key_blocks, words = workspace.maxima, workspace.key_blocks, workspace.words
    constants = _score_constants(problem)
    problem.launch(
        block_maxima_kernel, count,
        query, key, maxima, largest_key, overflow, problem.masks, problem.scoring, lengths, first, workspace.blocks,
        BM=tiles.rows, BN=tiles.maxima_keys, BLOCK=tiles.block, ROW_BLOCK=ROW_BLOCK, **constants,
        num_warps=tiles.maxima_warps, num_stages=tiles.maxima_stages, maxnreg=tiles.maxima_registers,
    )  # fmt: skip
    problem.launch(
        row_bounds_kernel, count,
        query, maxima, largest_key, problem.scoring, key_blocks, overflow, lengths, first, workspace.blocks,
        STEPS=tiles.steps, ROOM=tiles.words, LIST_ROOM=tiles.room, ROW_BLOCK=ROW_BLOCK, UNIT=tiles.bound_unit,
        BM=tiles.rows, D=constants["D"], HEAD_DIM=constants["HEAD_DIM"], num_warps=tiles.bound_warps,
    )  # fmt: skip
    problem.launch(
        candidates_kernel, count,
        query, key, key_blocks, words, problem.masks, problem.scoring, lengths, first, workspace.blocks,
        BM=tiles.rows, BLOCK=tiles.block, ROOM=tiles.words, **constants,
        num_warps=tiles.candidate_warps, num_stages=tiles.candidate_stages, maxnreg=tiles.candidate_registers,
    )  # fmt: skip


def _attend_to_lists(
    problem: Problem, tiles: ListTiles, workspace: TileWorkspace, rows: _ForwardRows, first: int, count: int
) -> None:
    """Steps 5 and 6, of `count` row tiles from tile `first` on: the lists, then tau and output on them."""
    lists = rows.lists
    without_columns = lists._replace(column_counts=None)
    capacity = lists.listed.shape[1]
    problem.launch(
        expand_kernel, count * (tiles.rows // tiles.expand_rows),
        workspace.words, without_columns, rows.used, problem.query.shape[2], capacity, first,
        ROOM=tiles.words, LIST_ROOM=tiles.room, CHUNK=32, ROW_BLOCK=ROW_BLOCK, BM=tiles.rows, R=tiles.expand_rows,
        num_warps=tiles.expand_warps,
    )  # fmt: skip
    problem.launch(
        list_forward_kernel, count * (tiles.rows // tiles.list_rows),
        rows_of(problem.query), rows_of(problem.key), rows_of(problem.value), rows.output, rows.mean_value, rows.tau,
        workspace.key_blocks.bounds, lists if rows.packed else without_columns, problem.scoring, problem.lengths,
        capacity, first, problem.dims, LIST_ROOM=tiles.room, CHUNK=tiles.list_chunk, BM=tiles.rows,
        R=tiles.list_rows, ROW_BLOCK=ROW_BLOCK, PACK=rows.packed, num_warps=tiles.list_warps,
        maxnreg=tiles.list_registers,
    )  # fmt: skip


def column_ends(column_counts: torch.Tensor) -> torch.Tensor:
    """(batch * kv_heads, kv_len) int32: where each key's records end, in the backward pass."""
    return torch.cumsum(column_counts, -1, dtype=torch.int32)


def lists_backward(
    problem: Problem,
    tau: torch.Tensor,
    mean_value: torch.Tensor,
    lists: Lists,
    gradients: Gradients,
    cursors: torch.Tensor,
    *,
    deterministic: bool,
    tiles: ListTiles | None = None,
) -> None:
    """dq of the row blocks that did not overflow, and their part of dk and dv.

    Args:
        problem, tau, mean_value, lists: of `lists_forward`.
        gradients: the output's gradient, read, and those of query, key and value, written.
        cursors: of `column_ends`, changed.
        deterministic: two runs agree bit for bit, through sums in 64-bit integers, which are slower and take more
            workspace.
    """
    tiles = tiles or list_tiles(problem.query.dtype, problem.query.shape[3])
    by_records = keeps_weights(problem) and not deterministic
    if by_records:
        sums, records = KeySums(None, None, None), _new_records(problem, lists)
    else:
        sums, records = _new_sums(problem, gradients.output, deterministic), None
    with on_device(problem.query.device):
        problem.launch(
            list_backward_kernel, problem.groups * -(-problem.query.shape[2] // tiles.grad_rows),
            rows_of(problem.query), rows_of(problem.key), rows_of(problem.value), rows_of(gradients.output),
            rows_of(mean_value), rows_of(gradients.query), sums, KeyRecords(cursors, None, records), tau,
            lists._replace(column_counts=None), problem.scoring, problem.scale, problem.lengths,
            lists.listed.shape[1], problem.dims, CHUNK=tiles.grad_chunk, ROW_BLOCK=ROW_BLOCK, R=tiles.grad_rows,
            PACKED=keeps_weights(problem), num_warps=tiles.grad_warps, maxnreg=tiles.grad_registers,
        )  # fmt: skip
        if by_records:
            _gather_records(problem, KeyRecords(cursors, lists.column_counts, records), lists, gradients, tiles)
        else:
            _write_sums(problem, sums, gradients)


def _new_records(problem: Problem, lists: Lists) -> torch.Tensor:
    batch, kv_heads = problem.key.shape[:2]
    members = problem.query.shape[1] // kv_heads
    return problem.launch.empty((batch * kv_heads, members * lists.listed.shape[1]), torch.int64)


def _new_sums(problem: Problem, grad: torch.Tensor, deterministic: bool) -> KeySums:
    """Zeros in float32, or in int64 with their units."""
    units = None
    if deterministic:
        units = problem.launch.torch(partial(_units, problem.scale), problem.query, problem.value, grad)
    dtype = torch.int64 if deterministic else torch.float32
    keys, values = (problem.launch.zeros(tensor.shape, dtype) for tensor in (problem.key, problem.value))
    return KeySums(keys, values, units)


def _gather_records(
    problem: Problem, columns: KeyRecords, lists: Lists, gradients: Gradients, tiles: ListTiles
) -> None:
    """Step 8 through records: each key gathers the rows that give it a weight."""
    batch, kv_heads, kv_len, _ = problem.key.shape
    problem.launch(
        column_gradient_kernel, batch * kv_heads * -(-kv_len // tiles.column_keys),
        rows_of(problem.query), rows_of(gradients.output), rows_of(gradients.key), rows_of(gradients.value), columns,
        problem.scale, problem.lengths, lists.listed.shape[1], problem.dims, CHUNK=tiles.column_chunk,
        KEYS=tiles.column_keys, GROUPED=problem.query.shape[1] > kv_heads, num_warps=1,
    )  # fmt: skip


def _write_sums(problem: Problem, sums: KeySums, gradients: Gradients) -> None:
    """Step 8 through sums: they become the gradients of key and value."""
    for which, (total, result) in enumerate(((sums.of_keys, gradients.key), (sums.of_values, gradients.value))):
        values = total
        if sums.units is not None:
            values = problem.launch.empty(total.shape, torch.float32)
            problem.launch(
                fixed_to_float_kernel, -(-total.numel() // _CONVERTED_AT_ONCE),
                total, values, sums.units, which, total.numel(), BLOCK=_CONVERTED_AT_ONCE,
            )  # fmt: skip
        problem.launch.torch(_copy, result, values)


def _copy(result: torch.Tensor, values: torch.Tensor) -> None:
    result.copy_(values)


def _units(scale: float, query: torch.Tensor, value: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """(2,) float32 powers of two: 2^40 over the largest term that a row can add to dk and to dv.

    p <= 1 and s <= 1, so |dz| <= 2 max|do||v|. Up to 2^22 terms then fit into 63 bits.
    """
    value_norm = value.float().square().sum(-1).amax().sqrt()
    product = grad.float().square().sum(-1).amax().sqrt() * value_norm
    key_term = 2.0 * product * query.abs().amax().float() * scale
    terms = torch.stack([key_term, grad.abs().amax().float()]).clamp_min(1e-20)
    return torch.exp2(40.0 - torch.ceil(torch.log2(terms)))
