"""Perplexity from the losses of single tokens, as a metric of the `evaluate` library."""

from __future__ import annotations

import math

import datasets
import evaluate

_DESCRIPTION = "Perplexity, exp(mean of -log p(token | tokens before it)), with p the model's probability."
_INPUTS = """
Args:
    losses: -log p of each token, in nats.
Returns:
    perplexity, and tokens, how many there are.
"""


class TokenPerplexity(evaluate.Metric):
    """See the module's description."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"losses": datasets.Value("float64")}),
        )

    def _compute(self, losses: list[float]) -> dict[str, float]:
        return {"perplexity": math.exp(math.fsum(losses) / len(losses)), "tokens": len(losses)}
