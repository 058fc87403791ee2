"""One attention call as the launches see it: tensors, options, and the kernels' arguments derived from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import triton.language as tl

from .device import Dims, KernelMasks, KernelScoring, Lengths, Rows
from .launching import Launcher
from .row_ranges import RowRanges

__all__ = ["Problem", "padded", "rows_of"]

# No call is as long as this; a position plus this still fits into 32 bits.
_LARGEST_WINDOW = 1 << 30


@dataclass(frozen=True)
class Problem:
    """One attention call of the kernels.

    Attributes:
        query: (batch, heads, q_len, head_dim), unit stride in the last dimension.
        key: (batch, kv_heads, kv_len, head_dim), likewise.
        value: (batch, kv_heads, kv_len, value_dim), likewise.
        alpha, scale, is_causal, sliding_window, softcap: as in `entmax_attention`.
        slopes: (heads,) float32, ALiBi's slopes, or None.
        ranges: padding, packing and the 4D mask.
        for_backward: whether a backward pass may follow.
        launcher: makes the tensors and launches the kernels; None for a plain one.
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
    for_backward: bool = True
    launcher: Launcher | None = None

    @cached_property
    def launch(self) -> Launcher:
        """The launcher."""
        return self.launcher or Launcher(self.query.device)

    @cached_property
    def width(self) -> int:
        """The larger of head_dim and value_dim, padded."""
        return padded(max(self.query.shape[3], self.value.shape[3]))

    @property
    def groups(self) -> int:
        """batch * heads."""
        return self.query.shape[0] * self.query.shape[1]

    def part(self, entries: slice, query_heads: slice, key_heads: slice) -> Problem:
        """The call for some batch entries and heads, as views; without the 4D mask."""
        start, stop, key_valid, has_holes, _ = (
            None if tensor is None else tensor[entries] if tensor.shape[0] > 1 else tensor for tensor in self.ranges
        )
        return replace(
            self,
            query=self.query[entries, query_heads],
            key=self.key[entries, key_heads],
            value=self.value[entries, key_heads],
            slopes=None if self.slopes is None else self.slopes[query_heads],
            ranges=RowRanges(start, stop, key_valid, has_holes, None),
        )

    @cached_property
    def lengths(self) -> Lengths:
        """Heads and lengths, as kernels take them."""
        return Lengths(self.query.shape[1], self.key.shape[1], self.query.shape[2], self.key.shape[2])

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Head dimensions and the precision of products, by the names of the kernels' compile-time arguments.

        A product of float32 factors is three products of their tf32 parts, which keep 21 bits of every factor. Exact
        products (ieee) go through registers, of which there are too few above head_dim 32.
        """
        head_dim, value_dim = self.query.shape[3], self.value.shape[3]
        return {
            "D": padded(head_dim),
            "HEAD_DIM": head_dim,
            "DV": padded(value_dim),
            "VALUE_DIM": value_dim,
            "PRECISION": "tf32x3" if self.query.dtype == torch.float32 else "tf32",
        }

    @cached_property
    def dims(self) -> Dims:
        """The head dimensions of `constants`, as one argument."""
        return Dims(*(tl.constexpr(self.constants[name]) for name in Dims._fields))

    @property
    def weight_scale(self) -> float:
        """What weights are multiplied by in products with values: a float16 weight of 1/32,768 would be subnormal."""
        return 32768.0 if self.query.dtype == torch.float16 else 1.0

    @cached_property
    def scoring(self) -> KernelScoring:
        """How the kernels make scores and weights."""
        factor = self.alpha - 1.0
        exponent = 1.0 / factor
        if abs(exponent - round(exponent)) < 1e-9 * exponent:  # a whole one needs no logarithm (device.support_powers)
            exponent = float(round(exponent))
        capped = self.softcap is not None
        return KernelScoring(
            scale=self.scale if capped else self.scale * factor,
            softcap=self.softcap,
            after_cap=factor if capped else None,
            slopes=self.slopes,
            slope_factor=factor if self.slopes is not None else None,
            exponent=tl.constexpr(exponent),
        )

    @cached_property
    def masks(self) -> KernelMasks:
        """Which keys a row sees, as kernels take it."""
        start, stop, key_valid, has_holes, dense = self.ranges
        strides: tuple[int, ...] = (0, 0, 0, 0)
        if dense is not None:
            strides = tuple(0 if size == 1 else step for size, step in zip(dense.shape, dense.stride(), strict=True))
        return KernelMasks(
            causal=tl.constexpr(self.is_causal),
            window=None if self.sliding_window is None else min(self.sliding_window, _LARGEST_WINDOW),
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


def padded(dim: int) -> int:
    """The power of two, at least 16, that holds a dimension."""
    return max(16, 1 << (dim - 1).bit_length())


def rows_of(tensor: torch.Tensor) -> Rows:
    """A (batch, heads, length, head_dim) tensor with unit stride in head_dim, as kernels take it."""
    return Rows(tensor, *tensor.stride()[:3])
