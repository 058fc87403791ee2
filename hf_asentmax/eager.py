"""Attention in plain PyTorch, for any mapping, device and floating type: the definition that the kernels must meet."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .masks import alibi_positions, query_positions, visible_keys

__all__ = ["eager_attention"]

# Without gradients the scores need not all exist at once: (batch x heads x rows x kv_len) elements at a time.
_SCORES_AT_ONCE = 1 << 27


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mapping: Callable[[torch.Tensor], torch.Tensor],
    scale: float,
    visible: torch.Tensor | None,
    anchor: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    softcap: float | None,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and weights of some rows; `anchor` is where ALiBi's distances are measured from."""
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, (heads // kv_heads) * q_len, head_dim)
    scores = (torch.matmul(grouped, key.transpose(-1, -2)) * scale).reshape(batch, heads, q_len, kv_len)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        distance = (anchor[..., None] - torch.arange(kv_len, device=key.device)).abs()
        scores = scores - alibi_slopes.to(scores.dtype)[:, None, None] * distance.to(scores.dtype)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = mapping(scores)
    if dropout > 0.0:
        weights = torch.nn.functional.dropout(weights, p=dropout)
    grouped_weights = weights.reshape(batch, kv_heads, (heads // kv_heads) * q_len, kv_len)
    return torch.matmul(grouped_weights, value).reshape(batch, heads, q_len, value.shape[-1]), weights


def eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mapping: Callable[[torch.Tensor], torch.Tensor],
    scale: float,
    is_causal: bool,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    sliding_window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""mapping(softcap(scale q k^T) - slope |i - j|) v, in float32 (float64 for float64 inputs).

    The arguments are entmax_attention's, already checked, but for these:

    Args:
        mapping: scores (..., kv_len), -inf where the key is not visible -> probabilities of the same shape.
        dropout: probability of dropping a weight (the caller passes 0 outside of training).
        return_weights: also return the probabilities.

    Returns:
        The output (batch, heads, q_len, value_dim) in query's type, and the probabilities
        (batch, heads, q_len, kv_len) or None.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, q_len, _ = query.shape
    kv_len = key.shape[2]
    rows = max(1, _SCORES_AT_ONCE // max(1, batch * heads * kv_len))
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if needs_grad or torch.compiler.is_compiling() or return_weights or rows >= q_len:
        rows = max(1, q_len)
    positions = query_positions(q_len, kv_len, query.device)
    # An enclosing autocast would round the scores to half precision
    with torch.autocast(query.device.type, enabled=False):
        working_query, working_key, working_value = (tensor.to(dtype) for tensor in (query, key, value))
        parts, weights = [], None
        for start in range(0, max(1, q_len), rows):
            part = slice(start, start + rows)
            position, mask = positions[part], attention_mask
            if mask is not None and mask.ndim == 4:
                mask = mask[:, :, part]
            visible = visible_keys(
                position,
                kv_len,
                is_causal=is_causal,
                attention_mask=mask,
                cu_seqlens=cu_seqlens,
                sliding_window=sliding_window,
            )
            anchor = position if alibi_slopes is None or mask is None else alibi_positions(position, visible)
            output, weights = _attend(
                working_query[:, :, part],
                working_key,
                working_value,
                mapping,
                scale,
                visible,
                anchor,
                alibi_slopes,
                softcap,
                dropout,
            )
            parts.append(output)
        output = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return output.to(query.dtype), weights if return_weights else None
