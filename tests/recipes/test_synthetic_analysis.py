"""Analyses of models of MQMTAR: the query-error law, the keys of wrong answers, the reach of heads with ALiBi."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from recipes.synthetic import train
from recipes.synthetic.analysis import law, mistakes, reach
from recipes.synthetic.measuring import wilson_interval
from recipes.synthetic.models import METHODS, build_model
from recipes.synthetic.tasks import Batch, Mqmtar

from small_tasks import SIZE_FLAGS, SMALL, decided


def test_likenesses_divide_the_other_words() -> None:
    words = torch.randint(3, 8, (40, 2), generator=torch.Generator().manual_seed(0))
    kinds = mistakes.likenesses(words, words)
    equal = (words[:, None] == words[None]).all(dim=-1)
    assert torch.equal(sum(kinds.values()) + equal.long(), torch.ones_like(equal, dtype=torch.int64))
    one = mistakes.likenesses(torch.tensor([[3, 4]]), torch.tensor([[4, 3]]))
    assert [name for name, alike in one.items() if alike] == ["swapped"]


def test_wrong_answers_are_assigned_to_keys() -> None:
    """Queries for the first pair get right answers, then those of pairs chosen for how their keys are like its key."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.arange(4, 20)
    keys = torch.stack([letters[:8], letters[8:]], dim=1)
    keys[1], keys[2], keys[3] = keys[0].flip(0), keys[0].clone(), keys[0].clone()
    keys[2, 1], keys[3, 0] = 30, 31  # swapped, same first, same second
    values = torch.stack([torch.arange(40, 48), torch.arange(50, 58)], dim=1)
    values[4, 0] = 40  # as the first pair's
    batch = SMALL._assembled(keys[None], values[None], 64, 32, generator)
    asked = batch.labels[0, :-1].view(-1, 3)[:, 2] == 50  # queries for the first pair
    assert mistakes.mistakes(SMALL, batch.labels, batch).total() == 0
    cases = [(1, "both letters", "swapped"), (2, "first letter", "first"), (3, "second letter", "second")]
    cases += [(4, "second letter, after the right first", "far"), (5, "both letters", "far")]
    for given, wrong, kind in cases:
        predicted = batch.labels.clone()
        words = predicted[0, :-1].view(-1, 3)
        words[asked, 1] = values[given, 0] if not wrong.startswith("second letter") else 40
        words[asked, 2] = values[given, 1] if wrong != "first letter" else 50
        counts = mistakes.mistakes(SMALL, predicted, batch)
        assert counts == {(wrong, kind): int(asked.sum())} and counts.total() > 0
    words[asked, 1:] = 70  # the value of no pair
    assert mistakes.mistakes(SMALL, predicted, batch) == {("both letters", "none"): int(asked.sum())}


def test_the_law_asks_for_every_key_as_a_test_does() -> None:
    contexts = SMALL.test_batch(3, 96, torch.Generator().manual_seed(0))  # 12 pairs
    read, follows, values = law.questions(SMALL, contexts, torch.Generator().manual_seed(1))
    assert follows.shape == (3, 3, 25) and values.shape == (3, 3, 4, 2)
    full = torch.cat([read[:, None].expand(-1, 3, -1), follows], dim=2)
    of_test, eos = contexts.inputs[:, :-1], contexts.inputs[0, -1]
    assert full.shape[2] == of_test.shape[1] and eos == SMALL.eos
    markers = (SMALL.QUERY, SMALL.sep)
    assert all(torch.equal(of_test == marker, full[:, 0] == marker) for marker in markers)
    starts = SMALL.key_starts(contexts.inputs)
    for row in range(3):
        pairs = {tuple(contexts.inputs[row, at + torch.tensor([0, 1, 3, 4])].tolist()) for at in starts[row]}
        keys = follows[row, :, :12].reshape(-1, 3)[:, 1:]
        assert {tuple(pair) for pair in torch.cat([keys, values[row].flatten(0, 1)], dim=1).tolist()} == pairs
        assert torch.equal(follows[row, :, 13:].reshape(3, 4, 3)[..., 1:], values[row])


