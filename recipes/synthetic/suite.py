"""The synthetic suite's results again, on every GPU of a machine: what is not there yet, in the list's order.

    python recipes/synthetic/suite.py --list                          # the jobs, and what each takes
    python recipes/synthetic/suite.py --only mqmtar copy              # some of them, by how their names begin
    python recipes/synthetic/suite.py --minutes 30                    # start what is done within half an hour

Each GPU takes the next job that the time left allows. Runs, results, tables, figures and a log for each job go to
runs/suite/ (--out); jobs that have ended well there are not run again, and a run that was interrupted goes on. A CPU
takes one job at a time, and very long.

The list has MQMTAR on the paper's data and, from there, on our own; the other tasks; softmax, entmax and SSMax beside
all of these but our own data, with the same flags; and the ablations on the paper's data. FLAGS and what else mqmtar.sh
takes from the environment reach its jobs.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.common import REPOSITORY, format_table
from recipes.synthetic.ablations import variants_of

__all__ = ["Job", "Outcome", "jobs", "main", "run"]

SEEDS = (0, 1, 2)
# Hard samples, chosen by their loss and seen again; heads left out.
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

# How a shell ends on Ctrl-C, by itself or by what it ran: no job is to follow.
_INTERRUPTED = (-signal.SIGINT, 128 + signal.SIGINT)


@dataclass(frozen=True)
class Job:
    """One command of a shell at the repository's root, with OUT, RUNS and PYTHON in its environment.

    Attributes:
        name: of its log, and of its folder of runs.
        minutes: what it takes of one H200, compilation and tests counted in; about.
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
    """All jobs, those of the headline first."""
    return [*_mqmtar(), *_of_tasks(), *_ablations()]


def _mqmtar() -> Iterator[Job]:
    script = 'EVALUATE_FLAGS="--results $OUT/results" bash recipes/synthetic/mqmtar.sh'
    law = '"$PYTHON" recipes/synthetic/law.py "$RUNS"/*-paper "$RUNS"/*-both --output "$OUT/law/$NAME.json"'
    for seed in SEEDS:
        yield Job(f"mqmtar-{seed}", 24, f"{script} paper {seed} && {script} both {seed} && {law}")
    for method in _BASELINES:
        yield Job(f"mqmtar-{method}-0", 14, f"METHOD={method} TRIES=1 {script} paper 0")


def _of_tasks() -> Iterator[Job]:
    for method in ("asentmax", *_BASELINES):
        for task, (positions, minutes, flags) in _TASKS.items():
            for seed in SEEDS if method == "asentmax" else SEEDS[:1]:
                train = (
                    f'"$PYTHON" recipes/synthetic/train.py --task {task} --method {method} --positions {positions} '
                    f'--seeds {seed} --steps 0 --minutes {minutes} {flags} --out "$RUNS"'
                )
                evaluate = '"$PYTHON" recipes/synthetic/evaluate.py "$RUNS" --results "$OUT/results"'
                name = f"{task}-{seed}" if method == "asentmax" else f"{task}-{method}-{seed}"
                yield Job(name, minutes + 1.7, f"{train} && {evaluate}")


def _ablations() -> Iterator[Job]:
    for seed in SEEDS:
        for number, name in enumerate(variants_of("paper")):
            command = (
                f'"$PYTHON" recipes/synthetic/ablations.py paper --only {shlex.quote(name)} --seeds {seed} '
                '--out "$RUNS" --results "$OUT/ablations/$NAME"'
            )
            yield Job(f"ablation-{seed}-{number:02}", 2.7, command)


def run(chosen: Sequence[Job], out: Path, gpus: Sequence[str], minutes: float) -> list[Outcome]:
    """Run jobs on GPUs, each on one, until all are done or no time is left to start one.

    Args:
        chosen: in the order in which they start.
        out: for runs, results, logs, and a file for each job that has ended well.
        gpus: as CUDA_VISIBLE_DEVICES has them; one empty one for a CPU.
        minutes: within which the jobs that are started should be done.

    Returns:
        How each ended, in the same order.
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
        except KeyboardInterrupt:  # the jobs have it too, and end
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
    """A row for each job: how it ended and how long it took."""
    rows = [
        [o.job.name, o.state, f"{o.seconds / 60:.1f}" if o.seconds else "", f"{o.job.minutes:.1f}"] for o in outcomes
    ]
    return format_table(["job", "state", "minutes", "expected"], rows)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="how the names of the jobs to run begin, in order")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start what is done within so many minutes")
    parser.add_argument("--gpus", help="which GPUs, as in 0,1 (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/suite"), help="for everything (default: runs/suite)")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    parsed = parser.parse_args(arguments)

    known = jobs()
    chosen = known
    if parsed.only:
        chosen = [job for name in parsed.only for job in known if job.name.startswith(name)]
        for name in parsed.only:
            if not any(job.name.startswith(name) for job in known):
                parser.error(f"--only {name}: no job's name begins so; --list shows all")
        chosen = list(dict.fromkeys(chosen))
    if parsed.list:
        for job in chosen:
            print(f"{job.name:24}{job.minutes:6.1f} minutes  {job.command}")
        print(f"{len(chosen)} jobs, {sum(job.minutes for job in chosen) / 60:.1f} hours of one H200, about")
        return
    gpus = parsed.gpus.split(",") if parsed.gpus else [str(gpu) for gpu in range(torch.cuda.device_count())] or [""]
    if gpus == [""]:
        print("no GPU: one job at a time on the CPU, many times slower than --list says")
    out = parsed.out.resolve()
    outcomes = run(chosen, out, gpus, parsed.minutes)
    print(table(outcomes))
    if any((out / "results").glob("*.json")):
        subprocess.run(
            [sys.executable, "recipes/synthetic/report.py", "--results", out / "results"], cwd=REPOSITORY, check=True
        )
    failed = [outcome.job.name for outcome in outcomes if outcome.state == "failed"]
    if failed:
        parser.exit(1, f"failed: {', '.join(failed)}; see {out / 'log'}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
