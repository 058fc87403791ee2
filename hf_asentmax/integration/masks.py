"""The mask function that transformers calls once per forward for every preset."""

from __future__ import annotations

from typing import Any

import torch
from transformers import masking_utils
from transformers.masking_utils import causal_mask_function, sdpa_mask

__all__ = ["asentmax_mask", "first_keys", "key_start_of"]


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
    """The smallest mask that describes which keys are hidden in addition to causality.

    Causal attention over padded rows needs only the padding mask. Packed sequences and windows need only the first
    key of each query, if there is no padding, cache or torch.compile. Both take memory linear in the length.
    Everything else (static caches, windows with padding, a model's own masks) becomes a boolean mask, as for ``sdpa``.

    Returns:
        One of four forms. None: every query sees all keys up to its own. (batch, kv_length) bool, true where the key
        is not padding: causal queries that end with the last key. (batch or 1, 1, q_length, 1) int32, the first
        key that each causal query sees (`key_start_of`). (batch, 1, q_length, kv_length) bool, true where visible.
    """
    plain_causal = mask_function is causal_mask_function and local_size is None and kv_offset == 0
    ends_with_the_last_key = isinstance(q_offset, int) and q_offset + q_length == kv_length and q_length > 1
    padding_only = attention_mask is not None and tuple(attention_mask.shape) == (batch_size, kv_length)
    if plain_causal and allow_is_causal_skip and ends_with_the_last_key and padding_only:
        assert attention_mask is not None
        without_padding = not torch.compiler.is_compiling() and bool(attention_mask.all())
        return None if without_padding and q_length == kv_length else attention_mask
    whole = isinstance(q_offset, int) and q_offset == kv_offset == 0 and 1 < q_length == kv_length
    if whole and mask_function is not causal_mask_function and not torch.compiler.is_compiling():
        padded = attention_mask is not None and not bool(attention_mask.all())
        first = None if padded else first_keys(mask_function, q_length, kwargs.get("device"))
        if first is not None:
            return first[:, None, :, None].to(torch.int32)
    one_position = not isinstance(q_offset, torch.Tensor) or q_offset.numel() == 1
    if (
        q_length == 1
        and plain_causal
        and not allow_is_causal_skip
        and one_position
        and kwargs.get("device") is not None
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
    """The result of sdpa_mask for one decoding step with a static cache, in four launches instead of a dozen.

    `generate` makes this mask outside the compiled graph, and the GPU waits for it at every token.
    """
    seen = (torch.arange(kv_length, device=device) <= position)[None]
    if attention_mask is not None:
        filled = attention_mask[:, :kv_length].to(torch.bool)
        seen = seen & torch.nn.functional.pad(filled, (0, kv_length - filled.shape[1]))
    return seen.expand(batch_size, kv_length)[:, None, None]


def key_start_of(mask: torch.Tensor) -> torch.Tensor | None:
    """The first keys, (batch or 1, q_len) int32, if `asentmax_mask` made this mask of them; None for other masks."""
    made_here = mask.ndim == 4 and mask.dtype == torch.int32 and mask.shape[2] > 1 and mask.shape[3] == 1
    return mask[:, 0, :, 0] if made_here else None


def _code_of(name: str, *arguments: Any) -> Any:
    """The code object of the function that a mask factory of transformers returns; None in versions without it."""
    try:
        return getattr(masking_utils, name)(*arguments).__code__
    except (AttributeError, TypeError):  # masks of this kind then stay square
        return None


_BOTH = _code_of("and_masks", causal_mask_function)
_WINDOW = _code_of("sliding_window_overlay", 1)
_PACKED = _code_of("packed_sequence_mask_function", torch.zeros(1, 1))
_REMAPPED = _code_of("remap_positions_for_packed_sequence", causal_mask_function, torch.zeros(1, 1))


def first_keys(mask_function: Any, length: int, device: torch.device | str | None) -> torch.Tensor | None:
    """The first key of each query, (batch or 1, length) int64.

    None if the mask function is not an intersection of causality, windows and packed sequences.
    """
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
        elif code is _REMAPPED:  # positions within each sequence: distances inside a sequence do not change
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
        if sequences.shape[-1] != length or bool((steps < 0).any()):  # the sequences are not intervals
            return None
        first = torch.maximum(first, torch.where(steps != 0, index, 0).cummax(dim=-1).values)
    return first
