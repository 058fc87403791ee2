"""What the plugin's models hand to their attention: every recipe that looks at queries and keys reads it here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from hf_asentmax import entmax_attention

__all__ = ["AttentionCall", "recorded_attention"]


class AttentionCall(NamedTuple):
    """One call of `entmax_attention`: queries carry their length scaling and, like keys, their rotary positions."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: dict[str, Any]

    @property
    def slopes(self) -> torch.Tensor:
        """(heads,) ALiBi slopes, 0 for a head without."""
        slopes: torch.Tensor | None = self.options.get("alibi_slopes")
        return self.query.new_zeros(self.query.shape[1]) if slopes is None else slopes


@contextmanager
def recorded_attention() -> Iterator[list[AttentionCall]]:
    """The calls that models make while the context is open, one a layer and forward pass."""
    calls: list[AttentionCall] = []

    def recording(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(AttentionCall(query, key, value, options))
        return entmax_attention(query, key, value, **options)

    with patch("hf_asentmax.integration.forward.entmax_attention", recording):
        yield calls
