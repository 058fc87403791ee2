"""What the forward pass over tiles leaves for its backward pass, and the gradients' tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Gradients", "TileState"]


class TileState(NamedTuple):
    """What the dense or short forward pass leaves for the backward pass.

    Attributes:
        tau: (batch, heads, q_len) float32 threshold of (alpha - 1) z; +inf for rows without a visible key.
        mean_value: (batch, heads, q_len, value_dim), sum_j s_j v_j / sum_j s_j with s = p^(2 - alpha).
        block_map: (batch * heads, row tiles, key blocks) uint8, see blocks.KEY_BLOCK.
            mean_value and block_map are None where the backward pass recomputes them (short.launch.holds_head) and
            where no backward pass follows.
    """

    tau: torch.Tensor
    mean_value: torch.Tensor | None = None
    block_map: torch.Tensor | None = None


class Gradients(NamedTuple):
    """The gradient that comes in, and those that go out.

    Attributes:
        output: (batch, heads, q_len, value_dim), unit stride in the last dimension.
        query, key, value: laid out as query, key and value; written.
    """

    output: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
