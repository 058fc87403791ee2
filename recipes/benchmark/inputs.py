"""Random inputs of the attention benchmarks.

random         queries, keys and values are independent normal numbers: about 25 keys of 32,768 have a weight
sharp          queries are 8 times as large: about 2 keys have a weight
topical        runs of 256 keys share a direction, and each query looks for one of these directions
nape           random; half of the heads have ALiBi with slopes 1/h, the others have no positions
alibi          random; all heads have ALiBi with slopes 1/h
near-uniform   queries are 20 times smaller, as at initialization: thousands of keys have a weight
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

__all__ = ["RUN", "alibi_slopes", "training_inputs"]

RUN = 256  # neighboring keys that share a direction in topical inputs


def training_inputs(
    kind: str, batch: int, heads: int, length: int, head_dim: int, device: str = "cuda"
) -> list[torch.Tensor]:
    """[query, key, value, gradient of the output], each (batch, heads, length, head_dim) bfloat16."""
    torch.manual_seed(0)
    query, key, value, grad = (torch.randn(batch, heads, length, head_dim, device=device) for _ in range(4))
    if kind == "sharp":
        query = query * 8
    elif kind == "near-uniform":
        query = query * 0.05
    elif kind == "topical":
        count = max(length // RUN, 1)
        topics = F.normalize(torch.randn(batch, heads, count, head_dim, device=device), dim=-1) * math.sqrt(head_dim)
        topic = (torch.arange(length, device=device) // RUN).clamp_max(count - 1)
        key = 0.5 * key + topics[:, :, topic]
        sought = (torch.rand(length, device=device) * (topic + 1)).long()
        query = (0.5 * query + topics[:, :, sought]) * 2
    return [tensor.bfloat16() for tensor in (query, key, value, grad)]


def alibi_slopes(kind: str, heads: int, device: str = "cuda") -> torch.Tensor | None:
    """(heads,) ALiBi slopes 1/h for `alibi`; for `nape` on the first half of the heads, and 0 on the others."""
    if kind == "alibi":
        return 1.0 / torch.arange(1, heads + 1, device=device)
    if kind == "nape":
        slopes = 1.0 / torch.arange(1, heads // 2 + 1, device=device)
        return torch.cat([slopes, torch.zeros(heads - heads // 2, device=device)])
    return None
