"""From tensors to kernel launches: tile sizes, strides, workspace. Nothing here waits for the device."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .dense_backward import key_gradient_kernel, mean_gradient_kernel, query_gradient_kernel
from .dense_forward import KEY_BLOCK, dense_forward_kernel, key_norm_kernel
from .device import Masks, Rows, Scoring
from .row_ranges import RowRanges

__all__ = ["DenseState", "Problem", "dense_backward", "dense_forward", "map_rows", "new_dense_state"]


class Tiles(NamedTuple):
    """Rows and keys a step, warps, and loads in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Problem:
    """One attention call: its tensors and options, and what the kernels derive from them.

    Attributes:
        query: (batch, heads, q_len, head_dim); key: (batch, kv_heads, kv_len, head_dim); value: (batch, kv_heads,
            kv_len, value_dim); each with unit stride in the last dimension.
        alpha, scale, is_causal, sliding_window, softcap: as in entmax_attention.
        slopes: (heads,) float32, or None.
        ranges: padding, packing and a free mask.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    alpha: float
    scale: float
    is_causal: bool
    sliding_window: int | None
    softcap: float | None
    slopes: torch.Tensor | None
    ranges: RowRanges

    @property
    def groups(self) -> int:
        """batch x heads"""
        return self.query.shape[0] * self.query.shape[1]

    @property
    def lengths(self) -> dict[str, int]:
        return {
            "heads": self.query.shape[1],
            "kv_heads": self.key.shape[1],
            "q_len": self.query.shape[2],
            "kv_len": self.key.shape[2],
        }

    @property
    def constants(self) -> dict[str, Any]:
        """Sizes and arithmetic that are compiled in.

        float32 products are exact (no tf32). float16 weights are scaled up by 2^15 in products with values: a weight
        of 1/32,768 would be subnormal.
        """
        head_dim, value_dim = self.query.shape[3], self.value.shape[3]
        return {
            "D": padded(head_dim),
            "HEAD_DIM": head_dim,
            "DV": padded(value_dim),
            "VALUE_DIM": value_dim,
            "PRECISION": "ieee" if self.query.dtype == torch.float32 else "tf32",
        }

    @property
    def weight_scale(self) -> float:
        return 32768.0 if self.query.dtype == torch.float16 else 1.0

    @property
    def scoring(self) -> Scoring:
        factor = self.alpha - 1.0
        exponent = 1.0 / factor
        capped = self.softcap is not None
        return Scoring(
            scale=self.scale if capped else self.scale * factor,
            softcap=self.softcap,
            after_cap=factor if capped else None,
            slopes=self.slopes,
            slope_factor=factor if self.slopes is not None else None,
            exponent=tl.constexpr(exponent),
        )

    @property
    def masks(self) -> Masks:
        start, stop, key_valid, has_holes, dense = self.ranges
        strides = (0, 0, 0, 0)
        if dense is not None:
            strides = tuple(0 if size == 1 else step for size, step in zip(dense.shape, dense.stride(), strict=True))
        return Masks(
            causal=tl.constexpr(self.is_causal),
            window=self.sliding_window,
            start=start,
            stop=stop,
            range_batch=0 if start is None or start.shape[0] == 1 else start.stride(0),
            key_valid=key_valid,
            has_holes=has_holes,
            dense=dense,
            dense_batch=strides[0],
            dense_head=strides[1],
            dense_row=strides[2],
            dense_key=strides[3],
        )


class DenseState(NamedTuple):
    """What the dense forward pass leaves for the backward pass.

    Attributes:
        tau: (batch, heads, q_len) float32 threshold of (alpha - 1) z; +inf for rows without a visible key.
        mean_value: (batch, heads, q_len, value_dim), sum_j s_j v_j / sum_j s_j with s = p^(2 - alpha).
        block_map: (batch * heads, row blocks, key blocks) uint8, see dense_forward.KEY_BLOCK.
    """

    tau: torch.Tensor
    mean_value: torch.Tensor
    block_map: torch.Tensor


def padded(dim: int) -> int:
    """The power of two, at least 16, that holds a head dimension."""
    return max(16, triton.next_power_of_2(dim))


def rows_of(tensor: torch.Tensor) -> Rows:
    return Rows(tensor, *tensor.stride()[:3])


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the tensor's GPU (a null context for the interpreter)."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def _width(problem: Problem) -> int:
    return max(padded(problem.query.shape[3]), padded(problem.value.shape[3]))


def map_rows(problem: Problem) -> int:
    """Query rows a block of the block map: the forward kernel's tile."""
    return _forward_tiles(problem).rows


def _forward_tiles(problem: Problem) -> Tiles:
    width = _width(problem)
    if problem.query.dtype == torch.float32:
        return Tiles(64, 32, 4, 1) if width <= 64 else Tiles(32, 32, 4, 1)
    if width <= 64:
        return Tiles(128, 64, 4, 3)
    if width <= 128:
        return Tiles(128, 64, 8, 3)
    return Tiles(64, 64, 8, 2)


def _query_gradient_tiles(problem: Problem) -> Tiles:
    width = _width(problem)
    if problem.query.dtype == torch.float32:
        return Tiles(32, 32, 4, 1)
    if width <= 64:
        return Tiles(128, 64, 8, 3)
    if width <= 128:
        return Tiles(128, 64, 8, 2)
    return Tiles(64, 32, 8, 2)


