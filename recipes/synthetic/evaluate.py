"""Tests trained models at many lengths and writes one results file for each seed.

    python -m recipes.synthetic.evaluate runs/synthetic/mqmtar-asentmax-nape

tests every finished seed below the folders given. A results file has the run's settings, versions, device and commit.
Lengths that the results file of the same run already has are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from recipes.common import default_device, results_header, write_json
from recipes.synthetic.measuring import measure, set_matmul_precision
from recipes.synthetic.models import load_model
from recipes.synthetic.tasks import TASKS, Mqmtar, Task

__all__ = ["RESULTS", "Tests", "add_measuring_flags", "evaluate_run", "fewer_pairs", "main", "run_folders", "task_of"]

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Tests:
    """What a model is tested on.

    Attributes:
        multiples: lengths, in multiples of the longest in training; None for those of the task.
        samples, long_samples: of each length up to 64 times the training length, and of each longer one.
        minutes: for one length at most.
        tokens_at_once: source tokens in a batch.
        pool: number of keys, and of values, to draw from in MQMTAR; None for the number in training.
    """

    multiples: list[int] | None = None
    samples: int = 1000
    long_samples: int = 200
    minutes: float = math.inf
    tokens_at_once: int = 1 << 17
    pool: int | None = None


def task_of(run: dict[str, Any], pool: int | None = None) -> Task:
    """The task that a run.json describes.

    Args:
        run: the content of run.json.
        pool: number of MQMTAR's keys, and of its values, to draw from; None for the number in training.

    Raises:
        ValueError: there is a `pool`, and the task is not MQMTAR.
    """
    task = TASKS[run["task"]](**run["task_settings"])
    if pool is None:
        return task
    if not isinstance(task, Mqmtar):
        raise ValueError(f"--pool is for MQMTAR's keys and values, but this run learned {task.name}")
    return replace(task, pool=pool)


def fewer_pairs(task: Task, length: int) -> str:
    """A remark where a context of MQMTAR has room for more pairs than its pool has; otherwise an empty string."""
    if not isinstance(task, Mqmtar) or task.pairs(length) == task.fitting(length):
        return ""
    words = Mqmtar.LETTERS**2
    more = f"; --pool gives more, {words:,} at most" if task.pool < words else ""
    return f" (all {task.pool:,} pairs of the pool, where {task.fitting(length):,} fit{more})"


def run_folders(roots: Iterable[Path]) -> list[Path]:
    """The folders of all seeds at or below `roots` whose run has ended, given up or not, in order."""
    return sorted({file.parent for root in roots for file in root.rglob("run.json")})


def add_measuring_flags(parser: argparse.ArgumentParser, tokens_at_once: int, tokens: str) -> None:
    """Adds --minutes, --tokens-at-once (its default, and a description), --pool and --device."""
    parser.add_argument("--minutes", type=float, default=math.inf, help="at most, for one length of one model")
    parser.add_argument(
        "--tokens-at-once", type=int, default=tokens_at_once, help=f"{tokens} (default: {tokens_at_once:,})"
    )
    parser.add_argument(
        "--pool",
        type=int,
        help="MQMTAR: number of keys, and of values, to draw from, for lengths that need more than training has",
    )
    parser.add_argument("--device", type=torch.device, default=default_device(), help="default: a GPU if there is one")


def evaluate_run(folder: Path, results_file: Path, device: torch.device, tests: Tests) -> dict[str, Any]:
    """Tests one finished run. The results are written after each length.

    Args:
        folder: of the run, with run.json and model/.
        results_file: to write, or to add to. Results of another run with that name are kept beside it, as .json.before.
        device: where to test.
        tests: the lengths and numbers of samples.
    """
    run = json.loads((folder / "run.json").read_text())
    results = _earlier_results(run, results_file, results_header(device, [run["seed"]]))
    task = task_of(run, tests.pool)
    set_matmul_precision(task)
    model: PreTrainedModel | None = None
    for multiple in tests.multiples or task.test_multiples:
        wanted = tests.samples if multiple <= 64 else tests.long_samples
        measured = [
            entry for entry in results["lengths"] if entry["multiple"] == multiple and entry.get("pool") == tests.pool
        ]
        if any(entry["samples"] >= wanted for entry in measured):
            continue
        if model is None:
            model = load_model(folder / "model").to(device)  # type: ignore[arg-type]
        length = multiple * task.max_length
        entry = measure(model, task, length, wanted, tokens_at_once=tests.tokens_at_once, minutes=tests.minutes)
        if tests.pool is not None:
            entry["pool"] = tests.pool
        others = [other for other in results["lengths"] if other["multiple"] != multiple]
        results["lengths"] = sorted([*others, {"multiple": multiple, **entry}], key=lambda item: item["multiple"])
        write_json(results_file, results)
        law = f", e = {entry['e']:.2g}" if "e" in entry else ""
        tqdm.write(
            f"{folder.parent.name} {folder.name} at {multiple}x: {100 * entry['exact_match']:.1f}% of "
            f"{entry['samples']} exact{law}, {entry['seconds']:.1f} s{fewer_pairs(task, length)}"
        )
    return results


def _earlier_results(run: dict[str, Any], results_file: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Results of this run to add to: those in the file, or empty ones if the file is of another run."""
    results: dict[str, Any] = {"run": run, "evaluation": header, "lengths": []}
    if not results_file.exists():
        return results
    earlier = json.loads(results_file.read_text())
    if earlier["run"] == run:
        results["lengths"] = earlier["lengths"]
        commands = [*earlier["evaluation"]["command"].split("; "), header["command"]]
        results["evaluation"]["command"] = "; ".join(dict.fromkeys(commands))
        return results
    aside = results_file.with_suffix(".json.before")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}.before")
    results_file.rename(aside)
    tqdm.write(f"{results_file} had the results of another run with that name; they are kept as {aside.name}")
    return results


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results files")
    parser.add_argument(
        "--multiples", type=int, nargs="+", help="lengths to test, in multiples of the longest in training"
    )
    parser.add_argument("--samples", type=int, default=1000, help="samples of each length up to 64x (default: 1000)")
    parser.add_argument("--long-samples", type=int, default=200, help="samples of each longer length (default: 200)")
    add_measuring_flags(parser, Tests.tokens_at_once, "source tokens in a batch")
    parsed = parser.parse_args(arguments)

    logging.disable_progress_bar()
    folders = run_folders(parsed.runs)
    if not folders:
        parser.error(f"there is no finished run below {', '.join(map(str, parsed.runs))}")
    tests = Tests(
        parsed.multiples, parsed.samples, parsed.long_samples, parsed.minutes, parsed.tokens_at_once, parsed.pool
    )
    runs = {folder: json.loads((folder / "run.json").read_text()) for folder in folders}
    for run in runs.values():
        task_of(run, parsed.pool)  # refuses --pool before anything is measured
    for folder, run in tqdm(runs.items(), unit="model"):
        if run.get("given_up"):
            tqdm.write(f"{folder} was given up before it left the plateau: there is no model to test")
            continue
        evaluate_run(folder, parsed.results / f"{folder.parent.name}-{folder.name}.json", parsed.device, tests)


if __name__ == "__main__":
    main(sys.argv[1:])
