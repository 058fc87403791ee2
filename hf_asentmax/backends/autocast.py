"""Autocast for the backends that call operators which autocast does not know."""

from __future__ import annotations

import torch

__all__ = ["as_autocast"]


def as_autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in autocast's type if autocast is enabled for their device, else unchanged."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
