"""What autocast means for tensors that go to an operator of our own or to PyTorch's fused attention."""

from __future__ import annotations

import torch

__all__ = ["as_autocast"]


def as_autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in autocast's type, where autocast is on for their device."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
