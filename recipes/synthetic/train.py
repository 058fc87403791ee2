"""Trains a model on a synthetic task, one for each seed. The same command continues an interrupted run.

    python -m recipes.synthetic.train --task mqmtar --seeds 0 1 2 --steps 0 --minutes 5 --corrupt 0.5 --jitter 0.5

`--task NAME --help` shows the flags of that task. Each seed has a folder below --out with its model (for
`from_pretrained`), run.json, the training log log.json and a checkpoint. `recipes.synthetic.evaluate` tests it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging

from recipes.common import default_device, results_header, write_json
from recipes.synthetic.measuring import set_matmul_precision
from recipes.synthetic.settings import PARTS, RunSettings, add_flags, from_flags
from recipes.synthetic.tasks import TASKS, Task
from recipes.synthetic.trainer import Trainer

__all__ = ["main", "parse", "run_name"]


def run_name(task: str, settings: RunSettings, name: str) -> str:
    """The folder of a run's seeds."""
    return "-".join(part for part in (task, settings.method, settings.positions, name) if part)


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Task, RunSettings]:
    """The flags of the command line, and the task and the settings that they describe."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--task", choices=TASKS, default="mqmtar", help="the task to learn (default: mqmtar)")
    task_class = TASKS[first.parse_known_args(arguments)[0].task]
    parser = argparse.ArgumentParser(
        parents=[first], description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each seed (default: 0)")
    parser.add_argument("--name", default="", help="a word that distinguishes this variant from others in folder names")
    parser.add_argument("--out", type=Path, default=Path("runs/synthetic"), help="folder for the runs")
    parser.add_argument(
        "--stop-after", type=float, default=math.inf, help="minutes after which to save a checkpoint and exit"
    )
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes, and exit")
    parser.add_argument("--device", type=torch.device, default=default_device(), help="default: a GPU if there is one")
    add_flags(parser, task_class, f"the task {task_class.name}: data, model size, learning rate")
    for part in PARTS:
        add_flags(parser, part, str(part.__doc__))
    parsed = parser.parse_args(arguments)
    return parsed, from_flags(task_class, parsed), from_flags(RunSettings, parsed)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parsed, task, settings = parse(arguments)
    logging.disable_progress_bar()
    set_matmul_precision(task)
    start = time.monotonic()
    for seed in parsed.seeds:
        folder = parsed.out / run_name(task.name, settings, parsed.name) / f"seed{seed}"
        if (folder / "run.json").exists():
            print(f"{folder} is already finished")
            continue
        trainer = Trainer(task, settings, seed, folder, parsed.device)
        if parsed.profile:
            print(trainer.profile())
            return
        if not trainer.run(parsed.stop_after - (time.monotonic() - start) / 60):
            print(f"stopped at step {trainer.step}; the same command continues from there")
            return
        summary = trainer.summary()
        write_json(folder / "log.json", {"log": trainer.log})
        write_json(folder / "run.json", {"header": results_header(parsed.device, [seed]), **summary})
        rates = f"{summary['samples_per_second']:,.0f} samples/s, {summary['tokens_per_second']:,.0f} tokens/s"
        if summary["given_up"]:
            print(f"{folder}: given up: {summary['samples']:,} samples did not leave the plateau; no model was kept")
        print(f"{folder}: {summary['steps']} steps in {summary['seconds']:.0f} s, {rates}")


if __name__ == "__main__":
    main(sys.argv[1:])
