"""Analyses of trained models of MQMTAR: how often they err, on what, and how far back heads with ALiBi matter."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from recipes.synthetic.evaluate import task_of
from recipes.synthetic.tasks import Mqmtar

__all__ = ["SAMPLES_SEED", "mqmtar_of"]

SAMPLES_SEED = 7  # of the samples of `mistakes` and `reach`, which are not those of tests and validations


def mqmtar_of(folder: Path, parser: argparse.ArgumentParser, pool: int | None = None) -> Mqmtar:
    """The task of a finished seed. Exits with the command line's error if it is not MQMTAR.

    Args:
        folder: with run.json.
        parser: of the command line.
        pool: number of keys, and of values, to draw from; None for the number in training.
    """
    run = json.loads((folder / "run.json").read_text())
    if run["task"] != Mqmtar.name:
        parser.error(f"{folder} was trained on {run['task']}, but this analysis is for MQMTAR")
    task = task_of(run, pool)
    assert isinstance(task, Mqmtar)
    return task
