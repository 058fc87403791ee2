"""GPU kernels (placeholder until the dense kernels land: the dense engineer replaces this file)."""

from __future__ import annotations

from typing import Any

import torch


def unsupported_reason(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> str | None:
    return "the kernels are not built yet; use backend='eager'"


def entmax_attention_triton(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    raise NotImplementedError
