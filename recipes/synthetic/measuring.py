"""Exact match under greedy decoding, from one teacher-forced forward pass.

Greedy decoding gives the right answer exactly when every answer token is the most likely one after the right tokens
before it: up to the first wrong token, both see the same inputs. So one pass over prompt and answer is enough, and
nothing has to be generated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import evaluate
import torch
from transformers import PreTrainedModel

from recipes.synthetic.models import outputs_at
from recipes.synthetic.tasks import IGNORED, Batch, Task

__all__ = [
    "TEST_SEED",
    "VALIDATION_SEED",
    "autocast",
    "fixed_batches",
    "measure",
    "predictions",
    "set_matmul_precision",
    "wilson_interval",
]

TEST_SEED, VALIDATION_SEED = 1, 2


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, 1927), 95% by default.

    Raises:
        ValueError: there is no trial, or the number of successes is impossible.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"expected at least one trial and 0 <= successes <= trials, got {successes} of {trials}")
    share = successes / trials
    middle = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def autocast(task: Task, device: torch.device) -> torch.autocast:
    """bfloat16 compute over float32 weights on a GPU; no autocast on a CPU, or for a task that needs float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and not task.float32)


def set_matmul_precision(task: Task) -> None:
    """Lets a GPU compute float32 products in tf32 (10 bits), unless the task needs float32. Applies to the process."""
    torch.set_float32_matmul_precision("highest" if task.float32 else "high")


def fixed_batches(task: Task, length: int, samples: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """The first `samples` fixed samples of a length, in batches.

    Samples are drawn one by one on the CPU, so that sample i is the same on every device and for every batch size.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + length)
    for start in range(0, samples, batch_size):
        size = min(batch_size, samples - start)
        yield Batch.concatenated([task.test_batch(1, length, generator) for _ in range(size)])


@torch.inference_mode()
def predictions(
    model: PreTrainedModel, task: Task, length: int, samples: int, seed: int, tokens_at_once: int = 1 << 17
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """The fixed samples of a length in batches, on the model's device, with its (batch, targets) predicted tokens."""
    device = next(model.parameters()).device
    batch_size = max(1, min(256, tokens_at_once // length))
    for on_cpu in fixed_batches(task, length, samples, batch_size, seed):
        batch = on_cpu.to(device)
        with autocast(task, device):
            predicted = outputs_at(model, batch).argmax(dim=-1)
        yield batch, predicted


@cache
def _exact_answers() -> evaluate.EvaluationModule:
    """The metric in metrics/exact_answers. Nothing is downloaded."""
    return evaluate.load(str(Path(__file__).parent / "metrics" / "exact_answers"), keep_in_memory=True)


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    task: Task,
    length: int,
    samples: int,
    *,
    seed: int = TEST_SEED,
    tokens_at_once: int = 1 << 17,
    minutes: float = math.inf,
) -> dict[str, Any]:
    """The share of samples of a length that the model answers exactly.

    Args:
        model: in eval mode, on the device to run on.
        task: of the samples.
        length: of the source, in tokens.
        samples: how many.
        seed: TEST_SEED or VALIDATION_SEED.
        tokens_at_once: source tokens in a batch.
        minutes: after which no new batch is begun.

    Returns:
        exact_match with its 95% interval, token_accuracy, and the number of samples. For a task with queries also e
        of the query-error law, e = (wrong queries / queries) / pairs, with its 95% interval.
    """
    metric = _exact_answers()
    queries = queries_right = input_length = 0
    start = time.monotonic()
    for batch, predicted in predictions(model, task, length, samples, seed, tokens_at_once):
        counts = batch.labels != IGNORED
        input_length = batch.inputs.shape[1]
        metric.add_batch(predictions=_rows(predicted, counts), references=_rows(batch.labels, counts))
        answered = task.queries_right((predicted == batch.labels) | ~counts)
        if answered is not None:
            queries += answered.numel()
            queries_right += int(answered.sum())
        if time.monotonic() - start > 60 * minutes:
            break
    found = metric.compute()
    result: dict[str, Any] = {
        "length": length,
        "input_tokens": input_length,
        **{name: found[name] for name in ("samples", "exact_match", "interval", "token_accuracy")},
        "seconds": round(time.monotonic() - start, 2),
    }
    pairs = task.distractors(length)
    if pairs is not None and queries:
        wrong = queries - queries_right
        low, high = wilson_interval(wrong, queries)
        result |= {"pairs": pairs, "queries": queries, "queries_wrong": wrong}
        result |= {"e": wrong / queries / pairs, "e_interval": (low / pairs, high / pairs)}
    return result


def _rows(tokens: torch.Tensor, counts: torch.Tensor) -> list[Any]:
    """The tokens of each sample that count, as arrays of different lengths."""
    tokens, counts = tokens.cpu(), counts.cpu()
    return [row[kept].numpy() for row, kept in zip(tokens, counts, strict=True)]
