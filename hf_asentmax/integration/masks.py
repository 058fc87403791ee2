"""The mask function that transformers calls once per forward, for every preset."""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

__all__ = ["asentmax_mask"]


def asentmax_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """What hides keys beside causality: nothing, the padding alone, or a full mask.

    Causal attention over padded rows needs no more than the padding mask, whose memory is linear in the length.
    Everything else (windows, packed sequences, static caches, masks of a model's own) becomes a boolean mask, as for
    ``sdpa``.

    Returns:
        None where every query sees all keys up to its own; (batch, kv_length) bool, true where the key is no padding,
        for queries that end with the last key; else (batch, 1, q_length, kv_length) bool, true where visible.
    """
    ends_with_the_last_key = (
        isinstance(q_offset, int) and kv_offset == 0 and q_offset + q_length == kv_length and q_length > 1
    )
    if (
        attention_mask is not None
        and mask_function is causal_mask_function
        and allow_is_causal_skip
        and local_size is None
        and ends_with_the_last_key
        and tuple(attention_mask.shape) == (batch_size, kv_length)
    ):
        without_padding = not torch.compiler.is_compiling() and bool(attention_mask.all())
        return None if without_padding and q_length == kv_length else attention_mask
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )
