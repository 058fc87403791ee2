"""What differs between model families: where their own positions come in, and how to switch them off.

One rule serves most of them: an attention whose ``forward`` takes ``position_embeddings`` is rotary, and (cos, sin) =
(1, 0) is no rotation. The tables below hold the rest; a family that neither the rule nor a table covers is refused.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

__all__ = ["NoPositionEmbedding", "rotary_argument", "turn_off_positions", "without_rotation"]

# model_type -> attribute of the model (the one that holds the layers) with learned absolute position embeddings
LEARNED_POSITIONS = {"gpt2": "wpe", "gpt_bigcode": "wpe", "opt": "embed_positions"}
# model_types that have no positions of their own
NO_POSITIONS = frozenset({"bamba", "jamba", "kimi_linear", "nemotron_h", "zamba"})

# model_types that do not hand position_ids to their mask, so that packed sequences would see each other
PACKING_NOT_SEEN = frozenset({"biogpt", "opt"})


class NoPositionEmbedding(nn.Module):
    """Stands where a learned position embedding was: adds nothing, at any position."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A zero without dimensions, which leaves shape and type of what it is added to alone."""
        given = (argument for argument in (*args, *kwargs.values()) if isinstance(argument, torch.Tensor))
        return torch.zeros((), device=next(given).device)


def rotary_argument(attention: nn.Module) -> int | None:
    """Where (cos, sin) reach this attention's ``forward``: the place of ``position_embeddings``, or None."""
    names = list(inspect.signature(attention.forward).parameters)
    return names.index("position_embeddings") if "position_embeddings" in names else None


def without_rotation(
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
    """(cos, sin) = (1, 0), or the complex factor 1: rotary positions that do not rotate."""
    if isinstance(position_embeddings, torch.Tensor) and position_embeddings.is_complex():
        return torch.ones_like(position_embeddings)
    if isinstance(position_embeddings, tuple) and len(position_embeddings) == 2:
        cos, sin = position_embeddings
        return torch.ones_like(cos), torch.zeros_like(sin)
    raise NotImplementedError(
        "expected rotary position_embeddings as (cos, sin) or one complex tensor, got "
        f"{type(position_embeddings).__name__}; use positions='model' with this model"
    )


def turn_off_positions(model: PreTrainedModel, attentions: list[nn.Module], positions: str) -> None:
    """Switch off positions that a model adds outside of its attention, and refuse those that can't be.

    Rotary positions are switched off where the attention receives them (`without_rotation`).

    Raises:
        NotImplementedError: nobody knows where this model's positions come in.
    """
    model_type = model.config.model_type
    name = LEARNED_POSITIONS.get(model_type)
    if name is not None:
        setattr(model, name, NoPositionEmbedding())
        ignored = set(model._keys_to_ignore_on_load_unexpected or [])
        model._keys_to_ignore_on_load_unexpected = ignored | {rf"(^|\.){name}\.weight$"}
        return
    if model_type in NO_POSITIONS or all(rotary_argument(attention) is not None for attention in attentions):
        return
    raise NotImplementedError(
        f"positions={positions!r} switches a model's own positions off, and hf_asentmax does not know where "
        f"{type(model).__name__} (model_type {model_type!r}) adds them: its attention takes no position_embeddings. "
        "Use positions='model', or a family with rotary or learned positions that is known (Llama, GPT-2, ...)"
    )
