"""The way into the kernels. Importing this needs no Triton; calling `attention` does."""

from __future__ import annotations

import torch

from ...call import Call
from .support import unsupported_reason

__all__ = ["attention", "unsupported_reason"]


def attention(call: Call) -> torch.Tensor:
    """Alpha-entmax attention by the kernels, where `unsupported_reason` gave None.

    Args:
        call: a checked call.

    Returns:
        (batch, heads, q_len, value_dim), of query's type (of autocast's type under autocast); differentiable in query,
        key and value.
    """
    from . import operators
    from .decode import operator as decode_operator

    if decode_operator.decodes(call):
        return decode_operator.decode_attention(call)
    return operators.attention(call)
