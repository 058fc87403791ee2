"""All results again: jobs on GPUs, what is there already, what fails."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.synthetic import suite, train
from recipes.synthetic.ablations import variants_of
from recipes.synthetic.suite import Job


def _echo(name: str, minutes: float = 1.0, then: str = "true") -> Job:
    return Job(name, minutes, f'echo "$NAME on $CUDA_VISIBLE_DEVICES" >> "$OUT/ran"; test -n "$PYTHON" && {then}')


def test_jobs_run_once_and_what_failed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = [_echo("a-0"), _echo("a-1", then="echo why >&2; false"), _echo("b", minutes=90), _echo("c")]
    monkeypatch.setattr(suite, "jobs", lambda: known)
    command = ["--out", str(tmp_path), "--gpus", "3,5", "--minutes", "60"]
    with pytest.raises(SystemExit) as stopped:
        suite.main(command)
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
    """Ctrl-C as in a terminal: a shell's background job, as these tests may be, and all that it starts ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_no_job_follows_one_that_was_interrupted(tmp_path: Path) -> None:
    known = [_echo("a", then="kill -INT $$"), _echo("b")]
    outcomes = suite.run(known, tmp_path, ["0"], 60)
    assert [outcome.state for outcome in outcomes] == ["failed", "not started"]
    assert [outcome.state for outcome in suite.run(known[1:], tmp_path, ["0"], 60)] == ["done"]


def test_every_job_is_a_command_that_its_program_takes(capsys: pytest.CaptureFixture[str]) -> None:
    known = suite.jobs()
    assert len({job.name for job in known}) == len(known)
    assert sum("ablation" in job.name for job in known) == 3 * len(variants_of("paper"))
    suite.main(["--list", "--only", "sort"])
    assert "sort-0" in capsys.readouterr().out
    for job in known:
        for part in job.command.split(" && "):
            words = shlex.split(part)
            script = next(word for word in words if word.startswith("recipes/"))
            assert (Path(__file__).parents[2] / script).exists()
            if script.endswith("train.py"):
                flags = words[words.index(script) + 1 :]
                train.parse(flags)
