"""The lookups of MQMTAR's models, head by head, and the lookup alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_asentmax.integration.install import scaling_of
from recipes.recording import AttentionCall, recorded_attention
from recipes.synthetic import lookup, margins, reach
from recipes.synthetic.models import build_model, outputs_at
from recipes.synthetic.tasks import Batch

from small_tasks import SMALL, decided
from tiny_models import perturb_scalings


def test_likenesses_part_the_other_words() -> None:
    words = torch.randint(3, 8, (40, 2), generator=torch.Generator().manual_seed(0))
    kinds = margins.likenesses(words, words)
    equal = (words[:, None] == words[None]).all(dim=-1)
    assert torch.equal(sum(kinds.values()) + equal.long(), torch.ones_like(equal, dtype=torch.int64))
    one = {
        name: bool(kind) for name, kind in margins.likenesses(torch.tensor([[3, 4]]), torch.tensor([[4, 3]])).items()
    }
    assert one == {"swapped": True, "first": False, "second": False, "crossed": False, "far": False}


def test_lookups_find_the_heads_that_match_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four heads the first two have ALiBi, the third compares both letters in order, the fourth without order."""
    task = replace(SMALL, head_dim=2 * SMALL.vocabulary)

    slopes = torch.tensor([1.0, 0.5, 0.0, 0.0])

    @contextmanager
    def recorded() -> Iterator[list[AttentionCall]]:
        yield calls

    def calls_of(batch: Batch) -> AttentionCall:
        letters = nn.functional.one_hot(batch.inputs, task.vocabulary).double()
        before = letters.roll(1, dims=1)
        in_order = torch.cat([before, letters], dim=-1)
        either = torch.cat([before + 1.01 * letters, 0 * letters], dim=-1)
        reverse = torch.cat([before * 1.01 + letters, 0 * letters], dim=-1)
        none = torch.zeros_like(in_order)
        query, key = (torch.stack([none, none, in_order, last], 1) for last in (reverse, either))
        return AttentionCall(query, key, key, {"scale": 1.0, "alibi_slopes": slopes})

    calls: list[AttentionCall] = []
    monkeypatch.setattr(margins, "recorded_attention", recorded)
    monkeypatch.setattr(margins, "outputs_at", lambda model, batch: calls.__setitem__(slice(None), [calls_of(batch)]))
    model = build_model(SMALL, "asentmax", "nape").eval()
    rows = [row for row in margins.lookups(model, task, 200) if row["place"] == "query's second letter"]
    assert [(row["head"], row["offset"]) for row in rows] == [(2, 1), (3, 1)]
    assert rows[0]["swapped"] == rows[0]["first"] == rows[0]["crossed"] == rows[0]["far"] == 0 and rows[0]["score"] == 2
    assert rows[1]["swapped"] == 1.0 and rows[1]["far"] < 0.1
    assert rows[0]["swapped_keys"] < 1 and rows[0]["far_keys"] > 8000
    run = tmp_path / "run"
    model.save_pretrained(run / "model")
    summary = {"task": "mqmtar", "task_settings": asdict(task)}
    (run / "run.json").write_text(json.dumps(summary))
    margins.main([str(run), "--samples", "50", "--output", str(tmp_path / "margins.json")])
    assert json.loads((tmp_path / "margins.json").read_text())["models"][0]["heads"]


def test_reach_narrows_the_view_of_heads_with_alibi_alone() -> None:
    model = decided("asentmax")
    plain = reach.reach(model, SMALL, 2, samples=70, window=0)
    assert plain["queries"] == 280 and plain["queries_wrong"] > 270  # it has learned nothing
    for same in (reach.reach(model, SMALL, 2, 70, window=91), reach.reach(model, SMALL, 0, 70, window=1)):
        assert same["queries_wrong"] == plain["queries_wrong"] and same["loss"] == pytest.approx(plain["loss"])
    assert reach.reach(model, SMALL, 2, 70, window=8)["loss"] != pytest.approx(plain["loss"], rel=1e-4)


def test_reach_writes_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert "positions nope: no heads with ALiBi" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["asentmax", "ssmax"])
def test_recorded_attention_is_what_the_layers_compute(method: str) -> None:
    """Queries with their length scaling, keys, and the slopes, of each layer; and the model runs as ever."""
    torch.manual_seed(0)
    model = build_model(SMALL, method, "nape").eval()
    perturb_scalings(model)
    batch = SMALL.test_batch(2, 64, torch.Generator().manual_seed(0))
    projected: list[dict[str, torch.Tensor]] = []
    for attention in (layer.self_attn for layer in model.model.layers):
        given: dict[str, torch.Tensor] = {}
        modules = {"query": attention.q_proj, "key": attention.k_proj, "factor": scaling_of(attention)}
        for name, module in modules.items():
            module.register_forward_hook(lambda _, __, output, given=given, name=name: given.update({name: output}))
        projected.append(given)
    with torch.no_grad(), recorded_attention() as calls:
        recorded = outputs_at(model, batch)
    with torch.no_grad():
        assert torch.equal(recorded, outputs_at(model, batch))
    assert len(calls) == SMALL.layers
    for call, layer in zip(calls, projected, strict=True):
        query, key = (layer[name].unflatten(-1, (-1, SMALL.head_dim)).transpose(1, 2) for name in ("query", "key"))
        assert torch.equal(call.key, key) and torch.equal(call.query[:, :2], query[:, :2])
        torch.testing.assert_close(call.query[:, 2:], query[:, 2:] * layer["factor"][..., None])
        assert not torch.allclose(call.query[:, 2:], query[:, 2:], rtol=1e-3)
        assert call.slopes.tolist() == [1.0, 0.5, 0.0, 0.0] and call.options["scale"] == SMALL.head_dim**-0.5


def test_lookups_of_attention_that_is_not_the_plugin_s() -> None:
    model = build_model(SMALL, "stick_breaking", "nope").eval()
    with pytest.raises(ValueError, match="is not the plugin's"):
        list(margins.lookups(model, SMALL, 4))


def test_lookup_learns_and_writes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "BATCH", 64)
    monkeypatch.setattr(lookup, "TEST_BATCH", 20)
    monkeypatch.setattr(lookup, "WARMUP", 5)
    output = tmp_path / "lookup.json"
    alike = "places alike, no near misses, head drop 0.75, corrupted queries 0.3"
    flags = ["--variants", "gain 5", "head drop 0.9", alike, "--seeds", "0", "--queries", "40", "--output", str(output)]
    lookup.main([*flags, "--steps", "100"])
    rows = json.loads(output.read_text())["rows"]
    assert rows[0]["e"] < 0.9 / lookup.TEST_KEYS  # better than chance
    assert [row["variant"] for row in rows] == ["gain 5", "head drop 0.9", alike]
    assert rows[2]["wrong_order"] > 0.3, "a letter is as good a match in either place at first"
    for row in rows:
        assert 0 <= row["e"] <= 1 / lookup.TEST_KEYS and 0 < row["e_of_one_head"] <= 1 / lookup.TEST_KEYS
        assert row["wrong"] == pytest.approx(row["e"] * 40 * lookup.TEST_KEYS)
