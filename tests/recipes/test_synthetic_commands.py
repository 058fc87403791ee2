"""The command lines of the synthetic tasks: train, evaluate, mqmtar.sh, ablations, and the suite of all jobs."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes.synthetic import ablations, evaluate, report, suite, train
from recipes.synthetic.settings import RunSettings
from recipes.synthetic.suite import Job
from recipes.synthetic.tasks import TASKS, Mqmtar

from small_tasks import SIZE_FLAGS

ROOT = Path(__file__).resolve().parents[2]


def test_train_evaluate_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, results = tmp_path / "runs", tmp_path / "results"
    common = ["--device", "cpu", "--out", str(runs), "--steps", "2", "--batch", "4", "--log-every", "1", *SIZE_FLAGS]
    train.main(["--task", "mqmtar", "--seeds", "0", "1", "--corrupt", "0.5", *common])
    train.main(["--task", "mqmtar", "--method", "softmax", "--near-misses", "0.3", "--name", "near", *common])
    for _ in range(2):
        train.main(["--task", "copy", "--positions", "rope", *common])
    assert "already finished" in capsys.readouterr().out
    test = ["--device", "cpu", "--samples", "3", "--results", str(results)]
    for command, multiples in (("--first", ["1"]), ("--second", ["1", "2"])):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", command])
        evaluate.main([str(runs), "--multiples", *multiples, *test])
    assert capsys.readouterr().out.count(" at 1x") == 4

    assert len(list(results.glob("*.json"))) == 4
    content = json.loads((results / "mqmtar-asentmax-nape-seed1.json").read_text())
    assert [entry["multiple"] for entry in content["lengths"]] == [1, 2]
    first, second = content["evaluation"]["command"].split("; ")
    assert first.endswith(" --first") and second.endswith(" --second")
    assert content["run"]["samples"] == 8 and content["run"]["header"]["versions"]["torch"]
    assert content["run"]["final_loss"] > 0 and "log" not in content["run"], "the log stays beside the run"
    log = json.loads((runs / "mqmtar-asentmax-nape" / "seed1" / "log.json").read_text())["log"]
    assert log[-1]["loss"] == content["run"]["final_loss"]
    assert {"e", "e_interval", "interval", "pairs"} <= set(content["lengths"][0])

    report.main(["--results", str(results)])
    text = (results / "report.md").read_text()
    assert text.index("MQMTAR, trained on the paper's") < text.index("MQMTAR, trained on a distribution of our own")
    assert "- ASEntmax + NAPE: batch 4, corrupt 0.5" in text and "| seed 1 |" in text
    assert "| ASEntmax + NAPE, indep. |" in text and (results / "mqmtar-paper.png").stat().st_size > 1000


def test_evaluate_keeps_results_of_other_runs_and_pools_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    common = ["--device", "cpu", "--steps", "1", "--batch", "4", *SIZE_FLAGS]
    test = ["--device", "cpu", "--samples", "3", "--multiples", "1", "--results", str(results)]
    train.main(["--task", "mqmtar", *common, "--out", str(tmp_path / "runs")])
    train.main(["--task", "copy", *common, "--out", str(tmp_path / "runs")])
    for pool in ([], ["--pool", "400"], ["--pool", "400"]):
        evaluate.main([str(tmp_path / "runs" / "mqmtar-asentmax-nape"), *pool, *test])
    assert capsys.readouterr().out.count(" at 1x") == 2, "measured again with another pool, but not with the same one"
    (entry,) = json.loads((results / "mqmtar-asentmax-nape-seed0.json").read_text())["lengths"]
    assert entry["pool"] == 400
    with pytest.raises(ValueError, match="--pool is for MQMTAR's keys and values, but this run learned copy"):
        evaluate.main([str(tmp_path / "runs" / "copy-asentmax-nape"), "--pool", "400", *test])
    for folder in ("runs", "others", "runs"):
        if folder == "others":
            train.main(["--task", "copy", *common, "--out", str(tmp_path / "others")])
        evaluate.main([str(tmp_path / folder / "copy-asentmax-nape"), *test])
    assert "they are kept as copy-asentmax-nape-seed0.json.before" in capsys.readouterr().out
    assert len(list(results.glob("*.before"))) == 2, "what was kept is not overwritten either"
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "nothing"), *test])


def test_a_pool_with_too_few_pairs_is_reported() -> None:
    task = Mqmtar(pool=20)
    assert evaluate.fewer_pairs(task, 64) == ""
    remark = " (all 20 pairs of the pool, where 34 fit; --pool gives more, 65,536 at most)"
    assert evaluate.fewer_pairs(task, 256) == remark
    whole = replace(task, pool=65_536)
    assert evaluate.fewer_pairs(whole, 1 << 20) == " (all 65,536 pairs of the pool, where 139,810 fit)"
    assert evaluate.fewer_pairs(TASKS["copy"](), 256) == ""


def test_stop_after_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--task", "sort", "--device", "cpu", "--out", str(tmp_path), "--steps", "2", "--batch", "2", *SIZE_FLAGS]
    train.main([*command, "--stop-after", "0"])
    assert "the same command continues from there" in capsys.readouterr().out
    train.main(command)
    assert json.loads((tmp_path / "sort-asentmax-nape" / "seed0" / "run.json").read_text())["steps"] == 2


def test_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--profile", "--device", "cpu", "--out", str(tmp_path), "--batch", "2", *SIZE_FLAGS])
    assert "aten::mm" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TASKS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--task", name, "--help"])
    shown = capsys.readouterr().out
    assert "--min-length" in shown and "Samples with a large loss are chosen" in shown


STUB = """#!{python}
# Stands for the interpreter in mqmtar.sh: records the modules that it runs, and writes what a run would.
import json, os, sys
from pathlib import Path
if sys.argv[1] == "-c":
    script, sys.argv = sys.argv[2], ["-c", *sys.argv[3:]]
    exec(script)
    sys.exit()
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(sys.argv[2:]) + chr(10))
if sys.argv[2].endswith("train"):
    given = dict(zip(sys.argv[3:], sys.argv[4:]))
    name = f"mqmtar-{{given['--method']}}-nape-{{given['--name']}}"
    folder = Path(given["--out"]) / name / f"seed{{given['--seeds']}}"
    folder.mkdir(parents=True)
    e = json.loads(os.environ["ERRORS"]).get(given["--seeds"], 1.0)
    (folder / "run.json").write_text(json.dumps({{"given_up": e is None, "validations": [{{"e": e}}] if e else []}}))
