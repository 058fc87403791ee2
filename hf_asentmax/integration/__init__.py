"""The only part that knows transformers: registration, masks, parameters and hooks, saving and loading."""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from ..config import PRESETS
from .forward import asentmax_attention_forward
from .masks import asentmax_mask
from .patches import apply_patches

__all__ = ["register"]


def register() -> None:
    """Register the presets with transformers. Calling it again is harmless."""
    for name in PRESETS:
        AttentionInterface.register(name, asentmax_attention_forward)
        # transformers passes no mask at all to a name without a mask function, and would ignore padding.
        AttentionMaskInterface.register(name, asentmax_mask)
    apply_patches()
