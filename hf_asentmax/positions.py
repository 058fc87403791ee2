"""ALiBi's slopes for the positions NAPE (NoPE + ALiBi) and ALiBi."""

from __future__ import annotations

import torch

__all__ = ["alibi_slopes"]


def alibi_slopes(
    num_heads: int, num_alibi_heads: int, kind: str, device: torch.device | str | None = None
) -> torch.Tensor:
    """ALiBi's slope of each head. The first `num_alibi_heads` heads have ALiBi, the others have slope 0.

    The slopes are computed on the device, because a copy from the host would prevent CUDA graphs.

    Args:
        num_heads: the number of all heads.
        num_alibi_heads: the number of heads with ALiBi, from 0 to num_heads.
        kind: "harmonic" (1/h) or "geometric" (1/2^(h-1)) for head h = 1, 2, ...; "linear" and "exp" in the authors'
            code.
        device: the device of the result.

    Returns:
        (num_heads,) float32.

    Raises:
        ValueError: num_alibi_heads is out of range, or kind is unknown.
    """
    if not 0 <= num_alibi_heads <= num_heads:
        raise ValueError(f"num_alibi_heads must lie between 0 and the {num_heads} heads, got {num_alibi_heads}")
    head = torch.arange(1, num_heads + 1, device=device, dtype=torch.float32)
    if kind == "harmonic":
        slopes = 1.0 / head
    elif kind == "geometric":
        slopes = torch.exp2(1.0 - head)
    else:
        raise ValueError(f"kind must be 'harmonic' or 'geometric', got {kind!r}")
    return torch.where(head <= num_alibi_heads, slopes, torch.zeros_like(slopes))