"""


def mqmtar(
    tmp_path: Path, *arguments: str, errors: dict[int, float | None] | None = None, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """mqmtar.sh with runs that take no time: how it ended, and the modules that it ran with their arguments."""
    tmp_path.mkdir(exist_ok=True)
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    calls.write_text("")
    variables = {"PYTHON": str(stub), "CALLS": str(calls), "ERRORS": json.dumps(errors or {}), **environment}
    done = subprocess.run(
        ["bash", "recipes/synthetic/mqmtar.sh", *arguments],
        cwd=ROOT,
        env={**os.environ, "RUNS": str(tmp_path / "runs"), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, [json.loads(line) for line in calls.read_text().splitlines()]


@pytest.mark.parametrize("distribution", ["own", "paper", "both"])
def test_mqmtar_makes_its_runs(distribution: str, tmp_path: Path) -> None:
    """First runs until one is good, then the further ones from it, with flags that train.py takes; then the test."""
    done, calls = mqmtar(tmp_path, distribution, "0", errors={0: 1e-4, 100: 1e-5}, EVALUATE_FLAGS="--samples 4")
    assert done.returncode == 0, done.stderr
    modules = [module.rpartition(".")[2] for module, *_ in calls]
    assert modules == ["train"] * (4 if distribution == "both" else 3) + ["evaluate"]
    parsed = [train.parse(arguments) for _, *arguments in calls[:-1]]
    seeds = [flags.seeds for flags, *_ in parsed]
    assert seeds == [[0], [100], [0], [0]][: len(seeds)]
    tasks, settings = [task for _, task, _ in parsed], [one for *_, one in parsed]
    base = "own" if distribution == "own" else "paper"
    starts = [Path(one.start_from).relative_to(tmp_path / "runs") if one.start_from else None for one in settings]
    further = [Path(f"mqmtar-asentmax-nape-{base}-first/seed100"), Path("mqmtar-asentmax-nape-paper/seed0")]
    assert starts == [None, None, *further][: len(starts)]
    assert [one.tries for one in settings] == [1, 1, 2, 1][: len(settings)]
    assert settings[0].hard_candidates == (1 if distribution == "own" else 4)
    assert settings[2].head_drop == 0.75 and settings[2].alibi_window == (0 if distribution == "own" else 16)
    assert tasks[-1].swapped == (0.0 if distribution == "paper" else 0.2)
    assert calls[-1][1:] == [str(tmp_path / "runs" / f"mqmtar-asentmax-nape-{distribution}"), "--samples", "4"]


def test_mqmtar_continues_the_best_run_and_says_what_is_wrong(tmp_path: Path) -> None:
    done, calls = mqmtar(tmp_path, "paper", "5", errors={5: 3e-4, 105: None, 205: 2e-4}, TRIES="3", METHOD="softmax")
    assert done.returncode == 0 and "first run of seed 105: e = inf (good: below 5e-5)" in done.stdout
    assert train.parse(calls[3][1:])[2].start_from.endswith("mqmtar-softmax-nape-paper-first/seed205")
    _, calls = mqmtar(tmp_path / "a", "paper", "0", FIRST_ONLY="1")
    assert len(calls) == 1
    done, _ = mqmtar(tmp_path / "b", "paper", "0", errors={0: None}, TRIES="1")
    assert done.returncode == 1 and "no first run of seed 0 left the plateau (tries: 1)" in done.stderr
    for arguments, variables, message in (
        (("mine",), {}, "expected own, paper or both, got mine"),
        (("paper", "0", "1"), {}, "expected a distribution and one seed, got paper 0 1"),
        (("paper", "0"), {"GOOD": "little"}, "expected a number for GOOD, got little"),
    ):
        done, _ = mqmtar(tmp_path / "c", *arguments, **variables)
        assert done.returncode == 2 and message in done.stderr
    shown = mqmtar(tmp_path / "d", "--help")[0].stdout
    assert shown.startswith("Trains a model on MQMTAR in two runs") and "MORE_MINUTES" in shown and "set -" not in shown


@pytest.mark.slow
def test_mqmtar_with_real_runs(tmp_path: Path) -> None:
    flags = " ".join([*SIZE_FLAGS, "--no-compile --minutes 0.005 --batch 8 --validate-samples 4 --validate-multiple 1"])
    done = subprocess.run(
        ["bash", "recipes/synthetic/mqmtar.sh", "paper", "0"],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "RUNS": str(tmp_path / "runs"),
            "FLAGS": f"{flags} --plateau 100 --log-every 1",
            "EVALUATE_FLAGS": f"--multiples 1 --samples 4 --results {tmp_path / 'results'}",
            "TRIES": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "results" / "mqmtar-asentmax-nape-paper-seed0.json").read_text())["run"]
    assert run["track"] == "paper" and run["started_from"]["samples"] > 0 and run["settings"]["alibi_window"] == 16


def test_ablations_run_once_and_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[2:] == ["paper", "0"] and env["FIRST_ONLY"] == "1" and env["FIRST_FLAGS"] == ""
        flags = env["FLAGS"].split()
        _, _, settings = train.parse(flags)
        made.append(env["FLAGS"])
        folder = Path(env["RUNS"]) / f"mqmtar-asentmax-nape-{flags[flags.index('--name') + 1]}" / "seed0"
        summary = {"settings": {"minutes": float(env["MINUTES"])}, "header": {"commit": "abc"}, "samples": 100}
        summary |= {"seconds": 1.0, "samples_per_second": 100.0, "left_plateau": {"samples": 50_000}}
        summary["validations"] = [{"e": settings.jitter * 1e-6, "e_interval": [0.0, 1e-5]}]  # type: ignore[assignment]
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "run.json").exists():
            (folder / "run.json").write_text(json.dumps(summary))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(ablations.subprocess, "run", run)
    command = ["--minutes", "0.01", "--samples", "4", "--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    with pytest.raises(SystemExit):
        ablations.main([*command, "--report"])
    ablations.main([*command, "--only", "base", "no jitter"])
    file = tmp_path / "results.json"
    variants = json.loads(file.read_text())["variants"]
    assert set(variants) == {"base", "no jitter"} and set(variants["base"]) == {"0"}
    assert variants["no jitter"]["0"]["flags"] == "--jitter 1" and variants["base"]["0"]["header"]["commit"] == "abc"
    ablations.main([*command, "--only", "base"])
    assert len(made) == 2 and all("--hard-candidates 1" in flags for flags in made)
    with pytest.raises(SystemExit):
        ablations.main([*command, "--minutes", "0.02", "--only", "delta 0"])
    assert "has runs with minutes 0.01: give the same, or another --results" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match=r"has a run of 0.01 minutes, not 0.02: give another --out"):
        ablations.main([*command, "--results", str(tmp_path / "others"), "--minutes", "0.02", "--only", "base"])
    variants["gone"] = {"0": {**variants["base"]["0"], "flags": "--gone", "validation": None, "left_plateau": None}}
    file.write_text(json.dumps({**json.loads(file.read_text()), "variants": variants}))
    ablations.main([*command, "--report"])
    lines = file.with_suffix(".md").read_text().splitlines()
    assert lines[4].startswith("| variant | flags | seed 0: e x 1e6 | plateau left at")
    assert "| gone† | `--gone` | plateau not left | never |" in lines[8] and "lab-notebook" in lines[10]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        ablations.main(["--only", "nothing"])
    assert "expected some of base, no corrupted answers" in capsys.readouterr().err


def test_every_ablation_is_a_run_that_can_be_made() -> None:
    """train.py knows the flags, and they change a setting."""
    base = "--jitter 0.4 --key-noise 0.3 --corrupt 0.5 --ease-in 1500 --batch 512 --lr 5e-4"
    parsed = [train.parse(f"{base} {flags}".split()) for flags in ablations.VARIANTS.values()]
    seen: set[tuple[Any, RunSettings]] = {(task, settings) for _, task, settings in parsed}
    assert len(seen) == len(ablations.VARIANTS)


def _echo(name: str, minutes: float = 1.0, then: str = "true") -> Job:
    return Job(name, minutes, f'echo "$NAME on $CUDA_VISIBLE_DEVICES" >> "$OUT/ran"; test -n "$PYTHON" && {then}')


def test_jobs_run_once_and_failures_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = [_echo("a-0"), _echo("a-1", then="echo why >&2; false"), _echo("b", minutes=90), _echo("c")]
    monkeypatch.setattr(suite, "jobs", lambda: known)
    with pytest.raises(SystemExit) as stopped:
        suite.main(["--out", str(tmp_path), "--gpus", "3,5", "--minutes", "60"])
    assert stopped.value.code == 1
    shown = capsys.readouterr()
    states = {line.split()[0]: line.split()[1] for line in shown.out.splitlines() if line.split()[0] in "a-0 a-1 c"}
    assert states == {"a-0": "done", "a-1": "failed", "c": "done"} and "not started" in shown.out
    assert "failed: a-1" in shown.err and (tmp_path / "log" / "a-1.log").read_text() == "why\n"
    ran = (tmp_path / "ran").read_text().splitlines()
    assert sorted(line.split()[0] for line in ran) == ["a-0", "a-1", "c"]
    assert {line.split()[-1] for line in ran} <= {"3", "5"}

    monkeypatch.setattr(suite, "jobs", lambda: [_echo("a-0"), _echo("a-1"), _echo("c")])
    suite.main(["--out", str(tmp_path), "--gpus", "3", "--only", "c", "a"])
    assert (tmp_path / "ran").read_text().splitlines()[3:] == ["a-1 on 3"], "the others were done"
    with pytest.raises(SystemExit):
        suite.main(["--out", str(tmp_path), "--only", "nothing"])
    assert "no job's name begins so" in capsys.readouterr().err


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal. A background job of a shell, as these tests may be, and its children ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_no_job_follows_one_that_was_interrupted(tmp_path: Path) -> None:
    known = [_echo("a", then="kill -INT $$"), _echo("b")]
    outcomes = suite.run(known, tmp_path, ["0"], 60)
    assert [outcome.state for outcome in outcomes] == ["failed", "not started"]
    assert [outcome.state for outcome in suite.run(known[1:], tmp_path, ["0"], 60)] == ["done"]


def test_every_job_is_a_command_that_can_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    known = suite.jobs()
    assert len({job.name for job in known}) == len(known)
    assert sum("ablation" in job.name for job in known) == 3 * len(ablations.VARIANTS)
    suite.main(["--list", "--only", "sort"])
    assert "sort-0" in capsys.readouterr().out
    for job in known:
        for part in job.command.split(" && "):
            words = shlex.split(part)
            if "-m" not in words:
                assert (ROOT / next(word for word in words if word.startswith("recipes/"))).exists()
                continue
            module, *flags = words[words.index("-m") + 1 :]
            assert (ROOT / f"{module.replace('.', '/')}.py").exists()
            if module.endswith("train"):
                train.parse(flags)
