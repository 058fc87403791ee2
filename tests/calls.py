"""Builds a Call from the keyword arguments of `entmax_attention`, for tests of the backends."""

from __future__ import annotations

from typing import Any

import torch

from hf_asentmax.call import Call, Scoring
from hf_asentmax.masks import Masks

MASKS = ("is_causal", "attention_mask", "sliding_window", "cu_seqlens", "key_start")


def masks_of(**options: Any) -> Masks:
    """The Masks of these keyword arguments of `entmax_attention`; other arguments are ignored."""
    return Masks(**{name: value for name, value in options.items() if name in MASKS})


def call_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Call:
    """The call that `entmax_attention` would make."""
    scoring = Scoring(**{name: value for name, value in options.items() if name not in MASKS})
    return Call.checked(query, key, value, masks_of(**options), scoring)


def triton_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """The Triton kernels, without checking whether they can run on this machine."""
    from hf_asentmax.backends.triton import entry

    return entry.attention(call_of(query, key, value, **options))


def fused_softmax(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """PyTorch's fused softmax attention, without checking whether it can run on this machine."""
    from hf_asentmax.backends import torch_fused

    return torch_fused.attention(call_of(query, key, value, alpha=1.0, **options))
