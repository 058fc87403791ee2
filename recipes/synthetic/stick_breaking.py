"""Stick-breaking attention (Tan et al. 2024, "Stick-breaking Attention"), a baseline, as an attention of transformers.

With b_ij = sigmoid(z_ij), query i gives key j < i the weight b_ij prod_{j < k < i} (1 - b_ik): going back from i, each
key breaks its share off the rest of a stick of length 1. The rest at the end goes to the query's own value. The order
of the keys is part of the definition, so no positions are needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

__all__ = ["NAME", "NoRotation", "stick_breaking_attention"]

NAME = "stick_breaking"
# Elements of the scores (batch x heads x rows x kv_len) in memory at a time, where no gradients are needed.
_SCORES_AT_ONCE = 1 << 26


def stick_breaking_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal stick-breaking attention in float32 (float64 for float64 inputs).

    Args:
        query: (batch, heads, q_len, head_dim); the last query is at the position of the last key.
        key, value: (batch, heads, kv_len, head_dim).
        scale: factor on q k^T.

    Returns:
        (batch, heads, q_len, head_dim), with the dtype of `query`.
    """
    batch, heads, q_len, _ = query.shape
    kv_len = key.shape[2]
    rows = q_len if torch.is_grad_enabled() else max(1, _SCORES_AT_ONCE // (batch * heads * kv_len))
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    working_key, working_value = key.to(dtype), value.to(dtype)
    parts = []
    for start in range(0, q_len, rows):
        part = query[:, :, start : start + rows].to(dtype)
        position = torch.arange(part.shape[2], device=query.device)[:, None] + (start + kv_len - q_len)
        before = torch.arange(kv_len, device=query.device) < position
        scores = (part @ working_key.transpose(-1, -2)) * scale
        passed = nn.functional.logsigmoid(-scores).masked_fill(~before, 0.0)
        # log of the rest of the stick before key j: the sum over the keys between j and the query
        left = passed.flip(-1).cumsum(dim=-1).flip(-1) - passed
        weights = (nn.functional.logsigmoid(scores) + left).exp().masked_fill(~before, 0.0)
        rest = 1.0 - weights.sum(dim=-1, keepdim=True)
        own = working_value[:, :, start + kv_len - q_len : start + kv_len - q_len + part.shape[2]]
        parts.append(weights @ working_value + rest * own)
    return torch.cat(parts, dim=2).to(query.dtype)


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Stick-breaking attention behind transformers' interface. The mask is causal, as prompts are not padded here."""
    del module, attention_mask, kwargs
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    with torch.autocast(query.device.type, enabled=False):
        output = stick_breaking_attention(query, key, value, scale)
    return output.transpose(1, 2).contiguous(), None


class NoRotation(nn.Module):
    """Replaces the rotary positions of a model: cos = 1 and sin = 0 rotate nothing."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each (batch, length, head_dim)."""
        shape = (*position_ids.shape, self.head_dim)
        return hidden_states.new_ones(shape), hidden_states.new_zeros(shape)


AttentionInterface.register(NAME, _attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
