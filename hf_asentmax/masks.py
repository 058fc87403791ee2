"""The masks of a call, and the definition of which keys each query sees, which every backend follows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

__all__ = ["Masks", "alibi_positions", "query_positions", "visible_count", "visible_keys"]


@dataclass(frozen=True)
class Masks:
    """Which keys each query may see. A query sees a key if every given mask allows it.

    Attributes:
        is_causal: whether a query sees no key after its own position.
        attention_mask: bool, (batch, kv_len), true where the key is not padding; or
            (batch, 1 or heads, q_len, kv_len), true where the query sees the key.
        sliding_window: a query sees only keys at a distance below this number.
        cu_seqlens: (sequences + 1,) int32 or int64, the boundaries of sequences packed into one row of batch 1, from 0
            to kv_len. A query sees its own sequence only.
        key_start: (batch or 1, q_len) int32, the first key that each query may see.
    """

    is_causal: bool = True
    attention_mask: torch.Tensor | None = None
    sliding_window: int | None = None
    cu_seqlens: torch.Tensor | None = None
    key_start: torch.Tensor | None = None

    def rows(self, part: slice) -> Masks:
        """The masks for a slice of the query rows."""
        mask, start = self.attention_mask, self.key_start
        if mask is not None and mask.ndim == 4:
            mask = mask[:, :, part]
        return replace(self, attention_mask=mask, key_start=None if start is None else start[:, part])

    def with_key_start_in_mask(self, batch: int, kv_len: int) -> Masks:
        """The same masks with `key_start` as a 4D mask, for a backend without it; memory is square in the length."""
        if self.key_start is None:
            return self
        mask = torch.arange(kv_len, device=self.key_start.device) >= self.key_start[:, None, :, None]
        if self.attention_mask is not None:
            mask = mask & _four_dimensional(self.attention_mask)
        return replace(self, attention_mask=mask.expand(batch, -1, -1, -1), key_start=None)


def _four_dimensional(mask: torch.Tensor) -> torch.Tensor:
    """A padding mask as (batch, 1, 1, kv_len); a 4D mask as it is."""
    return mask[:, None, None, :] if mask.ndim == 2 else mask


def query_positions(q_len: int, kv_len: int, device: torch.device | str) -> torch.Tensor:
    """The index of each query among the keys. Queries align to the end of the keys, as they do with a cache.

    Returns:
        (q_len,) int64: i + kv_len - q_len.
    """
    return torch.arange(q_len, device=device) + (kv_len - q_len)


def visible_keys(position: torch.Tensor, kv_len: int, masks: Masks) -> torch.Tensor | None:
    """The intersection of all given masks.

    Key j is visible if it satisfies each of these. Causal: j <= position. Sliding window w: |position - j| < w.
    Packed: query and key belong to the same sequence. First key: j >= key_start. Attention mask: its entry is true.

    Args:
        position: (rows,) int, the queries' indices among the keys, from `query_positions`.
        kv_len: the number of keys.
        masks: the masks of these rows.

    Returns:
        bool, broadcastable to (batch, heads, rows, kv_len); None where every query sees every key.
    """
    key = torch.arange(kv_len, device=position.device)
    parts: list[torch.Tensor] = []
    if masks.is_causal:
        parts.append(key <= position[:, None])
    if masks.sliding_window is not None:
        parts.append((position[:, None] - key).abs() < masks.sliding_window)
    if masks.cu_seqlens is not None:
        sequence = torch.bucketize(key, masks.cu_seqlens.to(torch.int64), right=True)
        parts.append(sequence[position][:, None] == sequence)
    if masks.key_start is not None:
        parts.append(key >= masks.key_start[:, None, :, None])
    if masks.attention_mask is not None:
        parts.append(_four_dimensional(masks.attention_mask))
    if not parts:
        return None
    visible = parts[0]
    for part in parts[1:]:
        visible = visible & part
    return visible.reshape((1,) * (4 - visible.ndim) + tuple(visible.shape))


def visible_count(position: torch.Tensor, kv_len: int, masks: Masks) -> torch.Tensor:
    """How many keys each query sees: the row sums of `visible_keys`, in memory linear in the lengths.

    Args:
        position, kv_len, masks: as for `visible_keys`. `masks` has no `cu_seqlens`, and a `key_start` is combined
            with causality only.

    Returns:
        (batch or 1, heads or 1, rows) int64.
    """
    if masks.attention_mask is not None and masks.attention_mask.ndim == 4:
        visible = visible_keys(position, kv_len, masks)
        assert visible is not None
        return visible.sum(dim=-1)
    last = position if masks.is_causal else torch.full_like(position, kv_len - 1)
    before = torch.full_like(position, -1)  # the key before the first visible key
    if masks.sliding_window is not None:
        last = torch.minimum(last, position + (masks.sliding_window - 1))
        before = torch.maximum(before, position - masks.sliding_window)
    last = last.clamp_max(kv_len - 1)
    if masks.key_start is not None:
        return (last - masks.key_start + 1).clamp_min(0)[:, None]
    if masks.attention_mask is None:
        return (last - before)[None, None]
    counted = torch.nn.functional.pad(masks.attention_mask.to(torch.int64).cumsum(dim=-1), (1, 0))
    return (counted[:, last + 1] - counted[:, before + 1])[:, None]


def alibi_positions(position: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """The position that each row's ALiBi distances are measured from, chosen so that float32 represents them exactly.

    If a row sees no key after its position, its bias -m (position - j) can be measured from the row's last visible key
    instead. That adds one constant to the row's scores, which softmax and entmax ignore. It matters for a static cache,
    whose unfilled slots lie between the last visible key and the end.

    Args:
        position: (q_len,) int, from `query_positions`.
        visible: bool, broadcastable to (batch, heads, q_len, kv_len), or None.

    Returns:
        min(position, last visible key): (q_len,), or (batch or 1, heads or 1, q_len).
    """
    if visible is None:
        return position
    key = torch.arange(visible.shape[-1], device=visible.device)
    last = torch.where(visible, key, -1).amax(dim=-1)
    return torch.minimum(position, torch.where(last >= 0, last, position))
