"""Attention in plain PyTorch for any mapping, device and floating type: the definition that the kernels must match."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..call import Call
from ..mappings import entmax
from ..masks import alibi_positions, query_positions, visible_keys

__all__ = ["attention"]

# Without gradients only this many scores (batch x heads x rows x kv_len) are in memory at once.
_SCORES_AT_ONCE = 1 << 27


def attention(call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""mapping(softcap(scale q k^T) - slope |i - j|) v, in float32 (float64 for float64 inputs).

    Args:
        call: any call.

    Returns:
        The output (batch, heads, q_len, value_dim) in query's type, and the weights (batch, heads, q_len, kv_len) in
        float32 (float64 for float64 inputs) if the call asks for them, else None.
    """
    dtype = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    q_len, kv_len = call.query.shape[2], call.key.shape[2]
    positions = query_positions(q_len, kv_len, call.query.device)
    # An enclosing autocast would round the scores to half precision.
    with torch.autocast(call.query.device.type, enabled=False):
        working = replace(call, query=call.query.to(dtype), key=call.key.to(dtype), value=call.value.to(dtype))
        rows = _rows_at_once(call)
        parts = [
            _some_rows(working, slice(start, start + rows), positions[start : start + rows])
            for start in range(0, max(1, q_len), rows)
        ]
    output = parts[0][0] if len(parts) == 1 else torch.cat([part for part, _ in parts], dim=2)
    return output.to(call.query.dtype), parts[0][1] if call.return_weights else None


def _rows_at_once(call: Call) -> int:
    """The number of query rows that are computed together."""
    batch, heads, q_len, _ = call.query.shape
    rows = max(1, _SCORES_AT_ONCE // max(1, batch * heads * call.key.shape[2]))
    all_at_once = call.needs_gradient or torch.compiler.is_compiling() or call.return_weights or rows >= q_len
    return max(1, q_len) if all_at_once else rows


def _some_rows(call: Call, rows: slice, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and weights of a slice of the query rows, whose indices among the keys are `position`, (rows,)."""
    masks, scoring = call.masks, call.scoring
    query, key, value = call.query[:, :, rows], call.key, call.value
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    visible = visible_keys(position, kv_len, masks.rows(rows))

    grouped = query.reshape(batch, kv_heads, (heads // kv_heads) * q_len, head_dim)
    scores = (torch.matmul(grouped, key.transpose(-1, -2)) * call.scale).reshape(batch, heads, q_len, kv_len)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if scoring.alibi_slopes is not None:
        sees_own_key = masks.attention_mask is None and masks.key_start is None
        anchor = position if sees_own_key else alibi_positions(position, visible)
        distance = (anchor[..., None] - torch.arange(kv_len, device=key.device)).abs()
        scores = scores - scoring.alibi_slopes.to(scores.dtype)[:, None, None] * distance.to(scores.dtype)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = scoring.mapping(scores) if scoring.mapping is not None else entmax(scores, scoring.alpha)
    if call.dropout > 0.0:
        weights = torch.nn.functional.dropout(weights, p=call.dropout)
    grouped_weights = weights.reshape(batch, kv_heads, (heads // kv_heads) * q_len, kv_len)
    return torch.matmul(grouped_weights, value).reshape(batch, heads, q_len, value.shape[-1]), weights
