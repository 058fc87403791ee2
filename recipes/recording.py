"""Records the queries, keys and values that the layers of a model pass to their attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from hf_asentmax.attention import attend
from hf_asentmax.call import Call

__all__ = ["AttentionCall", "recorded_attention"]


class AttentionCall(NamedTuple):
    """What one layer passed to its attention.

    Queries carry their length scaling. Queries and keys carry their rotary positions, where the model has them.

    Attributes:
        query: (batch, heads, length, head_dim).
        key: (batch, kv_heads, kv_len, head_dim).
        value: like `key`.
        options: `scale`, `alpha` and `alibi_slopes` of the call.
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

    def recording(call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
        options = {"scale": call.scale, "alpha": call.scoring.alpha, "alibi_slopes": call.scoring.alibi_slopes}
        calls.append(AttentionCall(call.query, call.key, call.value, options))
        return attend(call)

    with patch("hf_asentmax.integration.forward.attend", recording):
        yield calls
