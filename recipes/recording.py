"""Records the queries, keys and values that the layers of a model pass to `entmax_attention`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from hf_asentmax import entmax_attention

__all__ = ["AttentionCall", "recorded_attention"]


class AttentionCall(NamedTuple):
    """The arguments of one call of `entmax_attention`.

    Queries carry their length scaling. Queries and keys carry their rotary positions, where the model has them.

    Attributes:
        query: (batch, heads, length, head_dim).
        key: (batch, kv_heads, kv_len, head_dim).
        value: like `key`.
        options: the call's keyword arguments.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: dict[str, Any]

    @property
    def slopes(self) -> torch.Tensor:
        """(heads,) ALiBi slopes. A head without ALiBi has slope 0."""
        slopes: torch.Tensor | None = self.options.get("alibi_slopes")
        return self.query.new_zeros(self.query.shape[1]) if slopes is None else slopes


@contextmanager
def recorded_attention() -> Iterator[list[AttentionCall]]:
    """Yields a list to which each layer's call is added while the context is open."""
    calls: list[AttentionCall] = []

    def recording(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(AttentionCall(query, key, value, options))
        return entmax_attention(query, key, value, **options)

    with patch("hf_asentmax.integration.forward.entmax_attention", recording):
        yield calls
