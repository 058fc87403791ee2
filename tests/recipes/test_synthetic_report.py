"""Tables, figures, the README's section and model cards from results files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from recipes.synthetic import ablations, figures, groups, model_card, report
from recipes.synthetic.evaluate import RESULTS

CHAIN = {"seed": 201, "settings": {"minutes": 1.5}}


def result(method: str = "asentmax", share: float = 0.5, lr: float = 0.1, **run: Any) -> dict[str, Any]:
    """The content of a results file."""
    settings = {"method": method, "positions": "nape", "steps": 0, "minutes": 1.0, **run.pop("settings", {})}
    base = {
        "task": "copy", "track": "paper", "seed": 0, "samples": 10, "seconds": 60.0,
        "header": {"device": {"name": "CPU"}}, "task_settings": {"lr": lr, "max_length": 64},
    }  # fmt: skip
    entry = {"multiple": 1, "samples": 100, "exact_match": share, "interval": [share, share]}
    entry |= {"e": 0.1, "queries": 4, "queries_wrong": 2, "pairs": 8}
    return {"run": {**base, "settings": settings, **run}, "lengths": [entry, {**entry, "multiple": 4}]}


def group(*results: dict[str, Any]) -> groups.Group:
    """The one group of these results."""
    (made,) = groups.grouped(list(results))
    return made


def test_settings_are_told_apart_by_every_run_of_a_chain() -> None:
    one = result(settings={"batch": 8}, started_from={**result(lr=0.2)["run"], "task_settings": {"lr": 0.2}})
    assert group(one).changed == "[lr 0.2], then, batch 8, lr 0.1"
    longer, rate, other = (copy.deepcopy(one) for _ in range(3))
    longer["run"]["started_from"]["settings"]["minutes"] = 2.0
    assert len(groups.grouped([one, longer])) == 2
    rate["run"]["task_settings"]["lr"] *= 2
    other["run"]["started_from"]["settings"]["head_drop"] = 0.5
    other["run"]["settings"]["warmup"] = 7
    assert groups.trained_alike(group(one), group(rate)), "learning rates are each method's own"
    assert not groups.trained_alike(group(one), group(longer))
    assert groups.differing(group(other), group(one)) == "run 1: head drop 0.5; run 2: warmup 7"
    deleted = result(settings={"beta2": 0.95}, caveat="deleted option")
    assert group(deleted).changed == "beta2 0.95, lr 0.1"
    assert "tag `lab-notebook`" in groups.caveats([group(deleted)], "findings.md")[0]


def test_the_best_of_two_settings() -> None:
    """Seeds come first; then what is right at the longest length, and at the next shorter one."""
    weak, strong = result(share=0.6, lr=0.1), result(share=0.9, lr=0.2)
    for one in (weak, strong):
        one["lengths"][1]["exact_match"] = 0.9
    assert groups.best([group(weak), group(strong)]) == group(strong)
    for one in (weak, strong):
        one["lengths"][1]["exact_match"] = 0.0
    assert groups.best([group(strong), group(weak)]) == group(strong)
    second = {**copy.deepcopy(weak), "run": {**weak["run"], "seed": 1}}
    assert groups.best([group(strong), group(weak, second)]) == group(weak, second)
    marked = copy.deepcopy(strong)
    marked["run"]["caveat"] = "deleted option"
    assert groups.best([group(marked), group(weak)]) == group(weak)


def test_what_is_compared_was_trained_alike() -> None:
    ours, alike = group(result(share=0.8)), group(result("softmax", 0.7, lr=0.2))
    others = [group(result(share=0.6, settings={"batch": 256})), group(result("softmax", 0.9, settings={"batch": 256}))]
    topk = group(result("topk", 0.5, settings={"batch": 256}))
    assert groups.compared([others[0], ours, others[1], alike, topk]) == [ours, alike, topk]
    assert groups.compared([others[1]]) == [others[1]], "without ASEntmax, the best one"


def test_the_time_of_first_runs_that_were_not_continued() -> None:
    """A first run of seed 201 came after two others; newer runs record their number."""
    last = {"seed": 1, "settings": {"minutes": 4.0}, "started_from": {**CHAIN, "seed": 1, "started_from": CHAIN}}
    single = {"seed": 0, "settings": {"minutes": 2.0}}
    assert groups.in_vain([single, last]) == " (without 2 first runs, 3.0 minutes, whose validation was worse)"
    assert groups.in_vain([single]) == ""
    counted = {"seed": 1, "settings": {"minutes": 4.0, "tries": 4}, "started_from": {**CHAIN, "seed": 1}}
    assert groups.in_vain([counted]) == " (without 3 first runs, 4.5 minutes, whose validation was worse)"


def test_figures_have_six_lines_at_most_and_mark_less_training() -> None:
    methods = ("softmax", "entmax", "ssmax", "adaptive_temperature", "topk", "stick_breaking")
    several = [group(result()), *(group(result(method)) for method in methods)]
    drawn = figures.lines(several, [result(seed=7)])
    names = [line.label.replace("\n", " ") for line in drawn]
    assert names[:3] == ["ASEntmax + NAPE", "ASEntmax + NAPE, a fresh seed (7)", "ASEntmax, published"]
    assert len(drawn) == figures.MOST_LINES and "top-k + NAPE" not in names
    less = [result("entmax", seconds=30.0, samples=5), result("softmax", seconds=30.0), result("ssmax", samples=5)]
    styles = {line.label: line.style for line in figures.lines([group(result()), *map(group, less)], [])}
    assert styles.pop("entmax + NAPE\n(0.5 minutes, not 1.0)") == "--" and styles.pop("ASEntmax, published") == ":"
    assert set(styles.values()) == {"-"}, "in the same time, or with as many samples, methods differ by their speed"


def test_figures_are_drawn_where_methods_differ(tmp_path: Path) -> None:
    same = [result(task="parity"), result("softmax", 0.52, task="parity")]
    (tmp_path / "a.json").write_text(json.dumps(same[0]))
    (tmp_path / "b.json").write_text(json.dumps(same[1]))
    report.main(["--results", str(tmp_path)])
    assert not list(tmp_path.glob("*.png")) and "## Parity, trained on" in (tmp_path / "report.md").read_text()
    same[1]["lengths"][1]["exact_match"] = 0.9
    (tmp_path / "b.json").write_text(json.dumps(same[1]))
    report.main(["--results", str(tmp_path)])
    assert (tmp_path / "parity-paper.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path / "nothing")])


def test_the_report_is_what_the_results_say() -> None:
    results, fresh = groups.read_results(RESULTS)
    text = report.markdown(groups.grouped(results), fresh)
    assert (RESULTS / "report.md").read_text() == text, "run python -m recipes.synthetic.report"
    (seed,) = fresh
    assert "75.5% at 1024x" in groups.fresh_seed_sentence(fresh) and groups.fresh_seed_sentence(fresh) in text
    assert seed["run"]["seed"] not in [run["seed"] for one in groups.grouped(results) for run in one.runs]
    for one in [*results, *fresh]:
        run = one["run"]
        assert "log" not in run and {"header", "settings", "task_settings", "samples", "seconds"} <= run.keys()
        assert run["header"]["command"] and run["header"]["commit"] and run["header"]["versions"]["torch"]
    ablation = json.loads((ablations.RESULTS / "results.json").read_text())
    assert ablations.table(ablation) in (ablations.RESULTS / "results.md").read_text(), "run ablations.py --report"


def test_model_cards_are_what_the_results_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their metadata are what the Hub reads, and they have the commands of all runs."""
    model_card.main(["--out", str(tmp_path)])
    assert "no card for max_retrieval-paper: AutoModel does not load" in capsys.readouterr().out
    written, kept = (
        {file.name: file.read_text() for file in folder.iterdir()} for folder in (tmp_path, model_card.CARDS)
    )
    assert written == kept, "run python -m recipes.synthetic.model_card"
    made = ModelCard.load(tmp_path / "mqmtar-paper.md")
    assert made.data.license == "apache-2.0" and made.data.library_name == "transformers"
    results = {one.dataset_config: one.metric_value for one in made.data.eval_results}
    assert results["1024x"] >= 0.915 and made.text.count("python -m recipes.synthetic.train") >= 2
    assert "75.5% at 1024x" in made.text and "75.5%" not in (tmp_path / "copy-paper.md").read_text()
    with pytest.raises(SystemExit):
        model_card.main(["--results", str(tmp_path)])
    poor = tmp_path / "poor"
    poor.mkdir()
    (poor / "one.json").write_text(json.dumps(result(share=0.5)))
    model_card.main(["--results", str(poor), "--out", str(tmp_path)])
    assert "no card for copy-paper: 50.0% at the training length, below 95%" in capsys.readouterr().out
