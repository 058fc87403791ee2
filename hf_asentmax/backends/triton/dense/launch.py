"""Launches of the dense kernels. Nothing here waits for the device."""

from __future__ import annotations

import torch
import triton.language as tl

from ..common.blocks import KEY_BLOCK, ROW_BLOCK, blocks_of
from ..common.launching import on_device
from ..common.problem import Problem, padded, rows_of
from ..common.state import Gradients, TileState
from .backward import BackwardSizes, key_gradient_kernel, query_gradient_kernel
from .forward import ForwardSizes, dense_forward_kernel, key_norm_kernel
from .tiles import Tiles, class_count, forward_tiles, key_gradient_tiles, query_gradient_tiles, sample_size

__all__ = ["dense_backward", "dense_forward", "largest_key_norms"]

_NORM_BLOCK = 128  # keys a program of key_norm_kernel


def _tolerances(problem: Problem) -> tuple[float, float]:
    """(near_enough, accepted) of dense_forward_kernel, as distances of the norm from 1.

    A distance d before the last step leaves an error of about d^2 / 20 in the output, and of d / 10 in the mean value
    and in an output that is normalised instead (simulated). A step of the passes leaves at most the cube of the
    distance for alpha = 1.5 (simulated), at most four times the square for other alpha.
    """
    accepted = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}[problem.query.dtype]
    return (accepted ** (1 / 3) if problem.alpha == 1.5 else (accepted / 4) ** 0.5), accepted


def largest_key_norms(problem: Problem) -> torch.Tensor:
    """(batch * kv_heads,) float32: the largest norm of a key of each head, from which ALiBi's reach follows."""
    key = problem.key
    batch, kv_heads, kv_len, head_dim = key.shape
    norms = problem.launch.empty((batch * kv_heads, blocks_of(kv_len, _NORM_BLOCK)), torch.float32)
    with on_device(key.device):
        problem.launch(
            key_norm_kernel,
            norms.numel(),
            rows_of(key),
            norms,
            kv_heads,
            kv_len,
            padded(head_dim),
            head_dim,
            _NORM_BLOCK,
        )
    return problem.launch.torch(_row_maxima, norms)


def _row_maxima(norms: torch.Tensor) -> torch.Tensor:
    return norms.amax(dim=1)


def dense_forward(
    problem: Problem,
    output: torch.Tensor,
    state: TileState,
    active: torch.Tensor | None = None,
    largest_key: torch.Tensor | None = None,
) -> None:
    """Writes output (batch, heads, q_len, value_dim) and the state, whose block map is zero before.

    Args:
        problem: the call.
        output: unit stride in the last dimension.
        state: tau, and the rest where a backward pass may follow.
        active: (batch * heads, blocks of ROW_BLOCK rows) uint8; rows of blocks where it is 0 are left alone.
        largest_key: what `largest_key_norms` returned, where it was called.
    """
    tiles = forward_tiles(problem)
    near_enough, accepted = _tolerances(problem)
    if largest_key is None and problem.slopes is not None:
        largest_key = largest_key_norms(problem)
    sizes = (tiles.rows, tiles.keys, KEY_BLOCK, ROW_BLOCK, sample_size(problem), class_count(problem))
    with on_device(problem.launch.device):
        problem.launch(
            dense_forward_kernel,
            problem.groups * blocks_of(problem.query.shape[2], tiles.rows),
            rows_of(problem.query),
            rows_of(problem.key),
            rows_of(problem.value),
            rows_of(output),
            None if state.mean_value is None else rows_of(state.mean_value),
            state.tau,
            state.block_map,
            largest_key,
            active,
            problem.masks,
            problem.scoring,
            problem.lengths,
            near_enough,
            accepted,
            ForwardSizes(*(tl.constexpr(size) for size in sizes)),
            problem.dims,
            PRECISION=problem.constants["PRECISION"],
            P_SCALE=problem.weight_scale,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            maxnreg=tiles.registers,
        )


def dense_backward(
    problem: Problem, state: TileState, gradients: Gradients, map_rows: int, active: torch.Tensor | None = None
) -> None:
    """Writes the gradients of query, key and value.

    Args:
        problem: the call.
        state: what the forward pass left, complete.
        gradients: where they go, and the output's gradient.
        map_rows: query rows a block of the state's block map.
        active: as in `dense_forward`. The gradients of key and value then hold those of the other rows, and those of
            the active rows are added.
    """
    assert state.mean_value is not None and state.block_map is not None
    rho = problem.launch.empty(state.tau.shape, torch.float32)
    inputs = (*(rows_of(t) for t in (problem.query, problem.key, problem.value, gradients.output)), state.tau, rho)
    call = (problem.masks, problem.scoring, problem.scale, problem.lengths)
    row_blocks, key_blocks = state.block_map.shape[1:]
    with on_device(gradients.output.device):
        tiles = query_gradient_tiles(problem, map_rows)
        programs = problem.groups * blocks_of(problem.query.shape[2], tiles.rows)
        problem.launch(
            query_gradient_kernel,
            programs,
            *inputs,
            rows_of(state.mean_value),
            rows_of(gradients.query),
            state.block_map,
            problem.launch.empty((programs, key_blocks), torch.int16),
            active,
            *call,
            _backward_sizes(tiles, map_rows),
            problem.dims,
            PRECISION=problem.constants["PRECISION"],
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        tiles = key_gradient_tiles(problem, map_rows)
        batch, kv_heads, kv_len, _ = problem.key.shape
        programs = batch * kv_heads * blocks_of(kv_len, tiles.keys)
        problem.launch(
            key_gradient_kernel,
            programs,
            *inputs,
            rows_of(gradients.key),
            rows_of(gradients.value),
            state.block_map,
            problem.launch.empty((programs, row_blocks), torch.int16),
            active,
            *call,
            _backward_sizes(tiles, map_rows),
            problem.dims,
            PRECISION=problem.constants["PRECISION"],
            P_SCALE=problem.weight_scale,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )


def _backward_sizes(tiles: Tiles, map_rows: int) -> BackwardSizes:
    sizes = (tiles.rows, tiles.keys, KEY_BLOCK, map_rows, ROW_BLOCK)
    return BackwardSizes(*(tl.constexpr(size) for size in sizes))
