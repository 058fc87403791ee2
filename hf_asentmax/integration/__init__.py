"""The only part that knows transformers: registration, masks, parameters and hooks on models, saving and loading."""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from ..config import PRESETS
from .forward import asentmax_attention_forward
from .masks import asentmax_mask
from .patches import apply_patches

__all__ = ["register"]


def register() -> None:
    """Make the presets known to transformers. Safe to call again."""
    for name in PRESETS:
        AttentionInterface.register(name, asentmax_attention_forward)
        # Without a mask function a name gets no mask at all, and padding would be ignored
        AttentionMaskInterface.register(name, asentmax_mask)
    apply_patches()
