"""Launches of the short kernels, and which calls are theirs. Nothing here waits for the device."""

from __future__ import annotations

import torch
import triton.language as tl

from ..common.blocks import KEY_BLOCK, blocks_of
from ..common.launching import on_device
from ..common.problem import Problem, padded, rows_of
from ..common.state import Gradients, TileState
from .kernels import HeadSizes, ShortSizes, short_backward_kernel, short_forward_kernel

__all__ = ["MOST_HELD", "MOST_KEYS", "forward_rows", "holds_head", "is_short", "short_backward", "short_forward"]

# Keys up to which a row's scores stay in registers, for 16-bit inputs.
MOST_KEYS = 256
# Queries and keys up to which one program can hold a head, and do its whole backward pass.
MOST_HELD = 128
# The largest head_dim or value_dim, padded, for either.
_MOST_WIDTH = 64
# For float32, whose products need more registers, the limits of `holds_head` are these.
_MOST_HELD_EXACT = 64
_MOST_WIDTH_EXACT = 32
_FORWARD_WARPS = 4


def is_short(problem: Problem) -> bool:
    """Whether the short regime does the forward pass of a call."""
    return holds_head(problem) or (
        problem.key.shape[2] <= MOST_KEYS and problem.width <= _MOST_WIDTH and problem.query.dtype != torch.float32
    )


def holds_head(problem: Problem) -> bool:
    """Whether one program of the backward pass can hold a head. If not, the dense regime does the backward pass."""
    exact = problem.query.dtype == torch.float32
    most, width = (_MOST_HELD_EXACT, _MOST_WIDTH_EXACT) if exact else (MOST_HELD, _MOST_WIDTH)
    return problem.query.shape[2] <= most and problem.key.shape[2] <= most and problem.width <= width


def forward_rows(problem: Problem) -> int:
    """Query rows a program of the forward kernel. Comparisons only: a traced length stays dynamic."""
    q_len = problem.query.shape[2]
    return 64 if q_len > 32 else 32 if q_len > 16 else 16


def short_forward(problem: Problem, output: torch.Tensor, state: TileState) -> None:
    """Writes output (batch, heads, q_len, value_dim), unit stride in the last dimension, and the state."""
    rows = forward_rows(problem)
    kv_len = problem.key.shape[2]
    width = padded(kv_len)
    small = width // 2 if width >= 2 * rows else width
    sizes = (rows, width, small, KEY_BLOCK, padded(blocks_of(kv_len, KEY_BLOCK)))
    with on_device(problem.launch.device):
        problem.launch(
            short_forward_kernel,
            problem.groups * blocks_of(problem.query.shape[2], rows),
            rows_of(problem.query),
            rows_of(problem.key),
            rows_of(problem.value),
            rows_of(output),
            None if state.mean_value is None else rows_of(state.mean_value),
            state.tau,
            state.block_map,
            problem.masks,
            problem.scoring,
            problem.lengths,
            5e-4 if problem.query.dtype == torch.float32 else 1e-2,
            ShortSizes(*(tl.constexpr(size) for size in sizes)),
            problem.dims,
            PRECISION=problem.constants["PRECISION"],
            P_SCALE=problem.weight_scale,
            num_warps=_FORWARD_WARPS,
            num_stages=1,
        )


def short_backward(problem: Problem, state: TileState, gradients: Gradients) -> None:
    """Writes the gradients of query, key and value, where `holds_head`."""
    q_len, kv_len = problem.query.shape[2], problem.key.shape[2]
    sizes = HeadSizes(tl.constexpr(padded(q_len)), tl.constexpr(padded(kv_len)))
    with on_device(gradients.output.device):
        problem.launch(
            short_backward_kernel,
            problem.key.shape[0] * problem.key.shape[1],
            rows_of(problem.query),
            rows_of(problem.key),
            rows_of(problem.value),
            rows_of(gradients.output),
            state.tau,
            rows_of(gradients.query),
            rows_of(gradients.key),
            rows_of(gradients.value),
            problem.masks,
            problem.scoring,
            problem.scale,
            problem.lengths,
            sizes,
            problem.dims,
            PRECISION=problem.constants["PRECISION"],
            P_SCALE=problem.weight_scale,
            num_warps=8 if max(q_len, kv_len) > 64 else 4,
            num_stages=1,
        )
