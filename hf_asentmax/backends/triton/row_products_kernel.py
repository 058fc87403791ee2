"""The kernel of the operator in row_products.py, and its launch. Importing this needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common.device import load_rows
from .common.launching import Launcher, on_device
from .common.problem import padded, rows_of

__all__ = ["launch"]

_ROWS = 64


@triton.jit
def row_products_kernel(
    a, b, products, heads, length, ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """products_i = sum_d a_id b_id. Grid: batch * heads * ceil(length / ROWS); a program does ROWS rows of one head.

    Args:
        a, b: Rows, read.
        products: (batch * heads, length) float32, written.
    """
    blocks = tl.cdiv(length, ROWS)
    pid = tl.program_id(0)
    group = pid // blocks
    first = pid % blocks * ROWS
    batch = group // heads
    head = group % heads
    left = load_rows(a, batch, head, first, ROWS, length, True, D, HEAD_DIM).to(tl.float32)
    right = load_rows(b, batch, head, first, ROWS, length, True, D, HEAD_DIM).to(tl.float32)
    row = first + tl.arange(0, ROWS)
    tl.store(products + group.to(tl.int64) * length + row, tl.sum(left * right, 1), mask=row < length)


def launch(launcher: Launcher, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The products (batch, heads, length) float32 of a and b, which have unit stride in their last dimension."""
    batch, heads, length, head_dim = a.shape
    products = launcher.empty((batch, heads, length), torch.float32)
    programs = batch * heads * triton.cdiv(length, _ROWS)
    if programs:
        with on_device(a.device):
            launcher(
                row_products_kernel, programs, rows_of(a), rows_of(b), products, heads, length,
                ROWS=_ROWS, D=padded(head_dim), HEAD_DIM=head_dim, num_warps=4,
            )  # fmt: skip
    return products
