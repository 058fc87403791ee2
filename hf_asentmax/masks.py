"""Which keys each query sees, as one boolean tensor: the plain definition that every backend follows."""

from __future__ import annotations

import torch

__all__ = ["alibi_positions", "mask_with_key_start", "query_positions", "visible_count", "visible_keys"]


def query_positions(q_len: int, kv_len: int, device: torch.device | str) -> torch.Tensor:
    """The index of each query among the keys: queries align to the end of the keys, as behind a cache.

    Returns:
        (q_len,) int64: i + kv_len - q_len.
    """
    return torch.arange(q_len, device=device) + (kv_len - q_len)


def visible_keys(
    position: torch.Tensor,
    kv_len: int,
    *,
    is_causal: bool,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    sliding_window: int | None,
) -> torch.Tensor | None:
    """The intersection of all the masks that were given.

    Causal: key j <= position. Sliding window w: |position - j| < w. Padding: the key is valid. Packed: query and key
    lie in the same sequence.

    Args:
        position: (rows,) int, the queries' indices among the keys, as `query_positions` gives them.
        attention_mask: (batch, kv_len) or (batch, 1 or heads, rows, kv_len), bool.
        cu_seqlens: (sequences + 1,) int, the sequences' boundaries in the keys, from 0 to kv_len.

    Returns:
        bool, broadcastable to (batch, heads, rows, kv_len); None where every query sees every key.
    """
    key = torch.arange(kv_len, device=position.device)
    parts: list[torch.Tensor] = []
    if is_causal:
        parts.append(key <= position[:, None])
    if sliding_window is not None:
        parts.append((position[:, None] - key).abs() < sliding_window)
    if cu_seqlens is not None:
        sequence = torch.bucketize(key, cu_seqlens.to(torch.int64), right=True)
        parts.append(sequence[position][:, None] == sequence)
    if attention_mask is not None:
        parts.append(attention_mask[:, None, None, :] if attention_mask.ndim == 2 else attention_mask)
    if not parts:
        return None
    visible = parts[0]
    for part in parts[1:]:
        visible = visible & part
    return visible.reshape((1,) * (4 - visible.ndim) + tuple(visible.shape))


def mask_with_key_start(
    attention_mask: torch.Tensor | None, key_start: torch.Tensor, batch: int, kv_len: int
) -> torch.Tensor:
    """Both in one bool (batch, 1 or heads, q_len, kv_len): a query sees no key before key_start (batch or 1, q_len)."""
    mask = torch.arange(kv_len, device=key_start.device) >= key_start[:, None, :, None]
    if attention_mask is not None:
        mask = mask & (attention_mask[:, None, None, :] if attention_mask.ndim == 2 else attention_mask)
    return mask.expand(batch, -1, -1, -1)


def visible_count(
    position: torch.Tensor,
    kv_len: int,
    *,
    is_causal: bool,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """How many keys each query sees: the row sums of `visible_keys`, in memory linear in the lengths.

    Returns:
        (batch or 1, heads or 1, rows) int64.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        visible = visible_keys(
            position,
            kv_len,
            is_causal=is_causal,
            attention_mask=attention_mask,
            cu_seqlens=None,
            sliding_window=sliding_window,
        )
        assert visible is not None
        return visible.sum(dim=-1)
    last = position if is_causal else torch.full_like(position, kv_len - 1)
    before = torch.full_like(position, -1)  # the last key before the first visible one
    if sliding_window is not None:
        last = torch.minimum(last, position + (sliding_window - 1))
        before = torch.maximum(before, position - sliding_window)
    if attention_mask is None:
        return (last.clamp_max(kv_len - 1) - before)[None, None]
    counted = torch.nn.functional.pad(attention_mask.to(torch.int64).cumsum(dim=-1), (1, 0))
    return (counted[:, last.clamp_max(kv_len - 1) + 1] - counted[:, before + 1])[:, None]


def alibi_positions(position: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Where ALiBi's distances of each row may be measured from, so that they stay small and float32 keeps them exact.

    If all keys that a row sees stand at or before its position, the bias -m (position - j) may be measured from the
    row's last visible key instead: that adds one constant to the row's scores, which softmax and entmax ignore. It
    matters for a static cache, whose unfilled slots lie between the last visible key and the end.

    Args:
        position: (q_len,) int, as `query_positions` gives it.
        visible: bool, broadcastable to (batch, heads, q_len, kv_len), or None.

    Returns:
        min(position, last visible key): (q_len,), or (batch or 1, heads or 1, q_len).
    """
    if visible is None:
        return position
    key = torch.arange(visible.shape[-1], device=visible.device)
    last = torch.where(visible, key, -1).amax(dim=-1)
    return torch.minimum(position, torch.where(last >= 0, last, position))
