"""How model families add their own positions, and how to switch these positions off.

One rule covers most families: an attention whose ``forward`` takes ``position_embeddings`` is rotary, and it does not
rotate with (cos, sin) = (1, 0). The tables below hold the exceptions. A family outside the rule and the tables is
refused.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

__all__ = ["NoPositionEmbedding", "rotary_argument", "turn_off_positions", "without_rotation"]

# model_type -> the attribute with learned absolute positions, on the model that holds the layers
LEARNED_POSITIONS = {"gpt2": "wpe", "gpt_bigcode": "wpe", "opt": "embed_positions"}
# model_types without positions of their own
NO_POSITIONS = frozenset({"bamba", "jamba", "kimi_linear", "nemotron_h", "zamba"})

# model_types that do not pass position_ids to their mask, so that packed sequences would see each other
PACKING_UNSUPPORTED = frozenset({"biogpt", "opt"})


class NoPositionEmbedding(nn.Module):
    """Replaces a learned position embedding and adds zero at every position."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A zero-dimensional zero, which keeps the shape and type of the tensor that it is added to."""
        given = (argument for argument in (*args, *kwargs.values()) if isinstance(argument, torch.Tensor))
        return torch.zeros((), device=next(given).device)


def rotary_argument(attention: nn.Module) -> int | None:
    """The index of ``position_embeddings``, (cos, sin), among the arguments of an attention's ``forward``, or None."""
    names = list(inspect.signature(attention.forward).parameters)
    return names.index("position_embeddings") if "position_embeddings" in names else None


def without_rotation(
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
    """Rotary positions that do not rotate: (cos, sin) = (1, 0), or the complex factor 1.

    Raises:
        NotImplementedError: position_embeddings has another form.
    """
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
    """Switch off positions that a model adds outside its attention.

    Rotary positions are switched off where the attention receives them (`without_rotation`).

    Raises:
        NotImplementedError: it is unknown where this model adds its positions.
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
        "Use positions='model', or a family with known rotary or learned positions (Llama, GPT-2, ...)"
    )
