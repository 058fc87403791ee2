"""The synthetic tasks and their runs at sizes that a CPU trains in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from recipes.synthetic.models import build_model
from recipes.synthetic.settings import RunSettings
from recipes.synthetic.tasks import TASKS, Mqmtar, Task
from recipes.synthetic.trainer import Trainer

SIZES = {"layers": 2, "hidden": 16, "heads": 4, "head_dim": 8, "ffn": 32}
SIZE_FLAGS = [text for name, value in SIZES.items() for text in (f"--{name.replace('_', '-')}", str(value))]
SMALL = Mqmtar(**SIZES)  # type: ignore[arg-type]
CPU = torch.device("cpu")


def positions_for(method: str) -> str:
    """NAPE, or NoPE for stick-breaking, which cannot have ALiBi."""
    return "nope" if method == "stick_breaking" else "nape"


def decided(method: str) -> PreTrainedModel:
    """A float64 model of `SMALL` whose outputs are far from uniform."""
    torch.manual_seed(0)
    model = build_model(SMALL, method, positions_for(method)).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.ndim == 2 else None
    return model


def small(name: str) -> Task:
    """A task with a tiny model."""
    sizes = {"hidden": 16, "ffn": 16} if name == "max_retrieval" else SIZES
    return TASKS[name](**sizes)  # type: ignore[arg-type]


def trained(folder: Path, task: Task, settings: RunSettings, stops: bool = False) -> Trainer:
    """A finished run of seed 3. With `stops`, a new trainer resumes from the checkpoint for every step."""
    while True:
        trainer = Trainer(task, settings, 3, folder / "seed3", CPU)
        if trainer.run(0.0 if stops else float("inf")):
            return trainer
