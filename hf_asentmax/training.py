"""Optimizer groups for models with length scalings."""

from __future__ import annotations

from typing import Any

from torch import nn

from .scaling import LengthScaling

__all__ = ["parameter_groups"]


def parameter_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Two groups for an optimizer: matrices with weight decay; length scalings, biases and norms without.

    Decay pulls beta and gamma to the start they were given, which is no prior anybody wants. ``Trainer`` leaves the
    length scalings undecayed by itself.

    Args:
        model: any model; only parameters that require gradients are listed, shared ones once.
        weight_decay: of the first group.

    Returns:
        Dicts with "params" and "weight_decay", for ``torch.optim.AdamW(parameter_groups(model, 0.1), lr=...)``.

    Raises:
        ValueError: a negative weight decay.
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
