"""Helpers for training loops: groups of parameters for the optimizer, and changing alpha."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from .config import ASEntmaxConfig
from .integration.install import installed_attentions
from .integration.names import SETTINGS_ATTRIBUTE
from .scaling.modules import LengthScaling

__all__ = ["parameter_groups", "set_alpha"]


def parameter_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Two groups of parameters for an optimizer: matrices with weight decay, and all others without.

    The second group holds length scalings, biases and norms. Weight decay would pull the projections of beta and gamma
    towards zero, where they started. ``Trainer`` already leaves length scalings undecayed.

    Args:
        model: any model. Only parameters that require gradients are listed; shared ones are listed once.
        weight_decay: the weight decay of the first group.

    Returns:
        Two dicts with "params" and "weight_decay", for ``torch.optim.AdamW(parameter_groups(model, 0.1), lr=...)``.

    Raises:
        ValueError: weight_decay is negative or NaN.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay!r}")
    of_scalings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, LengthScaling)
        for parameter in module.parameters()
    }
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter.ndim >= 2 and id(parameter) not in of_scalings].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def set_alpha(model: nn.Module, alpha: float) -> None:
    """Change the alpha of every attention of a model, for example to anneal it from 1 (softmax) to 1.5 in training.

    The model's config changes too, so that a checkpoint is restored with the alpha that it was saved with. A compiled
    model and the kernels are compiled again for each alpha, so anneal in a few steps.

    Args:
        model: a model with an attention of hf_asentmax (any preset whose mapping is alpha-entmax).
        alpha: from 1 to 2.

    Raises:
        TypeError, ValueError: the model has no attention of hf_asentmax, alpha is out of range, or alpha contradicts
            the other flags (top-k and adaptive temperature need alpha = 1).
    """
    attentions = [attention for _, attention in installed_attentions(model)]
    if not attentions:
        raise ValueError(
            f"{type(model).__name__} has no attention of hf_asentmax; build it with attn_implementation='asentmax'"
        )
    changed = []
    for attention in attentions:
        settings = getattr(attention, SETTINGS_ATTRIBUTE)
        given = {name: value for name, value in settings.flags.to_dict().items() if value is not None}
        changed.append(dataclasses.replace(settings, flags=ASEntmaxConfig(**{**given, "alpha": alpha})))
    for attention, settings in zip(attentions, changed, strict=True):
        setattr(attention, SETTINGS_ATTRIBUTE, settings)
        attention.config.asentmax = settings.flags  # type: ignore[union-attr]
