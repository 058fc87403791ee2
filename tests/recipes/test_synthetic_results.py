"""The synthetic tasks' command lines, from training to tables, figures and model cards."""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from recipes.synthetic import ablations, evaluate, model_card, report, train
from recipes.synthetic.settings import RunSettings, add_flags, from_flags
from recipes.synthetic.tasks import TASKS, Mqmtar
from recipes.synthetic.trainer import Trainer

from small_tasks import CPU, SIZE_FLAGS, small, trained


def test_train_evaluate_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, results = tmp_path / "runs", tmp_path / "results"
    common = ["--device", "cpu", "--out", str(runs), "--steps", "2", "--batch", "4", "--log-every", "1", *SIZE_FLAGS]
    train.main(["--task", "mqmtar", "--seeds", "0", "1", "--corrupt", "0.5", *common])
    train.main(["--task", "mqmtar", "--method", "softmax", "--near-misses", "0.3", "--name", "near", *common])
    train.main(["--task", "copy", "--positions", "rope", *common])
    train.main(["--task", "copy", "--positions", "rope", *common])
    assert "finished already" in capsys.readouterr().out
    test = ["--device", "cpu", "--samples", "3", "--results", str(results)]
    for command, multiples in (("first.py", ["1"]), ("second.py", ["1", "2"])):
        monkeypatch.setattr(sys, "argv", [command])
        evaluate.main([str(runs), "--multiples", *multiples, *test])
    assert capsys.readouterr().out.count(" at 1x") == 4

    files = sorted(file.name for file in results.glob("*.json"))
    assert len(files) == 4 and "mqmtar-asentmax-nape-seed1.json" in files
    content = json.loads((results / "mqmtar-asentmax-nape-seed1.json").read_text())
    assert [entry["multiple"] for entry in content["lengths"]] == [1, 2]
    assert content["evaluation"]["command"] == "python first.py; python second.py"
    assert content["run"]["samples"] == 8 and content["run"]["header"]["versions"]["torch"] == torch.__version__
    assert {"e", "e_interval", "interval", "pairs"} <= set(content["lengths"][0])

    only = [str(runs / "mqmtar-softmax-nape-near"), "--multiples", "1", *test]
    evaluate.main([*only, "--pool", "400"])
    evaluate.main([*only, "--pool", "400"])
    assert capsys.readouterr().out.count(" at 1x") == 1, "measured again with another pool, but not with the same one"
    (entry,) = json.loads((results / "mqmtar-softmax-nape-near-seed0.json").read_text())["lengths"][:1]
    assert entry["pool"] == 400
    with pytest.raises(ValueError, match="--pool is for MQMTAR's keys and values; this run learnt copy"):
        evaluate.main([str(runs / "copy-asentmax-rope"), "--pool", "400", *test])

    train.main(["--task", "copy", "--positions", "rope", *common, "--out", str(tmp_path / "others")])
    assert not list(results.glob("*.before"))
    evaluate.main([str(tmp_path / "others"), "--multiples", "1", *test])
    assert "they are kept as copy-asentmax-rope-seed0.json.before" in capsys.readouterr().out
    (aside,) = results.glob("*.before")
    assert [len(json.loads(file.read_text())["lengths"]) for file in (aside, aside.with_suffix(""))] == [2, 1]
    evaluate.main([str(runs / "copy-asentmax-rope"), "--multiples", "1", *test])
    assert len(list(results.glob("*.before"))) == 2, "what was kept is not overwritten either"

    report.main(["--results", str(results)])
    text = (results / "report.md").read_text()
    assert text.index("mqmtar, trained on the paper's") < text.index("mqmtar, trained on a distribution of our own")
    assert (
        "- asentmax + nape (a): batch 4, corrupt 0.5" in text
        and "**asentmax + nape (a)**" in text
        and "| seed 1 |" in text
        and "| asentmax, paper |" in text
    )
    assert (results / "mqmtar-paper.png").stat().st_size > 1000 and (results / "mqmtar-own.png").exists()


