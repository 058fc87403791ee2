"""An upper bound on the norms of a cache's keys, kept with the cache. It lets ALiBi heads skip keys in decoding."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

__all__ = ["key_norm_bound"]

# The attribute of a cache's layer with the largest norm of all keys that it has held, (1, kv_heads) float32.
_RECORD = "_asentmax_largest_key_norm"


def _largest_norm(key: torch.Tensor) -> torch.Tensor:
    """The largest norm in each head of key (batch, kv_heads, length, head_dim): (1, kv_heads) float32."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    return torch.linalg.vector_norm(key, dim=-1, dtype=dtype).amax(dim=(0, 2))[None].float()


def key_norm_bound(cache: Any, layer_idx: int | None, key: torch.Tensor, q_len: int) -> torch.Tensor | None:
    """An upper bound on the norms of the keys in `key`, from a record on the cache's layer.

    The first call makes the record from all keys of the layer, and each later call adds its new keys. The record is
    the largest norm over the batch and never decreases, so beams may be reordered, and rows may be repeated, selected
    or cropped. Keys must reach the cache through a model's forward after the first call; others are not counted.

    Args:
        cache: a transformers cache whose layer has just been updated, or None.
        layer_idx: the index of the layer in the cache.
        key: (batch, kv_heads, kv_len, head_dim), the keys that the update returned.
        q_len: the number of new keys.

    Returns:
        (1, kv_heads) float32. None if gradients are enabled, or if the cache is not a plain dynamic or static one:
        sliding caches are short, and quantized caches do not return the keys that they were given.
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
            setattr(layer, _RECORD, None)  # this call's keys are not recorded, so the record becomes invalid
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
    record.copy_(
        torch.maximum(record, _largest_norm(key.index_select(2, place)))
    )  # in place: compiled graphs hold its address
    return record
