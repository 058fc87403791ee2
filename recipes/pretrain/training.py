"""The training loop of pretrain.py: AdamW, warm-up and cosine, any number of devices, exact resume."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import hf_asentmax
from recipes.pretrain.data import StreamedBlocks

__all__ = ["rate_factor", "train"]


def rate_factor(step: int, warm_up: int, steps: int) -> float:
    """The factor on the learning rate: it rises to 1 over `warm_up` steps, and falls to a tenth along a cosine."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = min(1.0, (step - warm_up) / max(1, steps - warm_up))
    return 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * done))


def _batches(accelerator: Accelerator, loader: Any, streamed: bool, done: int) -> Iterator[torch.Tensor]:
    """All batches from number `done` on, epoch after epoch: those of an uninterrupted run."""
    epoch, skip = 0, done
    if not streamed:
        if len(loader) == 0:
            raise SystemExit("the text has fewer blocks than one batch: give more text, or a smaller --batch-size")
        epoch, skip = divmod(done, len(loader))
    while True:
        loader.set_epoch(epoch)
        for (tokens,) in accelerator.skip_first_batches(loader, skip) if skip else loader:
            yield tokens
        epoch, skip = epoch + 1, 0


def _step(
    accelerator: Accelerator, model: PreTrainedModel, batches: Iterator[torch.Tensor], accumulation: int
) -> float:
    """Adds the gradients of `accumulation` batches. Returns their mean loss over all devices."""
    total = 0.0
    for part in range(accumulation):
        tokens = next(batches)
        # Accelerator.accumulate would also end a step at the end of each epoch
        with accelerator.no_sync(model) if part + 1 < accumulation else nullcontext():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss / accumulation
            accelerator.backward(loss)
        total += float(accelerator.reduce(loss.detach(), reduction="mean").item())
    return total


def train(
    accelerator: Accelerator, model: PreTrainedModel, blocks: Any, arguments: argparse.Namespace, name: str
) -> tuple[PreTrainedModel, list[float]]:
    """Trains the model, from the saved state if the arguments ask for it.

    Args:
        accelerator: holds the devices and the precision.
        model: the model before `Accelerator.prepare`.
        blocks: a data set of token blocks, from data.py.
        arguments: of pretrain.py.
        name: of the method, for the progress bar.

    Returns:
        The trained model, and the loss of each step since the start or the saved state.
    """
    streamed = isinstance(blocks, StreamedBlocks)
    loader = DataLoader(blocks, batch_size=arguments.batch_size, shuffle=not streamed, drop_last=True)
    optimizer = torch.optim.AdamW(
        hf_asentmax.parameter_groups(model, arguments.weight_decay), lr=arguments.learning_rate, betas=(0.9, 0.95)
    )
    # not given to `prepare`, which would advance it once for each device
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, arguments.warm_up, arguments.steps)
    )
    accelerator.register_for_checkpointing(schedule)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    state: Path = arguments.out / "state"
    if arguments.resume:
        if not state.exists():
            raise SystemExit(f"there is no state to resume from in {arguments.out}: start without --resume")
        accelerator.load_state(str(state))
    first = schedule.last_epoch
    stop = min(arguments.steps, arguments.stop_after or arguments.steps)
    batches = _batches(accelerator, loader, streamed, first * arguments.gradient_accumulation)
    losses: list[float] = []
    model.train()
    progress = tqdm(
        range(first, stop),
        initial=first,
        total=arguments.steps,
        desc=name,
        unit="step",
        dynamic_ncols=True,
        disable=not accelerator.is_main_process,
    )
    for step in progress:
        losses.append(_step(accelerator, model, batches, arguments.gradient_accumulation))
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"the loss is {losses[-1]} at step {step}: try a lower --learning-rate")
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent = losses[-50:]
        progress.set_postfix_str(f"loss {sum(recent) / len(recent):.3f}", refresh=False)
        if (step + 1) % arguments.save_every == 0 or step + 1 == stop:
            accelerator.save_state(str(state), safe_serialization=True)
    return accelerator.unwrap_model(model), losses