def test_a_pool_with_too_few_pairs_is_said() -> None:
    task = Mqmtar(pool=20)
    assert evaluate.fewer_pairs(task, 64) == ""
    remark = " (20 pairs, all of its pool, where 34 fit; --pool gives more, 65,536 at most)"
    assert evaluate.fewer_pairs(task, 256) == remark
    assert (
        evaluate.fewer_pairs(replace(task, pool=65_536), 1 << 20)
        == " (65,536 pairs, all of its pool, where 139,810 fit)"
    )
    assert evaluate.fewer_pairs(TASKS["copy"](), 256) == ""


def test_a_run_begins_with_another_s_weights(tmp_path: Path) -> None:
    """And says so, and counts what that one took; a table's track stays that of both."""
    task = small("mqmtar")
    first = trained(tmp_path / "first", replace(task, near_misses=0.5), RunSettings(steps=2, batch=8))
    start = tmp_path / "first" / "seed3"
    (start / "run.json").write_text(json.dumps(first.summary()))
    settings = RunSettings(steps=1, batch=8, start_from=str(start))
    second = Trainer(task, settings, 0, tmp_path / "second", CPU)
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, first.model.state_dict()[name])
    plain = Trainer(task, RunSettings(steps=1), 0, tmp_path, CPU)
    assert not torch.equal(second.data.get_state(), plain.data.get_state())
    second.run()
    summary = second.summary()
    assert summary["track"] == "own" and summary["samples"] == 8 and summary["started_from"]["samples"] == 16
    entry = {"multiple": 1, "samples": 4, "exact_match": 0.5, "e": 0.1, "queries": 4, "queries_wrong": 2, "pairs": 8}
    result = {"run": {**summary, "header": {"device": {"name": "CPU"}}}, "lengths": [entry]}
    (group,) = report.grouped([result])
    assert group.changed.index("near misses 0.5") < group.changed.index("], then")
    assert "0.0" in report.markdown([group])
    hotter = copy.deepcopy(result)
    hotter["run"]["settings"] |= {"minutes": 2.0, "warmup": 7}
    hotter["run"]["started_from"]["settings"]["head_drop"] = 0.5
    longer = copy.deepcopy(result)
    longer["run"]["started_from"]["settings"]["minutes"] = 2.0
    assert len(report.grouped([result, longer])) == 2, "settings are apart by the minutes of every run"
    rate = copy.deepcopy(result)
    rate["run"]["task_settings"]["lr"] *= 2
    (other,), (alike,) = report.grouped([longer]), report.grouped([rate])
    assert report.trained_alike(group, alike) and not report.trained_alike(group, other)
    text = report.markdown(report.grouped([result, hotter]))
    assert text.count("near misses 0.5") == 1, "one row's settings in full, the other's next to them"
    assert "as asentmax + nape (a), but run 1: head drop 0.0; run 2: minutes 0.0, warmup 500" in text
    with pytest.raises(FileNotFoundError, match="start-from takes the folder of a finished seed"):
        Trainer(task, replace(settings, start_from=str(tmp_path)), 0, tmp_path / "third", CPU)
    with pytest.raises(ValueError, match="was trained on mqmtar, this run is to learn copy"):
        Trainer(small("copy"), settings, 0, tmp_path / "third", CPU)
    with pytest.raises(ValueError, match="has other method and positions than this one"):
        other = replace(settings, method="softmax", positions="rope")
        Trainer(task, other, 0, tmp_path / "third", CPU)
    with pytest.raises(ValueError, match="which start-from gives"):
        replace(settings, gamma_start=0.1)
    with pytest.raises(ValueError, match="has other weights"):
        Trainer(replace(task, hidden=32), settings, 0, tmp_path / "third", CPU)