def _key_gradient_tiles(problem: Problem) -> Tiles:
    width = _width(problem)
    if problem.query.dtype == torch.float32:
        return Tiles(32, 32, 4, 1)
    if width <= 64:
        return Tiles(64, 128, 8, 2)
    if width <= 128:
        return Tiles(64, 128, 8, 2)
    return Tiles(32, 64, 8, 1)


def _tolerance(dtype: torch.dtype) -> float:
    """How far the norm may be from 1 before the last step in closed form, whose error is about its square."""
    return {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 3e-3}[dtype]


def new_dense_state(problem: Problem) -> DenseState:
    """Fresh state: an empty block map, and memory for the rest."""
    query, value = problem.query, problem.value
    batch, heads, q_len, _ = query.shape
    row_blocks = triton.cdiv(q_len, map_rows(problem))
    key_blocks = triton.cdiv(problem.key.shape[2], KEY_BLOCK)
    return DenseState(
        query.new_empty(batch, heads, q_len, dtype=torch.float32),
        query.new_empty(batch, heads, q_len, value.shape[3]),
        query.new_zeros(batch * heads, row_blocks, key_blocks, dtype=torch.uint8),
    )


def _largest_key_norms(problem: Problem) -> torch.Tensor:
    """(batch * kv_heads,) float32: the largest norm of a key, for ALiBi's reach."""
    key = problem.key
    batch, kv_heads, kv_len, head_dim = key.shape
    block = 128
    norms = key.new_empty(batch * kv_heads, triton.cdiv(kv_len, block), dtype=torch.float32)
    key_norm_kernel[(norms.numel(),)](rows_of(key), norms, kv_heads, kv_len, padded(head_dim), head_dim, block)
    return norms.amax(dim=1)


def dense_forward(
    problem: Problem, output: torch.Tensor, state: DenseState, active: torch.Tensor | None = None
) -> None:
    """Writes output (batch, heads, q_len, value_dim) and the state.

    active: (batch * heads, row blocks of map_rows rows) uint8; the rows of blocks with 0 are left alone (another
    kernel writes their output; their part of the block map stays 0). None: all rows.
    """
    tiles = _forward_tiles(problem)
    with on_device(problem.query):
        dense_forward_kernel[(state.block_map.shape[0] * state.block_map.shape[1],)](
            rows_of(problem.query),
            rows_of(problem.key),
            rows_of(problem.value),
            rows_of(output),
            rows_of(state.mean_value),
            state.tau,
            state.block_map,
            torch.empty_like(state.block_map, dtype=torch.int16),
            _largest_key_norms(problem) if problem.slopes is not None else None,
            active,
            problem.masks,
            problem.scoring,
            **problem.lengths,
            tolerance=_tolerance(problem.query.dtype),
            BM=tiles.rows,
            BN=tiles.keys,
            KB=KEY_BLOCK,
            SAMPLE=max(tiles.keys, 64),
            **problem.constants,
            P_SCALE=problem.weight_scale,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )


def dense_backward(
    problem: Problem,
    state: DenseState,
    grad: torch.Tensor,
    query_grad: torch.Tensor,
    key_grad: torch.Tensor,
    value_grad: torch.Tensor,
    active: torch.Tensor | None = None,
    partial: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Writes the three gradients from grad (batch, heads, q_len, value_dim), unit stride in the last dimension.

    active: as in dense_forward. partial: float32 dk and dv (shaped as key and value) of the rows that are not
    active, added here.
    """
    batch, heads, q_len, value_dim = grad.shape
    kv_heads, kv_len = problem.key.shape[1:3]
    constants = problem.constants
    rho = torch.empty_like(state.tau)
    row_blocks, key_blocks = state.block_map.shape[1:]
    shared = (problem.masks, problem.scoring, problem.scale)
    inputs = (rows_of(problem.query), rows_of(problem.key), rows_of(problem.value), rows_of(grad), state.tau, rho)
    with on_device(grad):
        rows = 64
        mean_gradient_kernel[(batch * heads * triton.cdiv(q_len, rows),)](
            rows_of(grad), rows_of(state.mean_value), rho, heads, q_len, rows, constants["DV"], value_dim
        )
        tiles = _query_gradient_tiles(problem)
        programs = batch * heads * triton.cdiv(q_len, tiles.rows)
        query_gradient_kernel[(programs,)](
            *inputs,
            rows_of(query_grad),
            state.block_map,
            grad.new_empty(programs, key_blocks, dtype=torch.int16),
            active,
            *shared,
            **problem.lengths,
            BM=tiles.rows,
            BN=tiles.keys,
            KB=KEY_BLOCK,
            MAP_ROWS=map_rows(problem),
            **constants,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        tiles = _key_gradient_tiles(problem)
        programs = batch * kv_heads * triton.cdiv(kv_len, tiles.keys)
        key_gradient_kernel[(programs,)](
            *inputs,
            rows_of(key_grad),
            rows_of(value_grad),
            rows_of(partial[0]) if partial is not None else None,
            rows_of(partial[1]) if partial is not None else None,
            state.block_map,
            grad.new_empty(programs, row_blocks, dtype=torch.int16),
            *shared,
            **problem.lengths,
            BM=tiles.rows,
            BN=tiles.keys,
            KB=KEY_BLOCK,
            MAP_ROWS=map_rows(problem),
            **constants,
            P_SCALE=problem.weight_scale,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
