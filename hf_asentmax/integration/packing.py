"""Packed sequences: several documents in one row, separated by resets of ``position_ids`` or by ``cu_seq_lens``."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .families import PACKING_UNSUPPORTED

__all__ = ["packing_pre_hook"]


def _positions_from_boundaries(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """Positions (1, length) that restart at each boundary of cu_seqlens (sequences + 1,)."""
    index = torch.arange(length, device=cu_seqlens.device)
    boundaries = cu_seqlens.to(torch.int64)
    sequence = torch.bucketize(index, boundaries, right=True) - 1
    return (index - boundaries[sequence])[None]


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tokens or embeddings, (batch, length, ...), among the arguments of a model's forward."""
    candidates = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
    return next((tensor for tensor in candidates if isinstance(tensor, torch.Tensor)), None)


def packing_pre_hook(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Make transformers detect packed sequences, which it does only without a cache and without a mask.

    By default a forward builds a cache, and with a cache transformers ignores resets of ``position_ids``: a document
    would see the document before it. This hook therefore sets ``use_cache=False`` where positions restart.

    Under torch.compile transformers cannot inspect positions, and without a cache it makes a mask over all pairs of
    tokens, which takes memory square in the length and prevents the kernels from skipping blocks. Without positions
    nothing is packed, so this hook passes a padding mask of ones instead.

    Raises:
        ValueError: packed sequences are combined with a cache or a mask.
        NotImplementedError: the family's mask ignores positions.
    """
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    position_ids = kwargs.get("position_ids")
    masked, cached = kwargs.get("attention_mask") is not None, kwargs.get("past_key_values") is not None
    if cu_seqlens is None and position_ids is None:
        inputs = _inputs(args, kwargs)
        if not torch.compiler.is_compiling() or masked or cached or inputs is None or len(args) > 1:
            return None
        builds_cache = kwargs.get("use_cache")
        if builds_cache if builds_cache is not None else getattr(model.config, "use_cache", False):
            return None
        return args, {**kwargs, "attention_mask": inputs.new_ones(inputs.shape[:2], dtype=torch.bool)}
    if cu_seqlens is not None:
        if masked or cached:
            raise ValueError(
                "cu_seq_lens describes packed sequences without padding or cache; leave attention_mask and "
                "past_key_values out"
            )
        if position_ids is None:
            inputs = _inputs(args, kwargs)
            if inputs is None:
                raise ValueError("cu_seq_lens needs input_ids or inputs_embeds, got neither; pass one of them")
            position_ids = _positions_from_boundaries(cu_seqlens, inputs.shape[1]).to(inputs.device)
    if masked or cached or position_ids is None or position_ids.ndim != 2:
        return None
    if not torch.compiler.is_compiling() and not bool((position_ids.diff(dim=-1) != 1).any()):
        return None
    if model.config.model_type in PACKING_UNSUPPORTED:
        raise NotImplementedError(
            f"position_ids restart within a row, which means packed sequences, but {type(model).__name__} does not "
            "pass them to its mask: sequences would see each other. Pad them instead, or pass a 4D attention_mask"
        )
    if kwargs.get("use_cache"):
        raise ValueError(
            "position_ids restart within a row, which means packed sequences, and these cannot be cached; "
            "pass use_cache=False, or an attention_mask if this is padding"
        )
    return args, {**kwargs, "position_ids": position_ids, "use_cache": False}
