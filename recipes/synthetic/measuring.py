"""Exact match under greedy decoding, in one teacher-forced forward pass.

Greedy decoding gives the right answer exactly when every answer token is the most likely one after the right tokens
before it: up to the first wrong token both see the same inputs. So one pass over prompt and answer decides, without
generating.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

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
    """Wilson's score interval of a proportion, 95% by default."""
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"expected 0 <= successes <= trials and a trial, got {successes} of {trials}")
    share = successes / trials
    middle = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def autocast(task: Task, device: torch.device) -> torch.autocast:
    """bfloat16 compute on a GPU, over weights in float32; nothing on a CPU, or for a task that needs float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and not task.float32)


def set_matmul_precision(task: Task) -> None:
    """For all float32 products of this process: a GPU's tf32 (10 bits), or float32 for a task that needs it."""
    torch.set_float32_matmul_precision("highest" if task.float32 else "high")


def fixed_batches(task: Task, length: int, samples: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """The first `samples` of a length's fixed samples.

    They are drawn one by one on the CPU, so that sample i is the same on every device and for every batch size.
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
    """How many samples of a length the model answers exactly.

    Args:
        model: in eval mode, on the device to run on.
        length: of the source.
        samples: how many.
        tokens_at_once: source tokens in a batch.
        minutes: after which no new batch is begun.

    Returns:
        exact_match and token_accuracy with the samples behind them and exact match's 95% interval; for a task of
        queries also the query-error law's e = (wrong queries / queries) / pairs with its interval.
    """
    done = exact = tokens = tokens_right = queries = queries_right = input_length = 0
    start = time.monotonic()
    for batch, predicted in predictions(model, task, length, samples, seed, tokens_at_once):
        counts = batch.labels != IGNORED
        right = (predicted == batch.labels) | ~counts
        done += len(batch)
        input_length = batch.inputs.shape[1]
        exact += int(right.all(dim=1).sum())
        tokens += int(counts.sum())
        tokens_right += int((right & counts).sum())
        answered = task.queries_right(right)
        if answered is not None:
            queries += answered.numel()
            queries_right += int(answered.sum())
        if time.monotonic() - start > 60 * minutes:
            break
    result: dict[str, Any] = {
        "length": length,
        "input_tokens": input_length,
        "samples": done,
        "exact_match": exact / done,
        "interval": wilson_interval(exact, done),
        "token_accuracy": tokens_right / tokens,
        "seconds": round(time.monotonic() - start, 2),
    }
    pairs = task.distractors(length)
    if pairs is not None and queries:
        wrong = queries - queries_right
        low, high = wilson_interval(wrong, queries)
        result |= {"pairs": pairs, "queries": queries, "queries_wrong": wrong}
        result |= {"e": wrong / queries / pairs, "e_interval": (low / pairs, high / pairs)}
    return result
