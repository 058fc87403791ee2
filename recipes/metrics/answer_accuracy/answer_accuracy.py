"""The share of right answers, as a metric of the `evaluate` library."""

from __future__ import annotations

import datasets
import evaluate

_DESCRIPTION = "The share of predictions that equal their reference."
_INPUTS = """
Args:
    predictions: answers as integers (token ids).
    references: the right answers.
Returns:
    accuracy, between 0 and 1, and answers, how many there are.
"""


class AnswerAccuracy(evaluate.Metric):
    """See the module's description."""

    def _info(self) -> evaluate.MetricInfo:
        answer = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": answer, "references": answer}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        right = sum(answer == truth for answer, truth in zip(predictions, references, strict=True))
        return {"accuracy": right / len(references), "answers": len(references)}
