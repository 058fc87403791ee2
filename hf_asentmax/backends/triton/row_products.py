"""The products of two tensors' rows as an operator. They are the gradients of a factor on each query's row.

torch.compile would otherwise generate this sum, and torch 2.11 generates it wrongly. Where it pads the strides of the
result (heads * length above 1,024 that 32 does not divide), it writes one layout and reads another, beyond the tensor's
end. https://github.com/pytorch/pytorch/issues/194281 is the same defect, which later releases mend. The gradients of
length scalings and of all layers below were at least 10^6 times too large, and different in each run. An operator's
result has the strides that it declares.
"""

from __future__ import annotations

import torch

from .common.launching import Launcher, run
from .support import unsupported_device_reason

__all__ = ["row_products"]

_library = torch.library.Library("hf_asentmax", "FRAGMENT")
_library.define("row_products(Tensor a, Tensor b) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _wide(a: torch.Tensor, b: torch.Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def _plain(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    wide = _wide(a, b)
    return (a.to(wide) * b.to(wide)).sum(dim=-1).contiguous()


def _on_gpu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if _wide(a, b) == torch.float64 or unsupported_device_reason(a.device) is not None:
        return _plain(a, b)
    from .operators import unit_stride
    from .row_products_kernel import launch

    rows = [unit_stride(tensor) for tensor in (a, b)]

    def body(launcher: Launcher) -> tuple[torch.Tensor]:
        return (launch(launcher, *rows),)

    (products,) = run("row_products", rows, (), body)
    return products


def _of_shapes(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(a.shape[:-1], dtype=_wide(a, b))


_library.impl("row_products", _plain, "CompositeExplicitAutograd")
_library.impl("row_products", _on_gpu, "CUDA")
torch.library.register_fake("hf_asentmax::row_products", _of_shapes, lib=_library)


def row_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sum_d a_d b_d over the last dimension, computed and returned in float32 (float64 if either is).

    Args:
        a, b: (batch, heads, length, head_dim), of any floating type and strides.

    Returns:
        (batch, heads, length), contiguous; no gradient flows through it.
    """
    return torch.ops.hf_asentmax.row_products.default(a, b)
