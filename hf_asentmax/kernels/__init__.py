"""alpha-entmax attention as Triton kernels. Importing this needs no Triton; calling it does."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

__all__ = [
    "entmax_attention_triton",
    "unsupported_device_reason",
    "unsupported_reason",
    "unsupported_tensors_reason",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_HEAD_DIM = 256
_LONGEST = 128 * 32767  # key blocks are listed as int16
_SMALLEST_ALPHA = 1.05  # below, r^(1/(alpha-1)) magnifies float32's rounding


def unsupported_reason(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    alpha: float,
    attention_mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> str | None:
    """Why the kernels cannot run this call, and what to do about it; None if they can.

    The arguments are entmax_attention's, already checked.
    """
    del attention_mask, cu_seqlens, sliding_window, softcap  # all supported
    of_the_device = unsupported_device_reason(query.device)
    if of_the_device is not None:
        return of_the_device
    of_the_tensors = unsupported_tensors_reason("the kernels", query, alibi_slopes)
    if of_the_tensors is not None:
        return of_the_tensors
    if alpha < _SMALLEST_ALPHA:
        instead = "use backend='torch' for softmax" if alpha == 1.0 else "use backend='eager'"
        return f"the kernels need alpha from {_SMALLEST_ALPHA} to 2, got {alpha}; {instead}"
    largest = max(query.shape[-1], value.shape[-1])
    if largest > _LARGEST_HEAD_DIM:
        return f"the kernels take head dimensions up to {_LARGEST_HEAD_DIM}, got {largest}; use backend='eager'"
    if key.shape[2] > _LONGEST:
        return f"the kernels take up to {_LONGEST} keys, got {key.shape[2]}; use backend='eager'"
    return None


def unsupported_tensors_reason(kernels: str, query: torch.Tensor, alibi_slopes: torch.Tensor | None) -> str | None:
    """Why no fused kernels, those named `kernels` among them, take the tensors of a call; None if they do."""
    if query.dtype not in _DTYPES:
        return f"{kernels} compute in float32, bfloat16 or float16, got {query.dtype}; use backend='eager'"
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        return f"{kernels} take ALiBi's slopes as constants; detach them, or use backend='eager', which learns them"
    return None


@torch.compiler.assume_constant_result  # torch.compile (2.11) would break its graph at each of these questions
def unsupported_device_reason(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on this device, and what to do about it; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install it (pip install triton), or use backend='eager'"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"the kernels need a CUDA GPU, the tensors are on {device.type}; use backend='eager' there"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need a GPU of compute capability 8.0 (Ampere) or later; use backend='eager'"
    return None


def entmax_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    alpha: float,
    scale: float,
    is_causal: bool,
    attention_mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    sliding_window: int | None = None,
    key_start: torch.Tensor | None = None,
    softcap: float | None = None,
    key_norm_bound: torch.Tensor | None = None,
) -> torch.Tensor:
    """entmax_attention by the kernels, differentiable in query, key and value.

    The arguments are entmax_attention's, already checked, and unsupported_reason returned None for them.

    Returns:
        (batch, heads, q_len, value_dim), of query's type (of autocast's type under autocast).
    """
    from .decode_op import decode_attention, decodes
    from .op import attention

    options: dict[str, Any] = {
        "alpha": alpha,
        "scale": scale,
        "is_causal": is_causal,
        "attention_mask": attention_mask,
        "alibi_slopes": alibi_slopes,
        "sliding_window": sliding_window,
        "softcap": softcap,
    }
    if decodes(query, key, value, cu_seqlens, key_start):
        return decode_attention(query, key, value, key_norm_bound=key_norm_bound, **options)
    return attention(query, key, value, cu_seqlens=cu_seqlens, key_start=key_start, **options)
