"""A run that begins with the weights of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from recipes.synthetic.models import load_model
from recipes.synthetic.settings import RunSettings
from recipes.synthetic.tasks import Task

__all__ = ["load_weights", "runs_before"]

_KIND = ("method", "positions")  # models that differ in these may have weights of equal shapes


def load_weights(model: PreTrainedModel, task: Task, settings: RunSettings) -> dict[str, Any]:
    """Loads the weights of the run in `settings.start_from` into the model.

    Returns:
        What the new run's summary says about that run, and about all runs before it.

    Raises:
        FileNotFoundError: the folder has no finished run.
        ValueError: that run has another task, method, kind of positions or model size.
    """
    folder = settings.start_from
    run_file, weights = Path(folder) / "run.json", Path(folder) / "model"
    if not run_file.exists() or not weights.exists():
        raise FileNotFoundError(
            f"start-from expects the folder of a finished seed, with run.json and model/; {folder} does not have both"
        )
    run = json.loads(run_file.read_text())
    if run["task"] != task.name:
        raise ValueError(f"start-from: {folder} was trained on {run['task']}, but this run learns {task.name}")
    found = load_model(weights).state_dict()
    differing = [name for name in _KIND if run["settings"][name] != getattr(settings, name)]
    if differing:
        raise ValueError(
            f"start-from: the run in {folder} has another {' and '.join(differing)} than this run, whose results would "
            "carry the name of the last run alone"
        )
    own = {name: value.shape for name, value in model.state_dict().items()}
    if own != {name: value.shape for name, value in found.items()}:
        raise ValueError(f"start-from: the model in {folder} has other sizes than this run asks for")
    model.load_state_dict(found)
    earlier = run.get("started_from") or {"samples": 0, "seconds": 0.0}
    return {
        "track": run["track"],
        "command": run.get("header", {}).get("command", ""),
        "samples": run["samples"] + earlier["samples"],
        "seconds": run["seconds"] + earlier["seconds"],
        "seed": run["seed"],
        "task_settings": run["task_settings"],
        "settings": run["settings"],
        "started_from": run.get("started_from"),
    }


def runs_before(earlier: dict[str, Any] | None) -> int:
    """The number of runs in the chain that ends with `earlier`, each begun with the weights of the one before."""
    return 0 if earlier is None else 1 + runs_before(earlier.get("started_from"))
