"""Reproduces the recipe's results: a list of jobs that runs on all GPUs of a machine and can be interrupted.

    python -m recipes.synthetic.suite --list                 # every job, its time and its command
    python -m recipes.synthetic.suite                        # all jobs
    python -m recipes.synthetic.suite --only mqmtar copy     # the jobs whose names begin so
    python -m recipes.synthetic.suite --minutes 30           # only jobs that end within half an hour

A GPU that is free takes the next job that the time left allows. Runs, results, tables, figures and a log for each job
go to runs/suite/ (--out). A job that has ended well there is not run again, and an interrupted run is continued. A CPU
takes one job at a time, and a very long time.

The jobs are MQMTAR on the paper's data and, from there, on our own; the other tasks; softmax, entmax and SSMax with the
same flags (but not on our own data); and the ablations. FLAGS and the other environment variables of mqmtar.sh apply to
its jobs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from recipes.common import REPOSITORY, format_table
from recipes.synthetic.ablations import VARIANTS

__all__ = ["Job", "Outcome", "jobs", "main", "run"]

SEEDS = (0, 1, 2)
# Hard samples, chosen by their loss and replayed; heads left out.
_HARD = "--hard-candidates 4 --hard-from 0.3 --replay 0.25"
_HEADS = "--head-drop 0.5 --ease-in 1500"
# A task's positions, minutes of training and flags, the same for all methods.
_TASKS = {
    "copy": ("nape", 9.0, f"--compile --alibi-window 16 {_HEADS} {_HARD}"),
    "reverse": ("nape", 12.0, f"--compile --alibi-window 16 {_HEADS} {_HARD}"),
    "sort": ("nope", 6.0, f"--compile --batch 512 {_HARD}"),
    "local_count": ("nape", 9.0, f"--compile --head-drop 0.9 --ease-in 1500 {_HARD}"),
    "two_back": ("nape", 2.5, f"--compile {_HEADS} {_HARD}"),
    "flip_flop": ("nape", 1.5, "--compile"),
    "max_retrieval": ("nope", 2.0, ""),
    "parity": ("nape", 1.5, "--compile"),
}
_BASELINES = ("softmax", "entmax", "ssmax")

# The exit codes of a shell after Ctrl-C, its own or that of what it ran. No further job is started then.
_INTERRUPTED = (-signal.SIGINT, 128 + signal.SIGINT)


@dataclass(frozen=True)
class Job:
    """A command for a shell at the repository's root, with NAME, OUT, RUNS and PYTHON in its environment.

    Attributes:
        name: of the log and of the folder of runs.
        minutes: approximate time on one H200, with compilation and tests.
        command: for bash.
    """

    name: str
    minutes: float
    command: str


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `state` is done, failed or not started."""

    job: Job
    state: str
    seconds: float = 0.0


def jobs() -> list[Job]:
    """All jobs, those of MQMTAR first."""
    return [*_mqmtar(), *_of_tasks(), *_ablations()]


def _mqmtar() -> Iterator[Job]:
    script = 'EVALUATE_FLAGS="--results $OUT/results" bash recipes/synthetic/mqmtar.sh'
    law = '"$PYTHON" -m recipes.synthetic.analysis.law "$RUNS"/*-paper "$RUNS"/*-both --output "$OUT/law/$NAME.json"'
    for seed in SEEDS:
        yield Job(f"mqmtar-{seed}", 24, f"{script} paper {seed} && {script} both {seed} && {law}")
    for method in _BASELINES:
        yield Job(f"mqmtar-{method}-0", 14, f"METHOD={method} TRIES=1 {script} paper 0")


def _of_tasks() -> Iterator[Job]:
    for method in ("asentmax", *_BASELINES):
        for task, (positions, minutes, flags) in _TASKS.items():
            for seed in SEEDS if method == "asentmax" else SEEDS[:1]:
                train = (
                    f'"$PYTHON" -m recipes.synthetic.train --task {task} --method {method} --positions {positions} '
                    f'--seeds {seed} --steps 0 --minutes {minutes} {flags} --out "$RUNS"'
                )
                evaluate = '"$PYTHON" -m recipes.synthetic.evaluate "$RUNS" --results "$OUT/results"'
                name = f"{task}-{seed}" if method == "asentmax" else f"{task}-{method}-{seed}"
                yield Job(name, minutes + 1.7, f"{train} && {evaluate}")


def _ablations() -> Iterator[Job]:
    for seed in SEEDS:
        for number, name in enumerate(VARIANTS):
            command = (
                f'"$PYTHON" -m recipes.synthetic.ablations --only {shlex.quote(name)} --seeds {seed} '
                '--out "$RUNS" --results "$OUT/ablations/$NAME"'
            )
            yield Job(f"ablation-{seed}-{number:02}", 2.7, command)


