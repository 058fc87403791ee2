"""Measuring models of the synthetic tasks: greedy decoding, intervals, the metric, recorded attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_asentmax.integration.install import scaling_of
from recipes.recording import recorded_attention
from recipes.synthetic import evaluate, measuring
from recipes.synthetic.measuring import measure, wilson_interval
from recipes.synthetic.models import METHODS, build_model, outputs_at
from recipes.synthetic.stick_breaking import stick_breaking_attention
from recipes.synthetic.tasks import IGNORED

from small_tasks import SMALL, decided, small
from tiny_models import perturb_scalings


@pytest.mark.parametrize("method", METHODS)
def test_teacher_forced_accuracy_is_that_of_generation(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are what the model generates, changed in one token in half of the samples; both must see the same."""
    model = decided(method)
    model.generation_config.eos_token_id = None
    batch = SMALL.test_batch(8, 64, torch.Generator().manual_seed(0))
    targets = batch.labels.shape[1]

    def generated(prompt: torch.Tensor) -> torch.Tensor:
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=targets,
            do_sample=False,
            pad_token_id=SMALL.eos,
        )
        return output[:, prompt.shape[1] :]

    answer = generated(batch.prompt).clone()
    for row in range(0, 8, 2):
        answer[row, row] = (answer[row, row] + 1) % SMALL.vocabulary
    inputs = torch.cat([batch.prompt, answer], dim=1)
    altered = replace(batch, inputs=inputs, labels=answer)
    right = outputs_at(model, altered).argmax(dim=-1) == altered.labels
    by_generation = (generated(batch.prompt) == answer).all(dim=1)
    assert torch.equal(right.all(dim=1), by_generation)
    assert by_generation.tolist() == [False, True] * 4

    monkeypatch.setattr(measuring, "fixed_batches", lambda *_: iter([altered]))
    result = measure(model, SMALL, 64, 8)
    assert result["exact_match"] == 0.5 and result["samples"] == 8
    assert result["pairs"] == 8 and result["e"] == pytest.approx(result["queries_wrong"] / 32 / 8)


def test_measure_does_not_depend_on_batches() -> None:
    torch.manual_seed(0)
    for name in ("flip_flop", "local_count", "max_retrieval"):
        task = small(name)
        model = build_model(task, "softmax", "nope").eval()
        one, many = (measure(model, task, 64, 20, tokens_at_once=tokens) for tokens in (64, 64 * 7))
        assert {**one, "seconds": 0, "input_tokens": 0} == {**many, "seconds": 0, "input_tokens": 0}


def test_the_first_samples_of_a_length_stay_the_same() -> None:
    few, more = (next(measuring.fixed_batches(SMALL, 96, count, 100, seed=1)) for count in (3, 9))
    assert torch.equal(few.inputs, more.inputs[:3]) and len(more) == 9
    other = next(measuring.fixed_batches(SMALL, 96, 3, 100, seed=2))
    assert not torch.equal(few.inputs, other.inputs)


def test_wilson_interval() -> None:
    assert wilson_interval(95, 100) == pytest.approx((0.88825, 0.97846), abs=1e-5)
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(10, 10)[1] == 1.0
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)


def test_the_metric_loads_offline_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And `measure` takes its numbers from it."""
    library = pytest.importorskip("evaluate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = Path(evaluate.__file__).parent / "metrics" / "exact_answers"
    metric = library.load(str(folder), cache_dir=str(tmp_path))
    result = metric.compute(predictions=[[1, 2], [1, 3], [4]], references=[[1, 2], [1, 2], [4, 5]])
    assert result["exact_match"] == pytest.approx(1 / 3) and result["token_accuracy"] == pytest.approx(4 / 6)
    assert result["interval"] == pytest.approx(wilson_interval(1, 3)) and result["samples"] == 3
    task = small("local_count")  # whose samples have places that do not count
    model = build_model(task, "softmax", "nope").eval()
    found = measure(model, task, 64, 5)
    batches = list(measuring.predictions(model, task, 64, 5, measuring.TEST_SEED))
    counts = [batch.labels != IGNORED for batch, _ in batches]
    right = sum(
        int(((predicted == batch.labels) & count).sum())
        for (batch, predicted), count in zip(batches, counts, strict=True)
    )
    assert found["token_accuracy"] == right / sum(int(count.sum()) for count in counts) and found["samples"] == 5


@pytest.mark.parametrize("method", ["asentmax", "ssmax"])
def test_recorded_attention_is_what_the_layers_compute(method: str) -> None:
    """Queries with their length scaling, keys, and the slopes of each layer. The model's outputs stay the same."""
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


@pytest.mark.parametrize("length", [1, 6, 33])
def test_stick_breaking_breaks_a_stick(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = torch.randn(3, 2, 3, length, 4, dtype=torch.float64)
    expected = torch.zeros_like(value)
    share = torch.sigmoid(query @ key.transpose(-1, -2) * 0.5)
    for i in range(length):
        left = torch.ones(2, 3, dtype=torch.float64)
        for j in range(i - 1, -1, -1):
            expected[:, :, i] += (left * share[:, :, i, j])[..., None] * value[:, :, j]
            left = left * (1 - share[:, :, i, j])
        expected[:, :, i] += left[..., None] * value[:, :, i]
    torch.testing.assert_close(stick_breaking_attention(query, key, value, 0.5), expected)
    last = stick_breaking_attention(query[:, :, -1:], key, value, 0.5)
    torch.testing.assert_close(last, expected[:, :, -1:])
    monkeypatch.setattr("recipes.synthetic.stick_breaking._SCORES_AT_ONCE", 2 * 3 * length * 4)
    with torch.no_grad():
        torch.testing.assert_close(stick_breaking_attention(query, key, value, 0.5), expected)


def test_stick_breaking_without_rotation() -> None:
    torch.manual_seed(0)
    rope = build_model(SMALL, "stick_breaking", "rope").eval()
    nope = build_model(SMALL, "stick_breaking", "nope").eval()
    nope.load_state_dict(rope.state_dict())
    ids = torch.randint(SMALL.vocabulary, (1, 12))
    assert not torch.allclose(rope(ids).logits, nope(ids).logits)
    shifted = {"position_ids": torch.arange(5, 17)[None]}
    torch.testing.assert_close(nope(ids, **shifted).logits, nope(ids).logits)
    with pytest.raises(ValueError, match="rope or nope"):
        build_model(SMALL, "stick_breaking", "nape")