@pytest.mark.parametrize("method", METHODS)
def test_the_law_sees_what_one_pass_sees(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values asked for are those that one pass over context, queries and answers gives, every third one altered."""
    model = decided(method)
    questions = law.questions

    def altered(task: Mqmtar, contexts: Batch, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        read, follows, values = questions(task, contexts, generator)
        full = torch.cat([read[:, None].expand(-1, follows.shape[1], -1), follows], dim=2)
        given = model(full.flatten(0, 1)).logits[:, -12:].argmax(-1).view(*values.shape[:3], 3)[..., :2].clone()
        given.view(-1, 2)[::3, 1] += 1
        return read, follows, given

    monkeypatch.setattr(law, "questions", altered)
    for tokens in (96, 3 * 96, 100 * 96):  # in memory at once
        entry = law.measure_law(model, SMALL, 96, 36, tokens_at_once=tokens)
        assert entry["queries_wrong"] == 12 and entry["queries"] == 36 and entry["contexts"] == 3
        assert entry["pairs"] == 12 and entry["e"] == 12 / 36 / 12
        assert entry["e_interval"][0] < entry["e"] < entry["e_interval"][1]
    with pytest.raises(ValueError, match="holds 1 pairs; it takes at least 4"):
        law.measure_law(model, SMALL, 8, 36)


def test_the_law_s_interval_allows_for_contexts_that_differ() -> None:
    alike, differing = [1, 1, 1, 1, 1, 1], [6, 0, 0, 0, 0, 0]
    low, high, effect = law.interval(alike, 100)
    assert (low, high) == wilson_interval(6, 600) and effect == 1
    low, high, effect = law.interval(differing, 100)
    assert effect == pytest.approx(6 / (100 * 0.01 * 0.99)) and high > wilson_interval(6, 600)[1]
    assert law.interval([0, 0], 100)[:2] == wilson_interval(0, 200)
    assert law.interval([3], 100)[:2] == wilson_interval(3, 100)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with a finished run of MQMTAR and one of Copy."""
    common = ["--device", "cpu", "--out", str(tmp_path), "--steps", "1", "--batch", "4", *SIZE_FLAGS]
    train.main(["--task", "mqmtar", *common])
    train.main(["--task", "copy", *common])
    return tmp_path


def test_the_law_of_a_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, folder = runs / "law.json", runs / "mqmtar-asentmax-nape"

    def ask(*multiples: int, queries: int = 8, of: Path = folder) -> list[tuple[int, int]]:
        lengths = [str(multiple) for multiple in multiples]
        flags = ["--queries", str(queries), "--device", "cpu", "--output", str(output)]
        law.main([str(of), "--multiples", *lengths, *flags])
        found = json.loads(output.read_text())["runs"][f"{of.name} seed0"]["lengths"]
        assert all(entry["header"]["seeds"] == [law.SEED] for entry in found), "each says what measured it"
        return [(entry["multiple"], entry["contexts"]) for entry in found]

    assert ask(1, 2, queries=20) == [(1, 3), (2, 2)]
    assert "mqmtar-asentmax-nape seed0 at 2x: " in capsys.readouterr().out
    assert ask(2, 1) == [(1, 1), (2, 1)]
    assert ask(4) == [(1, 1), (2, 1), (4, 1)], "the other lengths stay"
    output.with_suffix(".md").unlink()
    law.main(["--report", "--output", str(output)])
    assert "| 1x | 2x | 4x |" in output.with_suffix(".md").read_text()
    folder.rename(runs / "mine")
    assert ask(1, of=runs / "mine") == [(1, 1)], "a renamed folder is another model"
    with pytest.raises(SystemExit):
        law.main([str(runs / "copy-asentmax-nape"), "--device", "cpu", "--output", str(output)])
    assert "was trained on copy, but this analysis is for MQMTAR" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        law.main(["--output", str(output)])
    assert "there is no finished run below no folder" in capsys.readouterr().err
    file = runs / "mine" / "seed0" / "run.json"
    run = json.loads(file.read_text())
    file.write_text(json.dumps({**run, "header": {**run["header"], "date": "later"}}))
    assert ask(2, of=runs / "mine") == [(2, 1)]
    assert "has mine seed0 of another run, which is replaced" in capsys.readouterr().out
    file.write_text(json.dumps({**run, "given_up": True}))
    with pytest.raises(SystemExit):
        law.main([str(runs / "mine"), "--device", "cpu", "--output", str(runs / "other.json")])
    said = capsys.readouterr()
    assert "there is no model to ask" in said.out and "nothing to report: every run was given up" in said.err


def test_mistakes_of_a_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, run = runs / "mistakes.json", runs / "mqmtar-asentmax-nape" / "seed0"
    mistakes.main([str(run), "--multiple", "1", "--samples", "3", "--device", "cpu", "--output", str(output)])
    (row,) = json.loads(output.read_text())["results"]
    assert row["queries"] == 12 and row["wrong"] == sum(sum(kinds.values()) for kinds in row["mistakes"].values())
    assert "mqmtar-asentmax-nape seed0 at 1x: " in capsys.readouterr().out


def test_reach_narrows_the_view_of_heads_with_alibi_only() -> None:
    model = decided("asentmax")
    plain = reach.reach(model, SMALL, 2, samples=16, window=0)
    assert plain["queries"] == 64 and plain["queries_wrong"] > 60  # the model has learned nothing
    for same in (reach.reach(model, SMALL, 2, 16, window=91), reach.reach(model, SMALL, 0, 16, window=1)):
        assert same["queries_wrong"] == plain["queries_wrong"] and same["loss"] == pytest.approx(plain["loss"])
    assert reach.reach(model, SMALL, 2, 16, window=8)["loss"] != pytest.approx(plain["loss"], rel=1e-4)


def test_reach_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(reach, "WINDOWS", (0, 12))
    run = tmp_path / "run"
    build_model(SMALL, "softmax", "nape").save_pretrained(run / "model")
    summary = {"task": "mqmtar", "task_settings": asdict(SMALL), "settings": {"positions": "nape"}}
    (run / "run.json").write_text(json.dumps(summary))
    output = tmp_path / "reach.json"
    output.write_text(json.dumps({"models": {"another": {"windows": [{"loss": 0.5, "queries_wrong": 3}] * 2}}}))
    flags = [str(run), "--samples", "8", "--output", str(output), "--device", "cpu"]
    reach.main(flags)
    models = json.loads(output.read_text())["models"]
    model = models[f"{tmp_path.name} run"]
    assert list(models) == ["another", f"{tmp_path.name} run"] and model["header"]["samples"] == 8
    assert [row["window"] for row in model["windows"]] == [0, 12]
    printed = capsys.readouterr().out
    assert "| another | 5.0e-01, 3 | 5.0e-01, 3 |" in printed
    assert "| heads with ALiBi see | all tokens | the last 12 |" in printed and "e+00, 32 |" in printed
    (run / "run.json").write_text(json.dumps({**summary, "settings": {"positions": "nope"}}))
    with pytest.raises(SystemExit):
        reach.main(flags)
    assert "has positions nope, without heads that have ALiBi" in capsys.readouterr().err
