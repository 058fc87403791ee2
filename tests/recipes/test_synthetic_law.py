"""What models of MQMTAR get wrong: the query-error law and the keys that wrong answers belong to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recipes.synthetic import law, mistakes, train
from recipes.synthetic.measuring import wilson_interval
from recipes.synthetic.models import METHODS
from recipes.synthetic.tasks import Batch, Mqmtar

from small_tasks import SIZE_FLAGS, SMALL, decided


def test_wrong_answers_are_given_to_keys() -> None:
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
    """Asked for are the values that one pass over context, queries and answers gives, every third one altered."""
    model = decided(method)
    questions = law.questions

    def altered(task: Mqmtar, contexts: Batch, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        read, follows, values = questions(task, contexts, generator)
        full = torch.cat([read[:, None].expand(-1, follows.shape[1], -1), follows], dim=2)
        given = model(full.flatten(0, 1)).logits[:, -12:].argmax(-1).view(*values.shape[:3], 3)[..., :2].clone()
        given.view(-1, 2)[::3, 1] += 1
        return read, follows, given

    monkeypatch.setattr(law, "questions", altered)
    for tokens in (96, 3 * 96, 100 * 96):  # cached at once
        entry = law.measure_law(model, SMALL, 96, 36, tokens_at_once=tokens)
        assert entry["queries_wrong"] == 12 and entry["queries"] == 36 and entry["contexts"] == 3
        assert entry["pairs"] == 12 and entry["e"] == 12 / 36 / 12
        assert entry["e_interval"][0] < entry["e"] < entry["e_interval"][1]
    with pytest.raises(ValueError, match="holds 1 pairs; it takes at least 4"):
        law.measure_law(model, SMALL, 8, 36)


def test_the_laws_interval_knows_that_contexts_differ() -> None:
    alike, differing = [1, 1, 1, 1, 1, 1], [6, 0, 0, 0, 0, 0]
    low, high, effect = law.interval(alike, 100)
    assert (low, high) == wilson_interval(6, 600) and effect == 1
    low, high, effect = law.interval(differing, 100)
    assert effect == pytest.approx(6 / (100 * 0.01 * 0.99)) and high > wilson_interval(6, 600)[1]
    assert law.interval([0, 0], 100)[:2] == wilson_interval(0, 200)
    assert law.interval([3], 100)[:2] == wilson_interval(3, 100)


def test_the_law_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--device", "cpu", "--out", str(tmp_path), "--steps", "1", "--batch", "4", *SIZE_FLAGS]
    train.main(["--task", "mqmtar", *common])
    train.main(["--task", "copy", *common])
    output = tmp_path / "law.json"
    runs = str(tmp_path / "mqmtar-asentmax-nape")
    law.main([runs, "--multiples", "1", "2", "--queries", "20", "--device", "cpu", "--output", str(output)])
    entries = json.loads(output.read_text())["runs"]["mqmtar-asentmax-nape seed0"]["lengths"]
    assert [(entry["multiple"], entry["contexts"], entry["queries"]) for entry in entries] == [(1, 3, 24), (2, 2, 32)]
    assert "mqmtar-asentmax-nape seed0 at 2x: " in capsys.readouterr().out
    law.main([runs, "--multiples", "2", "1", "--queries", "8", "--device", "cpu", "--output", str(output)])
    law.main([runs, "--multiples", "4", "--queries", "8", "--device", "cpu", "--output", str(output)])
    entries = json.loads(output.read_text())["runs"]["mqmtar-asentmax-nape seed0"]["lengths"]
    assert [(entry["multiple"], entry["contexts"]) for entry in entries] == [(1, 1), (2, 1), (4, 1)], "others stay"
    assert [entry["header"]["seeds"] for entry in entries] == [[law.SEED]] * 3, "each says what measured it"
    output.with_suffix(".png").unlink()
    law.main(["--report", "--output", str(output)])
    assert output.with_suffix(".png").exists() and "| 1x | 2x | 4x |" in output.with_suffix(".md").read_text()
    train.main(["--task", "mqmtar", *common, "--out", str(tmp_path / "others")])
    (tmp_path / "others" / "mqmtar-asentmax-nape").rename(tmp_path / "mine")
    capsys.readouterr()
    law.main([str(tmp_path / "mine"), "--multiples", "1", "--queries", "8", "--device", "cpu", "--output", str(output)])
    assert list(json.loads(output.read_text())["runs"]) == ["mqmtar-asentmax-nape seed0", "mine seed0"]
    assert "another run" not in capsys.readouterr().out
    (tmp_path / "mine").rename(tmp_path / "others" / "mqmtar-asentmax-nape")
    other = str(tmp_path / "others" / "mqmtar-asentmax-nape")
    law.main([other, "--multiples", "1", "--queries", "8", "--device", "cpu", "--output", str(output)])
    assert "has mqmtar-asentmax-nape seed0 of another run" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        law.main([str(tmp_path / "copy-asentmax-nape"), "--device", "cpu", "--output", str(output)])
    assert "was trained on copy; the law is of MQMTAR's queries" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        law.main(["--output", str(output)])
    assert "no finished run below no folder" in capsys.readouterr().err
    file = tmp_path / "mqmtar-asentmax-nape" / "seed0" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "given_up": True}))
    with pytest.raises(SystemExit):
        law.main([runs, "--device", "cpu", "--output", str(tmp_path / "other.json")])
    said = capsys.readouterr()
    assert "there is no model to ask" in said.out and "nothing to report: every run was given up" in said.err


def test_mistakes_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--device", "cpu", "--out", str(tmp_path), "--steps", "1", "--batch", "4", *SIZE_FLAGS]
    train.main(["--task", "mqmtar", *common])
    output = tmp_path / "mistakes.json"
    run = tmp_path / "mqmtar-asentmax-nape" / "seed0"
    mistakes.main([str(run), "--multiple", "1", "--samples", "3", "--device", "cpu", "--output", str(output)])
    (row,) = json.loads(output.read_text())["results"]
    assert row["queries"] == 12 and row["wrong"] == sum(sum(kinds.values()) for kinds in row["mistakes"].values())
    assert "mqmtar-asentmax-nape seed0 at 1x: " in capsys.readouterr().out