def test_the_best_of_two_settings_and_the_time_that_their_minutes_lack() -> None:
    """As many right at the longest length: the next one decides. A first run of seed 201 came after two others."""

    def group(lr: float, at_4: float, **run: Any) -> report.Group:
        entries = ({"multiple": m, "samples": 100, "exact_match": share} for m, share in ((4, at_4), (16, 0.9)))
        return report.Group("mqmtar", "paper", "asentmax", "nape", f"lr {lr}", ({"run": run, "lengths": [*entries]},))

    none_holds = [group(0.1, 0.2), group(0.2, 0.3)]
    for one in none_holds:
        one.results[0]["lengths"][1]["exact_match"] = 0.0
    assert report.best(none_holds) is report.best(none_holds[::-1]) is none_holds[1]
    earlier = {"seed": 201, "settings": {"minutes": 1.5}}
    last = {"seed": 1, "settings": {"minutes": 4.0}, "started_from": {**earlier, "seed": 1, "started_from": earlier}}
    worse, better = group(0.1, 0.8, seed=0, settings={"minutes": 2.0}), group(0.2, 0.9, **last)
    assert report.best([worse, better]) is report.best([better, worse]) is better
    assert report.first_run(last) is earlier and report.first_run(earlier) is earlier
    runs = [group.results[0]["run"] for group in (worse, better)]
    assert report.in_vain(runs) == " (without 2 first runs, 3.0 minutes, whose validation was worse)"
    assert report.in_vain(runs[:1]) == ""
    counted = {"seed": 1, "settings": {"minutes": 4.0, "tries": 4}, "started_from": {**earlier, "seed": 1}}
    assert report.in_vain([counted]) == " (without 3 first runs, 4.5 minutes, whose validation was worse)"


def test_what_is_compared_was_trained_alike() -> None:
    def group(method: str, share: float, lr: float, batch: int) -> report.Group:
        run = {"task": "copy", "seed": 0, "settings": {"minutes": 1.0, "batch": batch}, "task_settings": {"lr": lr}}
        lengths = [{"multiple": 1, "samples": 100, "exact_match": share}]
        return report.Group("copy", "paper", method, "nape", "", ({"run": run, "lengths": lengths},))

    ours, alike = group("asentmax", 0.8, 0.1, 512), group("softmax", 0.7, 0.2, 512)
    others = [group("asentmax", 0.6, 0.1, 256), group("softmax", 0.9, 0.1, 256), group("softmax", 0.6, 0.1, 512)]
    topk = group("topk", 0.5, 0.1, 256)
    assert report.compared([others[0], ours, *others[1:], alike, topk]) == [ours, alike, topk]
    assert report.compared(others[1:]) == [others[1]], "nothing of ours beside them: the best one"


def test_figures_tell_a_baseline_that_was_trained_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """By minutes and by samples: in the same time or over the same samples methods differ by their speed."""

    def group(method: str, minutes: float, samples: int) -> report.Group:
        timing = {"task": "copy", "seconds": 60 * minutes, "samples": samples}
        run = {**timing, "settings": {"minutes": minutes}, "task_settings": {"max_length": 64}}
        lengths = [{"multiple": m, "samples": 100, "exact_match": 0.5} for m in (1, 4)]
        return report.Group("copy", "paper", method, "nape", "", ({"run": run, "lengths": lengths},))

    drawn = {}
    monkeypatch.setattr(report, "save_figure", lambda drawing, file: drawn.update({file.name: drawing}))
    groups = [group("asentmax", 10, 100), group("entmax", 5, 50), group("softmax", 5, 95), group("ssmax", 10, 50)]
    report.figure(groups, Path("copy.png"))
    (axes,) = drawn["copy.png"].axes
    dashed = {str(line.get_label()): line.get_linestyle() for line in axes.lines if line.get_marker() == "o"}
    assert dashed == {
        "asentmax + nape": "-",
        "entmax + nape: 5.0 minutes, not 10.0": "--",
        "softmax + nape": "-",
        "ssmax + nape": "-",
    }


def mqmtar_environment(tmp_path: Path) -> dict[str, str]:
    """What mqmtar.sh takes from the environment, for runs of a second."""
    flags = " ".join([*SIZE_FLAGS, "--no-compile --minutes 0.01 --batch 8 --validate-samples 4 --validate-multiple 1"])
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RUNS": str(tmp_path / "runs"),
        "FLAGS": f"{flags} --plateau 100 --log-every 1",
        "EVALUATE_FLAGS": f"--multiples 1 --samples 4 --results {tmp_path / 'results'}",
        "TRIES": "2",
    }


