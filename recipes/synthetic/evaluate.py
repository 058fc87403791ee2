"""Test trained models at many lengths and write one results file for each seed.

    python recipes/synthetic/evaluate.py runs/synthetic/mqmtar-asentmax-nape

takes every finished seed below the folders given. Results hold the run's settings, versions, device and commit; lengths
that a results file of the same run already has are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.common import default_device, results_header, write_json
from recipes.synthetic.measuring import measure, set_matmul_precision
from recipes.synthetic.models import load_model
from recipes.synthetic.tasks import TASKS, Mqmtar, Task

__all__ = ["add_measuring_flags", "evaluate_run", "fewer_pairs", "main", "mqmtar_of", "run_folders", "task_of"]

RESULTS = Path(__file__).parent / "results"


def task_of(run: dict[str, Any], pool: int | None = None) -> Task:
    """The task that a run.json describes, MQMTAR's with `pool` keys, and values, to draw from in place of its own."""
    task = TASKS[run["task"]](**run["task_settings"])
    if pool is None:
        return task
    if not isinstance(task, Mqmtar):
        raise ValueError(f"--pool is for MQMTAR's keys and values; this run learnt {task.name}")
    return replace(task, pool=pool)


def mqmtar_of(folder: Path, parser: argparse.ArgumentParser, what: str) -> Mqmtar:
    """The task of a finished seed, for what is of MQMTAR alone, as `what` says; else the command line's error."""
    task = task_of(json.loads((folder / "run.json").read_text()))
    if not isinstance(task, Mqmtar):
        parser.error(f"{folder} was trained on {task.name}; {what}")
    return task


def fewer_pairs(task: Task, length: int) -> str:
    """A remark where a context of MQMTAR has room for more pairs than its pool has; else nothing."""
    if not isinstance(task, Mqmtar) or task.pairs(length) == task.fitting(length):
        return ""
    words = Mqmtar.LETTERS**2
    more = f"; --pool gives more, {words:,} at most" if task.pool < words else ""
    return f" ({task.pool:,} pairs, all of its pool, where {task.fitting(length):,} fit{more})"


def run_folders(roots: Iterable[Path]) -> list[Path]:
    """The folders of seeds at or below `roots` whose run has ended, given up or not, in order."""
    return sorted({file.parent for root in roots for file in root.rglob("run.json")})


def add_measuring_flags(parser: argparse.ArgumentParser, tokens_at_once: int, tokens: str) -> None:
    """--minutes, --tokens-at-once (its default, and what they are), --pool and --device, for what measures models."""
    parser.add_argument("--minutes", type=float, default=math.inf, help="at most for one length of one model")
    parser.add_argument(
        "--tokens-at-once", type=int, default=tokens_at_once, help=f"{tokens} (default: {tokens_at_once:,})"
    )
    parser.add_argument(
        "--pool", type=int, help="MQMTAR: keys, and values, to draw from, where a length takes more than in training"
    )
    parser.add_argument("--device", type=torch.device, default=default_device(), help="default: a GPU if there is one")


def evaluate_run(
    folder: Path,
    results_file: Path,
    device: torch.device,
    *,
    multiples: list[int] | None,
    samples: int,
    long_samples: int,
    minutes: float,
    tokens_at_once: int,
    pool: int | None = None,
) -> dict[str, Any]:
    """Test one finished run, writing the results after each length.

    Args:
        folder: with run.json and model/.
        results_file: to write, or to go on with; another run's is kept beside it, as .json.before.
        multiples: of the longest training length; None for the task's own.
        samples, long_samples: up to 64 times that length, and beyond.
        minutes: for one length at most.
        tokens_at_once: source tokens in a batch.
        pool: MQMTAR's keys, and values, to draw from; None for as many as in training.
    """
    run = json.loads((folder / "run.json").read_text())
    results: dict[str, Any] = {"run": run, "evaluation": results_header(device, [run["seed"]]), "lengths": []}
    if results_file.exists():
        earlier = json.loads(results_file.read_text())
        if earlier["run"] == run:
            results["lengths"] = earlier["lengths"]
            commands = [*earlier["evaluation"]["command"].split("; "), results["evaluation"]["command"]]
            results["evaluation"]["command"] = "; ".join(dict.fromkeys(commands))
        else:
            aside = results_file.with_suffix(".json.before")
            while aside.exists():
                aside = aside.with_name(f"{aside.name}.before")
            results_file.rename(aside)
            tqdm.write(f"{results_file} has the results of another run of that name: they are kept as {aside.name}")
    task = task_of(run, pool)
    set_matmul_precision(task)
    model: PreTrainedModel | None = None
    for multiple in multiples or task.test_multiples:
        wanted = samples if multiple <= 64 else long_samples
        measured = [
            entry for entry in results["lengths"] if entry["multiple"] == multiple and entry.get("pool") == pool
        ]
        if any(entry["samples"] >= wanted for entry in measured):
            continue
        if model is None:
            model = load_model(folder / "model").to(device)  # type: ignore[arg-type]
        length = multiple * task.max_length
        entry = measure(model, task, length, wanted, tokens_at_once=tokens_at_once, minutes=minutes)
        if pool is not None:
            entry["pool"] = pool
        others = [other for other in results["lengths"] if other["multiple"] != multiple]
        results["lengths"] = sorted([*others, {"multiple": multiple, **entry}], key=lambda item: item["multiple"])
        write_json(results_file, results)
        law = f", e = {entry['e']:.2g}" if "e" in entry else ""
        tqdm.write(
            f"{folder.parent.name} {folder.name} at {multiple}x: {100 * entry['exact_match']:.1f}% of "
            f"{entry['samples']} exact{law}, {entry['seconds']:.1f} s{fewer_pairs(task, length)}"
        )
    return results


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results files go")
    parser.add_argument(
        "--multiples", type=int, nargs="+", help="lengths to test, in multiples of the longest trained on"
    )
    parser.add_argument("--samples", type=int, default=1000, help="samples of each length up to 64x (default: 1000)")
    parser.add_argument("--long-samples", type=int, default=200, help="samples of each longer one (default: 200)")
    add_measuring_flags(parser, 1 << 17, "source tokens in a batch")
    parsed = parser.parse_args(arguments)

    logging.disable_progress_bar()
    folders = run_folders(parsed.runs)
    if not folders:
        parser.error(f"no finished run below {', '.join(map(str, parsed.runs))}")
    runs = {folder: json.loads((folder / "run.json").read_text()) for folder in folders}
    for run in runs.values():
        task_of(run, parsed.pool)  # what it refuses is refused before anything is measured
    for folder, run in tqdm(runs.items(), unit="model"):
        if run.get("given_up"):
            tqdm.write(f"{folder} was given up before it left the plateau: there is no model to test")
            continue
        evaluate_run(
            folder,
            parsed.results / f"{folder.parent.name}-{folder.name}.json",
            parsed.device,
            multiples=parsed.multiples,
            samples=parsed.samples,
            long_samples=parsed.long_samples,
            minutes=parsed.minutes,
            tokens_at_once=parsed.tokens_at_once,
            pool=parsed.pool,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
