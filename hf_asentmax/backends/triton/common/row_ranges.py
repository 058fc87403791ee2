"""Which keys a query row may see, in the form that the kernels read: an interval a row, and flags for the rest.

Causality and a sliding window follow from a row's position, so the kernels compute them in registers
(`device.visible_interval`). Padding and packing need tensors. They are made here on the device, and the host does not
wait for them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ....masks import Masks

__all__ = ["RowRanges", "row_ranges"]


class RowRanges(NamedTuple):
    """Row i of batch entry b sees the keys start[b, i] <= j < stop[b, i] that key_valid and dense_mask show.

    Causality and the sliding window, which are not in here, may hide more.

    Attributes:
        start, stop: (batch or 1, q_len) int32, or both None where neither padding nor packing limits a row.
            Padding narrows them to the span from the first to the last valid key.
        key_valid: (batch, kv_len) uint8, 1 for keys that are no padding; None without a padding mask.
        has_holes: (batch,) int32, 1 where invalid keys lie between valid ones, so that key_valid must be read;
            None without a padding mask. (Left or right padding alone is covered by start and stop.)
        dense_mask: (batch, 1 or heads, q_len, kv_len) uint8, 1 where the query sees the key; None without a 4D mask.
    """

    start: torch.Tensor | None
    stop: torch.Tensor | None
    key_valid: torch.Tensor | None
    has_holes: torch.Tensor | None
    dense_mask: torch.Tensor | None


def row_ranges(q_len: int, kv_len: int, masks: Masks) -> RowRanges:
    """Padding, packing and the 4D mask of a call, as intervals and flags.

    Args:
        q_len, kv_len: lengths; query i stands at key i + kv_len - q_len.
        masks: the call's masks, attention_mask bool.

    Returns:
        The ranges. All their tensors are on the masks' device, and the host reads no value.
    """
    attention_mask, cu_seqlens, key_start = masks.attention_mask, masks.cu_seqlens, masks.key_start
    start = stop = key_valid = has_holes = dense_mask = None
    if attention_mask is not None and attention_mask.ndim == 4:
        dense_mask = attention_mask
    elif attention_mask is not None:
        key_valid = attention_mask.contiguous()
        index = torch.arange(kv_len, device=attention_mask.device, dtype=torch.int32)
        first = torch.where(attention_mask, index, kv_len).amin(dim=1, keepdim=True)
        after_last = torch.where(attention_mask, index + 1, 0).amax(dim=1, keepdim=True)
        has_holes = ((after_last - first) > attention_mask.sum(dim=1, keepdim=True)).to(torch.int32).reshape(-1)
        start, stop = first.expand(-1, q_len), after_last.expand(-1, q_len)
    if cu_seqlens is not None:
        position = torch.arange(kv_len - q_len, kv_len, device=cu_seqlens.device)
        boundary = cu_seqlens.to(torch.int64)
        sequence = torch.bucketize(position, boundary, right=True)
        last = boundary.shape[0] - 1
        packed_start = boundary[(sequence - 1).clamp(0, last)].to(torch.int32)[None]
        packed_stop = boundary[sequence.clamp(0, last)].to(torch.int32)[None]
        start = packed_start if start is None else torch.maximum(start, packed_start)
        stop = packed_stop if stop is None else torch.minimum(stop, packed_stop)
    if key_start is not None:
        key_start = key_start.clamp(0, kv_len)
        start = key_start if start is None else torch.maximum(start, key_start)
        stop = torch.full_like(start, kv_len) if stop is None else stop
    if start is not None and stop is not None:
        start, stop = start.contiguous(), stop.contiguous()
    return RowRanges(start, stop, key_valid, has_holes, dense_mask)
