"""A bound on the norms of a cache's keys, kept with the cache: what lets ALiBi heads leave out keys while decoding."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

__all__ = ["key_norm_bound"]

# On a cache's layer: (1, kv_heads) float32, the largest norm of any key that it has held.
_RECORD = "_asentmax_largest_key_norm"


def _largest_norm(key: torch.Tensor) -> torch.Tensor:
    """(1, kv_heads) float32 of key (batch, kv_heads, length, head_dim)."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    return torch.linalg.vector_norm(key, dim=-1, dtype=dtype).amax(dim=(0, 2))[None].float()


def key_norm_bound(cache: Any, layer_idx: int | None, key: torch.Tensor, q_len: int) -> torch.Tensor | None:
    """At least the norm of every key in `key`, from a record on the cache's layer; None where none can be kept.

    The record is made from all keys that the layer holds, and every later call adds its new keys. It is the largest
    norm over the batch and never falls, so beams may be reordered, and rows repeated, selected or cropped. Keys that
    are put into the cache by other means than a model's forward after the first call would not be seen.

    Args:
        cache: a transformers cache whose layer has just been updated, or None.
        layer_idx: which of its layers.
        key: (batch, kv_heads, kv_len, head_dim), what the update returned.
        q_len: the number of new keys.

    Returns:
        (1, kv_heads) float32; None with gradients enabled, and for caches other than plain dynamic and static ones:
        sliding ones are short, and quantised ones do not return the keys that they were given.
    """
    layers = getattr(cache, "layers", None)
    if layers is None or layer_idx is None or layer_idx >= len(layers):
        return None
    layer = layers[layer_idx]
    if type(layer) is not DynamicLayer and type(layer) is not StaticLayer:
        return None
    record = getattr(layer, _RECORD, None)
    if torch.is_grad_enabled():
        if record is not None:
            setattr(layer, _RECORD, None)  # this call's keys are not recorded, so it holds no longer
        return None
    if record is None:
        if torch.compiler.is_compiling() or layer.keys is not key:
            return None
        record = _largest_norm(key)
        if type(layer) is StaticLayer:
            torch._dynamo.mark_static_address(record)
        setattr(layer, _RECORD, record)
        return record
    if type(layer) is DynamicLayer:
        record = torch.maximum(record.to(key.device), _largest_norm(key[:, :, -q_len:]))
        setattr(layer, _RECORD, record)
        return record
    place = layer.cumulative_length - q_len + torch.arange(q_len, device=key.device)
    record.copy_(torch.maximum(record, _largest_norm(key.index_select(2, place))))  # compiled graphs know its address
    return record
