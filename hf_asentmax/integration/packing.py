"""Packed sequences: several documents in one row, told apart by resets of ``position_ids`` or by ``cu_seq_lens``."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .families import PACKING_NOT_SEEN

__all__ = ["packing_pre_hook"]


def _positions_from_boundaries(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """(1, length) positions that restart at each boundary of cu_seqlens (sequences + 1,)."""
    index = torch.arange(length, device=cu_seqlens.device)
    boundaries = cu_seqlens.to(torch.int64)
    sequence = torch.bucketize(index, boundaries, right=True) - 1
    return (index - boundaries[sequence])[None]


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Tokens or embeddings, (batch, length, ...)."""
    candidates = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
    return next((tensor for tensor in candidates if isinstance(tensor, torch.Tensor)), None)


def packing_pre_hook(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Let transformers see packed sequences, which it looks for only where no cache and no mask is given.

    A forward builds a cache by default, and with a cache transformers reads resets of ``position_ids`` as nothing
    special: a document would then see the one before it. So the cache is left out where positions restart.

    Under torch.compile it can't look, and without a cache it makes a mask over all pairs of tokens (the memory square
    in the length, and no short cuts in the kernels). Where no positions are given nothing is packed: a padding mask
    without padding says so.

    Raises:
        ValueError: packed sequences together with a cache or a mask.
        NotImplementedError: a family whose mask does not look at positions.
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
                raise ValueError("expected input_ids or inputs_embeds beside cu_seq_lens")
            position_ids = _positions_from_boundaries(cu_seqlens, inputs.shape[1]).to(inputs.device)
    if masked or cached or position_ids is None or position_ids.ndim != 2:
        return None
    if not torch.compiler.is_compiling() and not bool((position_ids.diff(dim=-1) != 1).any()):
        return None
    if model.config.model_type in PACKING_NOT_SEEN:
        raise NotImplementedError(
            f"position_ids restart within a row, which means packed sequences, but {type(model).__name__} does not "
            "hand them to its mask: sequences would see each other. Pad them instead, or pass a 4D attention_mask"
        )
    if kwargs.get("use_cache"):
        raise ValueError(
            "position_ids restart within a row, which means packed sequences, and those can't be cached; "
            "pass use_cache=False, or an attention_mask if this is padding"
        )
    return args, {**kwargs, "position_ids": position_ids, "use_cache": False}