def run(chosen: Sequence[Job], out: Path, gpus: Sequence[str], minutes: float) -> list[Outcome]:
    """Runs jobs, one on each GPU at a time, until all are done or no time is left to start another.

    Args:
        chosen: the jobs, in the order in which they start.
        out: folder for runs, results, logs, and a file for each job that has ended well.
        gpus: as in CUDA_VISIBLE_DEVICES; one empty string for a CPU.
        minutes: time within which the started jobs should end.

    Returns:
        How each job ended, in the same order.
    """
    for folder in ("done", "law", "log", "results", "runs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    outcomes = {job.name: Outcome(job, "done" if _done(out, job).exists() else "not started") for job in chosen}
    waiting = [job for job in chosen if outcomes[job.name].state != "done"]
    start, lock = time.monotonic(), threading.Lock()

    def next_job() -> Job | None:
        left = minutes - (time.monotonic() - start) / 60
        with lock:
            job = next((job for job in waiting if job.minutes <= left), None)
            if job is not None:
                waiting.remove(job)
        return job

    def worker(gpu: str) -> None:
        while (job := next_job()) is not None:
            began = time.monotonic()
            code = _run_one(job, out, gpu)
            outcome = Outcome(job, "failed" if code else "done", time.monotonic() - began)
            with lock:
                if code in _INTERRUPTED:
                    waiting.clear()
                outcomes[job.name] = outcome
                bar.update()
                where = f" on GPU {gpu}" if gpu else ""
                bar.write(f"{job.name}: {outcome.state}{where}, {outcome.seconds / 60:.1f} minutes")

    with tqdm(total=len(waiting), unit="job") as bar:
        workers = [threading.Thread(target=worker, args=(gpu,)) for gpu in gpus]
        for each in workers:
            each.start()
        try:
            for each in workers:
                each.join()
        except KeyboardInterrupt:  # the jobs receive it too, and end
            for each in workers:
                each.join()
            raise
    return [outcomes[job.name] for job in chosen]


def _done(out: Path, job: Job) -> Path:
    return out / "done" / job.name


def _run_one(job: Job, out: Path, gpu: str) -> int:
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "NAME": job.name,
        "OUT": str(out),
        "RUNS": str(out / "runs" / job.name),
        **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}),
    }
    with (out / "log" / f"{job.name}.log").open("a") as log:
        done = subprocess.run(
            ["bash", "-c", job.command], cwd=REPOSITORY, env=environment, stdout=log, stderr=log, check=False
        )
    if done.returncode == 0:
        _done(out, job).touch()
    return done.returncode


def table(outcomes: Sequence[Outcome]) -> str:
    """A table in plain text with a row for each job: how it ended, and how long it took."""
    rows = [
        [o.job.name, o.state, f"{o.seconds / 60:.1f}" if o.seconds else "", f"{o.job.minutes:.1f}"] for o in outcomes
    ]
    return format_table(["job", "state", "minutes", "expected"], rows)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="beginnings of the names of jobs to run, in order")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start only jobs that end within this time")
    parser.add_argument("--gpus", help="the GPUs to use, as in 0,1 (default: all)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/suite"), help="folder for all output (default: runs/suite)"
    )
    parser.add_argument("--list", action="store_true", help="only list the jobs")
    parsed = parser.parse_args(arguments)

    known = jobs()
    chosen = known
    if parsed.only:
        chosen = [job for name in parsed.only for job in known if job.name.startswith(name)]
        for name in parsed.only:
            if not any(job.name.startswith(name) for job in known):
                parser.error(f"--only {name}: no job's name begins so; --list shows all names")
        chosen = list(dict.fromkeys(chosen))
    if parsed.list:
        for job in chosen:
            print(f"{job.name:24}{job.minutes:6.1f} minutes  {job.command}")
        print(f"{len(chosen)} jobs, {sum(job.minutes for job in chosen) / 60:.1f} hours of one H200 (approximate)")
        return
    gpus = parsed.gpus.split(",") if parsed.gpus else [str(gpu) for gpu in range(torch.cuda.device_count())] or [""]
    if gpus == [""]:
        print("there is no GPU: one job at a time on the CPU, many times slower than --list says")
    out = parsed.out.resolve()
    outcomes = run(chosen, out, gpus, parsed.minutes)
    print(table(outcomes))
    if any((out / "results").glob("*.json")):
        subprocess.run(
            [sys.executable, "-m", "recipes.synthetic.report", "--results", out / "results"], cwd=REPOSITORY, check=True
        )
    failed = [outcome.job.name for outcome in outcomes if outcome.state == "failed"]
    if failed:
        parser.exit(1, f"failed: {', '.join(failed)}; see {out / 'log'}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
