"""Which calls the kernels can run, and why not the others. Importing this needs no Triton."""

from __future__ import annotations

import importlib.util
import os

import torch

from ...call import Call

__all__ = [
    "unsupported_call_reason",
    "unsupported_device_reason",
    "unsupported_reason",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_HEAD_DIM = 256
_LONGEST = 128 * 32767  # key blocks are listed as int16
_SMALLEST_ALPHA = 1.05  # below, r^(1/(alpha-1)) magnifies float32's rounding


def unsupported_reason(call: Call) -> str | None:
    """Why the kernels cannot run this call, and what to do about it; None if they can."""
    of_the_call = unsupported_call_reason("the kernels", call)
    if of_the_call is not None:
        return of_the_call
    of_the_device = unsupported_device_reason(call.query.device)
    if of_the_device is not None:
        return of_the_device
    alpha = call.scoring.alpha
    if alpha < _SMALLEST_ALPHA:
        instead = "use backend='torch' for softmax" if alpha == 1.0 else "use backend='eager'"
        return f"the kernels need alpha from {_SMALLEST_ALPHA} to 2, got {alpha}; {instead}"
    largest = max(call.query.shape[-1], call.value.shape[-1])
    if largest > _LARGEST_HEAD_DIM:
        return f"the kernels take head dimensions up to {_LARGEST_HEAD_DIM}, got {largest}; use backend='eager'"
    if call.key.shape[2] > _LONGEST:
        return f"the kernels take up to {_LONGEST} keys, got {call.key.shape[2]}; use backend='eager'"
    return None


def unsupported_call_reason(kernels: str, call: Call) -> str | None:
    """Why no fused kernels, those named `kernels` among them, can run this call; None if they may."""
    if call.scoring.mapping is not None:
        return f"{kernels} have alpha-entmax alone; top-k softmax and adaptive temperature need all scores at once"
    if call.dropout > 0.0:
        return f"{kernels} have no dropout on weights"
    if call.return_weights:
        return f"{kernels} return no weights"
    if call.query.dtype not in _DTYPES:
        return f"{kernels} compute in float32, bfloat16 or float16, got {call.query.dtype}; use backend='eager'"
    slopes = call.scoring.alibi_slopes
    if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
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