def mqmtar(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(train.__file__).with_name("mqmtar.sh")
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, cwd=script.parents[2], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("distribution", ["own", "paper", "both"])
def test_mqmtar_in_its_runs(distribution: str, tmp_path: Path) -> None:
    """mqmtar.sh from its first run to its test, in seconds."""
    environment = mqmtar_environment(tmp_path)
    if distribution == "own":
        environment["GOOD"] = "2"
    elif distribution == "both":
        environment["FIRST_FLAGS"] = "--hard-candidates 1"
    done = mqmtar(environment, distribution, "0")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results" / f"mqmtar-asentmax-nape-{distribution}-seed0.json").read_text())
    earlier = result["run"]["started_from"]
    assert result["run"]["track"] == ("paper" if distribution == "paper" else "own") and earlier["samples"] > 0
    if distribution == "both":
        assert (earlier["track"], earlier["seed"], earlier["settings"]["alibi_window"]) == ("paper", 0, 16)
        earlier = earlier["started_from"]
    found = re.findall(r"first run of seed (\d+): e = (\S+) \(good: below (\S+)\)", done.stdout)
    errors = {int(seed): float(e) for seed, e, _ in found}
    assert {good for *_, good in found} == {"2" if distribution == "own" else "5e-5"}
    assert set(errors) == ({0} if distribution == "own" else {0, 100}), "e is 1 at most, and not below 5e-5 so soon"
    assert earlier["seed"] == min(errors, key=errors.__getitem__) and earlier["started_from"] is None
    assert earlier["settings"]["hard_candidates"] == (4 if distribution == "paper" else 1)
    assert report.in_vain([result["run"]]).count("1 first run,") == len(errors) - 1
    assert result["run"]["settings"]["head_drop"] == 0.75
    assert result["run"]["settings"]["hard_candidates"] == (1 if distribution == "own" else 4)
    assert result["run"]["settings"]["alibi_window"] == (0 if distribution == "own" else 16)
    assert result["run"]["task_settings"]["swapped"] == (0.0 if distribution == "paper" else 0.2)


def test_mqmtar_says_what_it_takes_and_what_is_wrong(tmp_path: Path) -> None:
    environment = mqmtar_environment(tmp_path)
    shown = mqmtar(environment, "--help").stdout
    assert shown.startswith("MQMTAR in two runs") and "MORE_MINUTES" in shown and "set -" not in shown
    never = {**environment, "FLAGS": f"{environment['FLAGS']} --give-up 8 --plateau 0", "TRIES": "1"}
    done = mqmtar(never, "paper", "0")
    assert done.returncode == 1 and "no first run of seed 0 left the plateau (tries: 1)" in done.stderr
    refused = mqmtar(environment, "mine")
    assert refused.returncode == 2 and "expected own, paper or both, got mine" in refused.stderr
    refused = mqmtar({**environment, "GOOD": "little"}, "paper", "0")
    assert refused.returncode == 2 and "expected a number for GOOD, got little" in refused.stderr
    refused = mqmtar(environment, "paper", "0", "1")
    assert refused.returncode == 2 and "expected a distribution and one seed, got paper 0 1" in refused.stderr


def test_ablations_run_once_and_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRST_FLAGS", "--jitter 0.7 --hard-candidates 2")  # mqmtar.sh's, not an ablation's
    flags = " ".join([*SIZE_FLAGS, "--no-compile --batch 8 --validate-multiple 1 --plateau 100 --log-every 1"])
    command = ["paper", "--minutes", "0.01", "--samples", "4", "--flags", flags]
    command += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    with pytest.raises(SystemExit):
        ablations.main([*command, "--report"])
    ablations.main([*command, "--only", "base", "no jitter"])
    file = tmp_path / "results" / "paper-asentmax.json"
    variants = json.loads(file.read_text())["variants"]
    assert list(variants) == ["base", "no jitter"] and set(variants["base"]) == {"0"}
    assert variants["base"]["0"]["settings"]["jitter"] == 0.4 and variants["no jitter"]["0"]["settings"]["jitter"] == 1
    assert variants["base"]["0"]["settings"]["hard_candidates"] == 1
    assert variants["base"]["0"]["validation"]["samples"] == 4 and variants["base"]["0"]["header"]["versions"]
    before = file.stat().st_mtime_ns
    ablations.main([*command, "--only", "base"])
    assert file.stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        ablations.main([*command, "--minutes", "0.02", "--only", "delta 0"])
    assert "has runs with minutes 0.01: give the same, or another --results" in capsys.readouterr().err
    elsewhere = ["--results", str(tmp_path / "others"), "--minutes", "0.02", "--only", "base"]
    with pytest.raises(RuntimeError, match=r"holds a run of 0.01 minutes, not 0.02: give another --out"):
        ablations.main([*command, *elsewhere])
    variants["no jitter"]["0"] |= {"validation": None, "left_plateau": None}
    file.write_text(json.dumps({**json.loads(file.read_text()), "variants": variants}))
    ablations.main([*command, "--report"])
    lines = file.with_suffix(".md").read_text().splitlines()
    assert lines[2].startswith("| variant | flags | seed 0: e x 1e6 | plateau left at")
    assert "| no jitter | `--jitter 1` | plateau not left | never |" in lines[5]
    assert file.with_suffix(".png").stat().st_size > 10_000
    capsys.readouterr()
    with pytest.raises(SystemExit):
        ablations.main(["paper", "--only", "near misses of keys"])
    assert "expected some of base, no corrupted answers" in capsys.readouterr().err


@pytest.mark.parametrize("distribution", ["own", "paper"])
def test_every_ablation_is_a_run_that_can_be_made(distribution: str) -> None:
    """train.py knows the flags, and they change a setting."""
    seen = []
    for name in ablations.variants_of(distribution):
        parser = argparse.ArgumentParser()
        for settings_class in (RunSettings, Mqmtar):
            add_flags(parser, settings_class, "flags")
        base = "--jitter 0.4 --key-noise 0.3 --corrupt 0.5 --ease-in 1500 --batch 512 --lr 5e-4"
        parsed = parser.parse_args(f"{base} {ablations.VARIANTS[name]}".split())
        seen.append((from_flags(RunSettings, parsed), from_flags(Mqmtar, parsed)))
    assert len(set(seen)) == len(seen)


def test_the_card_of_the_model_that_holds_furthest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the results in the repository: metadata that the Hub reads, and the commands of both runs."""
    model_card.main(["--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "no card for max_retrieval-paper: AutoModel does not load" in said
    written, kept = (
        {file.name: file.read_text() for file in folder.iterdir()} for folder in (tmp_path, model_card.CARDS)
    )
    assert written == kept, "run recipes/synthetic/model_card.py"
    made = ModelCard.load(tmp_path / "mqmtar-paper.md")
    assert made.data.license == "apache-2.0" and made.data.library_name == "transformers"
    results = {result.dataset_config: result.metric_value for result in made.data.eval_results}
    assert results["1024x"] >= 0.915 and made.text.count("python recipes/synthetic/train.py") >= 2
    with pytest.raises(SystemExit):
        model_card.main(["--results", str(tmp_path)])


def test_stop_after_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--task", "sort", "--device", "cpu", "--out", str(tmp_path), "--steps", "2", "--batch", "2", *SIZE_FLAGS]
    train.main([*command, "--stop-after", "0"])
    assert "goes on from there" in capsys.readouterr().out
    train.main(command)
    assert json.loads((tmp_path / "sort-asentmax-nape" / "seed0" / "run.json").read_text())["steps"] == 2


def test_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--profile", "--device", "cpu", "--out", str(tmp_path), "--batch", "2", *SIZE_FLAGS])
    assert "aten::mm" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TASKS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--task", name, "--help"])
    assert "--min-length" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's MQMTAR model, compiled, with everything on; then 65,536 tokens."""
    runs, results = tmp_path / "runs", tmp_path / "results"
    everything = "--corrupt 0.5 --jitter 0.5 --hard-candidates 2 --near-misses 0.3 --one-letter 0.1 --max-queries 8"
    for method in ("asentmax", "ssmax"):
        train.main(f"--method {method} --steps 30 --log-every 10 --compile {everything} --out {runs}".split())
    losses = [entry["loss"] for entry in json.loads(next(runs.rglob("run.json")).read_text())["log"]]
    assert losses[-1] < losses[0]
    evaluate.main(
        [
            str(runs),
            "--multiples",
            "1",
            "64",
            "1024",
            "--samples",
            "8",
            "--long-samples",
            "2",
            "--results",
            str(results),
        ]
    )
    assert "at 1024x: 0.0% of 2 exact" in capsys.readouterr().out
