"""The product of queries and the factors of a length scaling."""

from __future__ import annotations

from typing import Any

import torch

from ..backends.triton.row_products import row_products

__all__ = ["scaled_query"]


def scaled_query(query: torch.Tensor, factor: torch.Tensor, num_unscaled_heads: int = 0) -> torch.Tensor:
    """Multiply each query by its factor. Scores are linear in the query, so this scales the scores.

    Args:
        query: (batch, heads, q_len, head_dim).
        factor: (batch or 1, heads - num_unscaled_heads, q_len), the factors of the heads after the unscaled ones.
        num_unscaled_heads: the number of leading heads that keep their scores.

    Returns:
        (batch, heads, q_len, head_dim), in query's type, rounded once.
    """
    if num_unscaled_heads > 0:
        ones = factor.new_ones((factor.shape[0], num_unscaled_heads, factor.shape[2]))
        factor = torch.cat([ones, factor], dim=1)
    if torch.compiler.is_compiling() and torch.is_grad_enabled() and factor.requires_grad:
        return torch.ops.hf_asentmax.scale_rows.default(query, factor)
    return _scaled(query, factor)


def _scaled(query: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (query * factor[..., None]).to(query.dtype)


class _ScaledRows(torch.autograd.Function):
    """`_scaled` for compiled training: `row_products` sums the gradient of the factors."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(query, factor)
        return _scaled(query, factor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        query, factor = ctx.saved_tensors
        of_factor = row_products(grad, query)
        if factor.shape[0] < query.shape[0]:  # one factor for the whole batch
            of_factor = of_factor.sum(dim=0, keepdim=True)
        return _scaled(grad, factor), of_factor.to(factor.dtype)


# It is an operator because torch.compile does not trace into one. Its autograd formula is traced like any other.
_library = torch.library.Library("hf_asentmax", "FRAGMENT")
_library.define("scale_rows(Tensor query, Tensor factor) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("scale_rows", _scaled, "CompositeExplicitAutograd")
_library.impl("scale_rows", _ScaledRows.apply, "Autograd")
torch.library.register_fake("hf_asentmax::scale_rows", _scaled, lib=_library)
