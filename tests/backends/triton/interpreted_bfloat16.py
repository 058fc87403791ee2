"""bfloat16 in Triton's interpreter (3.6), which keeps it in 16-bit integers and multiplies these."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

__all__ = ["mend"]

_PLAIN_CAST, _PLAIN_DOT = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
_PLAIN_BINARY = InterpreterBuilder.binary_op


def _widened(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16).float().numpy()


def _rounded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def _cast(self: Any, source: Any, target: Any) -> Any:
    """Rounds to nearest, as a GPU does; the interpreter cuts off."""
    kinds = source.dtype.scalar, target.scalar
    if kinds == (tl.bfloat16, tl.float32):
        return TensorHandle(_widened(source.data), tl.float32)
    if kinds == (tl.float32, tl.bfloat16):
        return TensorHandle(_rounded(source.data), tl.bfloat16)
    if tl.bfloat16 in kinds and kinds[0] != kinds[1]:
        raise NotImplementedError(f"the interpreter casts {kinds[0]} to {kinds[1]} wrongly")
    return _PLAIN_CAST(self, source, target)


def _dot(self: Any, a: Any, b: Any, sum: Any, *options: Any) -> Any:
    if a.dtype.scalar == tl.bfloat16:
        product = np.matmul(_widened(a.data), _widened(b.data), dtype=sum.data.dtype)
        return TensorHandle(product + sum.data, sum.dtype.scalar)
    return _PLAIN_DOT(self, a, b, sum, *options)


def _binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
    if left.dtype.scalar == tl.bfloat16:
        raise NotImplementedError("the interpreter does arithmetic on bfloat16's bits; cast to float32 before")
    return _PLAIN_BINARY(self, left, right, operation)


def mend() -> None:
    """Products and casts as on a GPU; arithmetic in bfloat16, which no kernel of ours has, is refused."""
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.binary_op = _binary
