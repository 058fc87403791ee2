"""A loss and short runs of transformers' Trainer on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tiny_models import random_ids

IDS = random_ids(2, 12)
NAPE = {"positions": "nape"}


def loss_of(model: Any, **kwargs: Any) -> torch.Tensor:
    """The language-modelling loss of `IDS`."""
    logits = model(input_ids=IDS, use_cache=False, **kwargs).logits
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


class Rows(torch.utils.data.Dataset):
    """Rows of a fixed cycle of tokens, which a model learns quickly."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(12) + index) % 8 + 3
        return {"input_ids": ids, "labels": ids}


class Losses(TrainerCallback):
    """Collects the logged loss of each step."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses[state.global_step] = logs["loss"]


def make_trainer(model: Any, path: Path, **overrides: Any) -> tuple[Trainer, dict[int, float]]:
    """A Trainer of six steps on `Rows`, and the losses that it will log by step; `overrides` are TrainingArguments."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "weight_decay": 0.1,
    }
    losses = Losses()
    arguments = TrainingArguments(output_dir=str(path), **{**settings, **overrides})
    return Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[losses]), losses.losses
