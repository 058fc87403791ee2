"""The mask function that transformers calls once per forward, for every preset."""

from __future__ import annotations

from typing import Any

import torch
from transformers import masking_utils
from transformers.masking_utils import causal_mask_function, sdpa_mask

__all__ = ["asentmax_mask", "key_start_of"]


def asentmax_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """What hides keys beside causality: nothing, the padding alone, or a full mask.

    Causal attention over padded rows needs no more than the padding mask, and packed sequences and windows without
    padding, cache and torch.compile no more than the first key of each query: memory linear in the length. Everything
    else (static caches, windows with padding, masks of a model's own) becomes a boolean mask, as for ``sdpa``.

    Returns:
        None where every query sees all keys up to its own; (batch, kv_length) bool, true where the key is no padding,
        for queries that end with the last key; (batch or 1, 1, q_length, 1) int32, the first key that a causal query
        sees (`key_start_of`); else (batch, 1, q_length, kv_length) bool, true where visible.
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
    whole = isinstance(q_offset, int) and q_offset == kv_offset == 0 and 1 < q_length == kv_length
    if whole and mask_function is not causal_mask_function and not torch.compiler.is_compiling():
        padded = attention_mask is not None and not bool(attention_mask.all())
        first = None if padded else _first_keys(mask_function, q_length, kwargs.get("device"))
        if first is not None:
            return first[:, None, :, None].to(torch.int32)
    if (
        q_length == 1
        and mask_function is causal_mask_function
        and not allow_is_causal_skip
        and local_size is None
        and kv_offset == 0
        and kwargs.get("device") is not None
        and (not isinstance(q_offset, torch.Tensor) or q_offset.numel() == 1)
    ):
        return _one_query(batch_size, kv_length, q_offset, attention_mask, kwargs["device"])
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]  # a tensor with static caches
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def _one_query(
    batch_size: int,
    kv_length: int,
    position: int | torch.Tensor,
    attention_mask: torch.Tensor | None,
    device: torch.device | str,
) -> torch.Tensor:
    """sdpa_mask's result for a step of decoding with a static cache, in four launches instead of a dozen.

    `generate` makes this mask outside of what it compiles, and the GPU waits for it at every token.
    """
    seen = (torch.arange(kv_length, device=device) <= position)[None]
    if attention_mask is not None:
        filled = attention_mask[:, :kv_length].to(torch.bool)
        seen = seen & torch.nn.functional.pad(filled, (0, kv_length - filled.shape[1]))
    return seen.expand(batch_size, kv_length)[:, None, None]


def key_start_of(mask: torch.Tensor) -> torch.Tensor | None:
    """(batch or 1, q_len) int32 of a mask that `asentmax_mask` made of each query's first key; None of any other."""
    made_here = mask.ndim == 4 and mask.dtype == torch.int32 and mask.shape[2] > 1 and mask.shape[3] == 1
    return mask[:, 0, :, 0] if made_here else None


def _code_of(name: str, *arguments: Any) -> Any:
    """The code of what a mask factory of transformers returns; None in versions without it, or with another."""
    try:
        return getattr(masking_utils, name)(*arguments).__code__
    except (AttributeError, TypeError):  # its masks then stay square
        return None


_BOTH = _code_of("and_masks", causal_mask_function)
_WINDOW = _code_of("sliding_window_overlay", 1)
_PACKED = _code_of("packed_sequence_mask_function", torch.zeros(1, 1))
_REMAPPED = _code_of("remap_positions_for_packed_sequence", causal_mask_function, torch.zeros(1, 1))


def _first_keys(mask_function: Any, length: int, device: torch.device | str | None) -> torch.Tensor | None:
    """(batch or 1, length) first keys, if the function is causality with windows and packed sequences, else None."""
    causal, remapped = False, False
    windows: list[Any] = []
    packed: list[Any] = []
    pending = [mask_function]
    while pending:
        function = pending.pop()
        if function is causal_mask_function:
            causal = True
            continue
        code = getattr(function, "__code__", None)
        if code is None or not any(code is known for known in (_BOTH, _REMAPPED, _WINDOW, _PACKED)):
            return None
        values = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
        if code is _BOTH:
            pending.extend(values["mask_functions"])
        elif code is _REMAPPED:  # to positions within the sequences: differences stay, within one
            pending.append(values["mask_function"])
            remapped = True
        elif code is _WINDOW:
            windows.append(values["sliding_window"])
        else:
            packed.append(values["packed_sequence_mask"])
    if not causal or (remapped and not packed) or not all(isinstance(window, int) for window in windows):
        return None
    index = torch.arange(length, device=device)[None]
    first = torch.zeros_like(index)
    for window in windows:
        first = torch.maximum(first, index - (window - 1))
    for sequences in packed:
        steps = sequences.diff(dim=-1, prepend=sequences[:, :1])
        if sequences.shape[-1] != length or bool((steps < 0).any()):  # not numbered in order: not intervals
            return None
        first = torch.maximum(first, torch.where(steps != 0, index, 0).cummax(dim=-1).values)
    return first
