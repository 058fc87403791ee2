"""Launches of the dense and short kernels: which of them, tile sizes, workspace. Nothing here waits for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..common.launching import on_device
from ..common.problem import Problem, padded, rows_of
from ..common.tiles import (
    UNSAMPLED_KEYS,
    class_count,
    forward_tiles,
    key_gradient_tiles,
    map_rows,
    query_gradient_tiles,
    regime,
    short_rows,
    short_warps,
    single_backward_warps,
    single_rows,
)
from ..short.kernels import short_backward_kernel, short_forward_kernel
from .backward import key_gradient_kernel, query_gradient_kernel
from .forward import ACTIVE_ROWS, KEY_BLOCK, dense_forward_kernel, key_norm_kernel

__all__ = ["DenseState", "dense_backward", "dense_forward", "largest_key_norms", "new_dense_state"]


class DenseState(NamedTuple):
    """What the dense forward pass leaves for the backward pass.

    Attributes:
        tau: (batch, heads, q_len) float32 threshold of (alpha - 1) z; +inf for rows without a visible key.
        mean_value: (batch, heads, q_len, value_dim), sum_j s_j v_j / sum_j s_j with s = p^(2 - alpha).
        block_map: (batch * heads, row blocks, key blocks) uint8, see dense_forward.KEY_BLOCK.
            Where one program does a head (tiles.regime "single"), or no backward pass follows, mean_value and
            block_map are None.
    """

    tau: torch.Tensor
    mean_value: torch.Tensor | None = None
    block_map: torch.Tensor | None = None


def _blocks(length: int, size: int) -> int:
    return -(-length // size)


def _tolerances(problem: Problem) -> tuple[float, float]:
    """(near_enough, accepted) of dense_forward_kernel, as distances of the norm from 1.

    A distance d before the last step leaves an error of about d^2 / 20 in the output, and of d / 10 in the mean value
    and in an output that is normalised instead (simulated). A step of the passes leaves at most the cube of the
    distance for alpha = 1.5 (simulated), at most four times the square for other alpha.
    """
    accepted = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}[problem.query.dtype]
    return (accepted ** (1 / 3) if problem.alpha == 1.5 else (accepted / 4) ** 0.5), accepted


def new_dense_state(problem: Problem, *, for_backward: bool = True) -> DenseState:
    """Fresh state: an empty block map, and memory for the rest (tau alone if no backward pass will follow)."""
    query, value = problem.query, problem.value
    batch, heads, q_len, _ = query.shape
    empty = problem.launch.empty
    tau = empty((batch, heads, q_len), torch.float32)
    if not for_backward or regime(problem) == "single":
        return DenseState(tau)
    row_blocks = _blocks(q_len, map_rows(problem))
    key_blocks = _blocks(problem.key.shape[2], KEY_BLOCK)
    block_map = problem.launch.zeros((batch * heads, row_blocks, key_blocks), torch.uint8)
    return DenseState(tau, empty((batch, heads, q_len, value.shape[3]), query.dtype), block_map)


def largest_key_norms(problem: Problem) -> torch.Tensor:
    """(batch * kv_heads,) float32: the largest norm of a key, for ALiBi's reach."""
    key = problem.key
    batch, kv_heads, kv_len, head_dim = key.shape
    block = 128
    norms = problem.launch.empty((batch * kv_heads, _blocks(kv_len, block)), torch.float32)
    with on_device(key.device):
        problem.launch(
            key_norm_kernel, norms.numel(), rows_of(key), norms, kv_heads, kv_len, padded(head_dim), head_dim, block
        )
    return problem.launch.torch(_row_maxima, norms)


def _row_maxima(norms: torch.Tensor) -> torch.Tensor:
    return norms.amax(dim=1)


def _short_forward(problem: Problem, output: torch.Tensor, state: DenseState) -> None:
    rows = short_rows(problem)
    kv_len = problem.key.shape[2]
    width = padded(kv_len)
    problem.launch(
        short_forward_kernel,
        problem.groups * _blocks(problem.query.shape[2], rows),
        rows_of(problem.query),
        rows_of(problem.key),
        rows_of(problem.value),
        rows_of(output),
        None if state.mean_value is None else rows_of(state.mean_value),
        state.tau,
        state.block_map,
        problem.masks,
        problem.scoring,
        **problem.lengths,
        near_enough=5e-4 if problem.query.dtype == torch.float32 else 1e-2,
        BM=rows,
        W=width,
        W_SMALL=width // 2 if width >= 2 * rows else width,
        KB=KEY_BLOCK,
        MAP_BLOCKS=padded(_blocks(kv_len, KEY_BLOCK)),
        **problem.constants,
        P_SCALE=problem.weight_scale,
        num_warps=short_warps(problem),
        num_stages=1,
    )


def dense_forward(
    problem: Problem,
    output: torch.Tensor,
    state: DenseState,
    active: torch.Tensor | None = None,
    largest_key: torch.Tensor | None = None,
) -> None:
    """Writes output (batch, heads, q_len, value_dim) and the state.

    active: (batch * heads, blocks of dense_forward.ACTIVE_ROWS rows) uint8; blocks with 0 are left alone (another
    kernel writes their output and tau; their part of the block map stays 0). None: all rows.
    largest_key: what largest_key_norms returned, if it was called.
    """
    if regime(problem) != "dense":
        with on_device(problem.launch.device):
            _short_forward(problem, output, state)
        return
    tiles = forward_tiles(problem)
    near_enough, accepted = _tolerances(problem)
    if largest_key is None and problem.slopes is not None:
        largest_key = largest_key_norms(problem)
    with on_device(problem.launch.device):
        problem.launch(
            dense_forward_kernel,
            problem.groups * _blocks(problem.query.shape[2], tiles.rows),
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
            **problem.lengths,
            near_enough=near_enough,
            accepted=accepted,
            BM=tiles.rows,
            BN=tiles.keys,
            KB=KEY_BLOCK,
            ACTIVE_ROWS=ACTIVE_ROWS,
            # ALiBi's reach needs a sample's maxima
            SAMPLE=class_count(problem) if problem.key.shape[2] > UNSAMPLED_KEYS or problem.slopes is not None else 0,
            CLASSES=class_count(problem),
            **problem.constants,
            P_SCALE=problem.weight_scale,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            maxnreg=tiles.registers,
        )


def _single_backward(
    problem: Problem,
    state: DenseState,
    grad: torch.Tensor,
    query_grad: torch.Tensor,
    key_grad: torch.Tensor,
    value_grad: torch.Tensor,
) -> None:
    inputs = (rows_of(problem.query), rows_of(problem.key), rows_of(problem.value), rows_of(grad), state.tau)
    problem.launch(
        short_backward_kernel,
        problem.key.shape[0] * problem.key.shape[1],
        *inputs,
        rows_of(query_grad),
        rows_of(key_grad),
        rows_of(value_grad),
        problem.masks,
        problem.scoring,
        problem.scale,
        **problem.lengths,
        BM=single_rows(problem),
        W=padded(problem.key.shape[2]),
        **problem.constants,
        P_SCALE=problem.weight_scale,
        num_warps=single_backward_warps(problem),
        num_stages=1,
    )


def dense_backward(
    problem: Problem,
    state: DenseState,
    grad: torch.Tensor,
    query_grad: torch.Tensor,
    key_grad: torch.Tensor,
    value_grad: torch.Tensor,
    active: torch.Tensor | None = None,
) -> None:
    """Writes the three gradients from grad (batch, heads, q_len, value_dim), unit stride in the last dimension.

    active: as in dense_forward; key_grad and value_grad then hold those of the other rows, and are added to.
    """
    if regime(problem) == "single":
        with on_device(grad.device):
            _single_backward(problem, state, grad, query_grad, key_grad, value_grad)
        return
    assert state.mean_value is not None and state.block_map is not None
    batch, heads, q_len, _ = grad.shape
    kv_heads, kv_len = problem.key.shape[1:3]
    constants = problem.constants
    rho = problem.launch.empty(state.tau.shape, torch.float32)
    row_blocks, key_blocks = state.block_map.shape[1:]
    shared = (problem.masks, problem.scoring, problem.scale)
    inputs = (rows_of(problem.query), rows_of(problem.key), rows_of(problem.value), rows_of(grad), state.tau, rho)
    with on_device(grad.device):
        tiles = query_gradient_tiles(problem)
        programs = batch * heads * _blocks(q_len, tiles.rows)
        problem.launch(
            query_gradient_kernel,
            programs,
            *inputs,
            rows_of(state.mean_value),
            rows_of(query_grad),
            state.block_map,
            problem.launch.empty((programs, key_blocks), torch.int16),
            active,
            *shared,
            **problem.lengths,
            BM=tiles.rows,
            BN=tiles.keys,
            KB=KEY_BLOCK,
            MAP_ROWS=map_rows(problem),
            ACTIVE_ROWS=ACTIVE_ROWS,
            **constants,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        tiles = key_gradient_tiles(problem)
        programs = batch * kv_heads * _blocks(kv_len, tiles.keys)
        problem.launch(
            key_gradient_kernel,
            programs,
            *inputs,
            rows_of(key_grad),
            rows_of(value_grad),
            state.block_map,
            problem.launch.empty((programs, row_blocks), torch.int16),
            active,
            *shared,
            **problem.lengths,
            BM=tiles.rows,
            BN=tiles.keys,
            KB=KEY_BLOCK,
            MAP_ROWS=map_rows(problem),
            ACTIVE_ROWS=ACTIVE_ROWS,
            **constants,
            P_SCALE=problem.weight_scale,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
