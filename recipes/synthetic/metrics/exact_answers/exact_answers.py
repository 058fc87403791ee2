"""Exact answers as a metric of the `evaluate` library. It is loaded from this folder, so no network is needed.

metric = evaluate.load("recipes/synthetic/metrics/exact_answers")
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from recipes.synthetic.measuring import wilson_interval

_DESCRIPTION = """\
The share of answers that are right in every token, with Wilson's 95% interval, and the share of right tokens.
A prediction that is longer or shorter than its reference is wrong, and its missing tokens count as wrong.
"""

_INPUTS = """
Args:
    predictions: lists of token ids, one for each sample.
    references: the right lists.
Returns:
    exact_match, interval (its lower and upper end), token_accuracy, samples.
"""


class ExactAnswers(evaluate.Metric):
    """See the module's description."""

    def _info(self) -> evaluate.MetricInfo:
        tokens = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": tokens, "references": tokens}),
        )

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict[str, Any]:
        pairs = list(zip(predictions, references, strict=True))
        exact = sum(prediction == reference for prediction, reference in pairs)
        right = sum(a == b for prediction, reference in pairs for a, b in zip(prediction, reference, strict=False))
        return {
            "exact_match": exact / len(pairs),
            "interval": wilson_interval(exact, len(pairs)),
            "token_accuracy": right / sum(len(reference) for reference in references),
            "samples": len(pairs),
        }
