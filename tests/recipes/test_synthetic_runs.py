"""Training, resuming, measuring and reporting of the synthetic tasks, with tiny models on the CPU."""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

from hf_asentmax.integration.install import scaling_of
from recipes.recording import AttentionCall, recorded_attention
from recipes.synthetic import ablations, evaluate, law, lookup, margins, measuring, mistakes, model_card, report, train
from recipes.synthetic.measuring import measure, wilson_interval
from recipes.synthetic.models import METHODS, build_model, load_model, outputs_at
from recipes.synthetic.regularise import HeadDrop, ScoreJitter, corrupted_answers
from recipes.synthetic.replay import HardReplay
from recipes.synthetic.settings import RunSettings, add_flags, from_flags
from recipes.synthetic.stick_breaking import stick_breaking_attention
from recipes.synthetic.tasks import TASKS, Batch, Mqmtar, Task
from recipes.synthetic.trainer import Trainer, learning_rate

from tiny_models import perturb_scalings

SIZES = {"layers": 2, "hidden": 16, "heads": 4, "head_dim": 8, "ffn": 32}
SIZE_FLAGS = [text for name, value in SIZES.items() for text in (f"--{name.replace('_', '-')}", str(value))]
SMALL = Mqmtar(**SIZES)  # type: ignore[arg-type]
CPU = torch.device("cpu")


def positions_for(method: str) -> str:
    return "nope" if method == "stick_breaking" else "nape"


def small(name: str) -> Task:
    sizes = {"hidden": 16, "ffn": 16} if name == "max_retrieval" else SIZES
    return TASKS[name](**sizes)  # type: ignore[arg-type]


# --- models and measuring


@pytest.mark.parametrize("method", METHODS)
def test_teacher_forced_accuracy_is_that_of_generation(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are what the model generates, changed in one token in half of the samples; both must see the same."""
    torch.manual_seed(0)
    model = build_model(SMALL, method, positions_for(method)).double().eval()
    for parameter in model.parameters():  # far from uniform outputs
        nn.init.normal_(parameter, std=0.3) if parameter.ndim == 2 else None
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


def test_metric_loads_offline_and_agrees(tmp_path: Path) -> None:
    library = pytest.importorskip("evaluate")
    folder = Path(evaluate.__file__).parent / "metrics" / "exact_answers"
    metric = library.load(str(folder), cache_dir=str(tmp_path))
    result = metric.compute(predictions=[[1, 2], [1, 3], [4]], references=[[1, 2], [1, 2], [4, 5]])
    assert result["exact_match"] == pytest.approx(1 / 3) and result["token_accuracy"] == pytest.approx(4 / 6)
    assert result["interval"] == pytest.approx(wilson_interval(1, 3)) and result["samples"] == 3


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


# --- training


def test_corrupted_answers_touch_answer_letters_only() -> None:
    batch = SMALL.test_batch(50, 64, torch.Generator().manual_seed(0))
    corrupted = corrupted_answers(batch, SMALL, 0.5, torch.Generator().manual_seed(1))
    changed = corrupted.inputs != batch.inputs
    at_letters = changed[:, batch.answer_letters]
    assert changed.sum() == at_letters.sum() and 0.4 < at_letters.float().mean() < 0.6
    assert torch.equal(corrupted.labels, batch.labels)
    assert corrupted.inputs[:, batch.answer_letters].min() >= SMALL.FIRST_LETTER
    assert corrupted_answers(batch, SMALL, 0.0, torch.Generator()) is batch


@pytest.mark.parametrize("method", METHODS)
def test_jitter_scales_the_scores_of_heads_without_alibi(method: str) -> None:
    torch.manual_seed(0)
    alibi_heads = 2 if positions_for(method) == "nape" else 0
    model = build_model(SMALL, method, positions_for(method)).double().train()
    batch = SMALL.test_batch(2, 64, torch.Generator().manual_seed(0))
    plain = outputs_at(model, batch)
    jitter = ScoreJitter(model, 0.3, alibi_heads)
    jitter.lowest(2, CPU)
    jittered = outputs_at(model, batch)
    model.eval()
    evaluated = outputs_at(model, batch)
    model.train()
    assert not torch.allclose(plain, jittered)
    if method != "adaptive_temperature":  # which is another mapping outside of training
        torch.testing.assert_close(evaluated, plain)
    jitter._factor = None
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[alibi_heads * SMALL.head_dim :] *= 0.3
    torch.testing.assert_close(outputs_at(model, batch), jittered)


def test_jitter_draws_one_factor_a_sample() -> None:
    jitter = ScoreJitter(build_model(SMALL, "entmax", "nape"), 0.5, 2)
    jitter.draw(1000, 9, torch.Generator().manual_seed(0))
    factor = jitter._factor
    assert factor is not None and factor.shape == (1000, 1, 1)
    assert 0.5 <= float(factor.min()) < 0.51 and 0.99 < float(factor.max()) <= 1.0
    jitter = ScoreJitter(build_model(SMALL, "entmax", "nape"), 0.01, 2, log_uniform=True)
    jitter.draw(1000, 9, torch.Generator().manual_seed(0))
    assert jitter._factor is not None
    logarithm = jitter._factor.log10()
    assert -2 <= float(logarithm.min()) < -1.98 and abs(float(logarithm.mean()) + 1) < 0.05
    jitter.draw(1000, 9, torch.Generator().manual_seed(0), 0.0)
    assert bool((jitter._factor == 1).all())


def test_changes_of_scores_come_in_after_the_plateau(tmp_path: Path) -> None:
    settings = RunSettings(steps=8, batch=4, log_every=2, jitter=0.5, ease_in=4, plateau=1e9)
    trainer = Trainer(SMALL, settings, 0, tmp_path, CPU)
    assert trainer._eased_in() == 0.0
    trainer.jitter.draw(4, 9, torch.Generator().manual_seed(0), 0.0)
    assert trainer.jitter._factor is not None and bool((trainer.jitter._factor == 1).all())
    trainer.run()
    assert trainer.left_plateau is not None and trainer.left_plateau["step"] == 2
    trainer.step = 4
    assert trainer._eased_in() == 0.5
    trainer.step = 100
    assert trainer._eased_in() == 1.0


def test_qk_norm_bounds_scores_and_is_loaded_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(SMALL, "asentmax", "nape", qk_norm=True).eval()
    batch = SMALL.test_batch(2, 64, torch.Generator().manual_seed(0))
    expected = outputs_at(model, batch)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 1000
    torch.testing.assert_close(outputs_at(model, batch), expected, rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs_at(load_model(tmp_path), batch), outputs_at(model, batch))
    with pytest.raises(ValueError, match="qk-norm undoes it"):
        RunSettings(qk_norm=True, jitter=0.5)
    with pytest.raises(ValueError, match="max_retrieval has a model of its own"):
        build_model(small("max_retrieval"), "softmax", "nope", qk_norm=True)


@pytest.mark.parametrize("flag", [{"jitter": 0.5}, {"channel_drop": 0.1}, {"head_drop": 0.1}])
def test_what_heads_with_alibi_do_not_have_is_refused_where_all_have_it(flag: dict[str, float]) -> None:
    RunSettings(positions="nape", **flag)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{next(iter(flag)).replace('_', '-')} change heads without ALiBi"):
        RunSettings(positions="alibi", **flag)  # type: ignore[arg-type]
    RunSettings(positions="alibi", key_noise=0.1, key_noise_heads="all")


def test_channels_are_left_out_sample_by_sample() -> None:
    jitter = ScoreJitter(build_model(SMALL, "entmax", "nape"), 1.0, 2, drop=0.25)
    jitter.draw(1000, 9, torch.Generator().manual_seed(0))
    factor = jitter._factor
    channels = (SMALL.heads - 2) * SMALL.head_dim
    assert factor is not None and factor.shape == (1000, 1, channels)
    assert set(factor.unique().tolist()) == {0.0, 1.0} and 0.74 < float(factor.mean()) < 0.76
    model = build_model(SMALL, "entmax", "nape").train()
    batch = SMALL.test_batch(2, 64, torch.Generator().manual_seed(0))
    plain = outputs_at(model, batch)
    ScoreJitter(model, 1.0, 2, drop=0.5).draw(2, batch.inputs.shape[1], torch.Generator().manual_seed(0))
    assert not torch.equal(outputs_at(model, batch), plain)
    with pytest.raises(ValueError, match="below 1, got 1.0"):
        ScoreJitter(model, 1.0, 2, drop=1.0)


@pytest.mark.parametrize("method", ["asentmax", "softmax", "stick_breaking"])
def test_heads_without_alibi_are_left_out_sample_by_sample(method: str) -> None:
    torch.manual_seed(0)
    alibi_heads = 2 if positions_for(method) == "nape" else 0
    model = build_model(SMALL, method, positions_for(method)).train()
    batch = SMALL.test_batch(3, 64, torch.Generator().manual_seed(0))
    plain = outputs_at(model, batch)
    drop = HeadDrop(model, 0.9, alibi_heads)
    assert torch.equal(outputs_at(model, batch), plain)  # nothing drawn yet
    drop.draw(3, torch.Generator().manual_seed(0))
    assert drop._factors is not None and len(drop._factors) == SMALL.layers
    dropped = outputs_at(model, batch)
    assert not torch.allclose(dropped, plain)
    model.eval()
    torch.testing.assert_close(outputs_at(model, batch), plain)
    model.train()
    factors, drop._factors = drop._factors, None
    for sample in range(3):  # the same by hand: columns of the output projections
        copy = build_model(SMALL, method, positions_for(method))
        copy.load_state_dict(model.state_dict())
        with torch.no_grad():
            for layer, factor in zip(copy.model.layers, factors, strict=True):
                layer.self_attn.o_proj.weight *= factor[sample]
        alone = outputs_at(copy.train(), batch.select(slice(sample, sample + 1)))
        torch.testing.assert_close(dropped[sample : sample + 1], alone, rtol=1e-4, atol=1e-5)
    drop.draw(3, torch.Generator().manual_seed(0), 0.0)  # tensors still: a compiled model stays compiled
    assert drop._factors is not None and all(bool((factor == 1).all()) for factor in drop._factors)
    assert torch.equal(outputs_at(model, batch), plain)


def test_of_the_dropped_heads_one_stays_and_the_sum_too() -> None:
    drop = HeadDrop(build_model(SMALL, "entmax", "nape"), 0.75, 2)
    drop.draw(1000, torch.Generator().manual_seed(0))
    assert drop._factors is not None
    for factor in drop._factors:
        heads = factor.unflatten(2, (SMALL.heads, SMALL.head_dim))[:, 0, :, 0]
        assert bool((heads[:, :2] == 1).all())
        free = heads[:, 2:]
        torch.testing.assert_close(free.sum(dim=1), torch.full((1000,), float(SMALL.heads - 2)))
        kept = (free > 0).float()
        chance = 1 / (SMALL.heads - 2)
        assert abs(float(kept.mean()) - (chance + (1 - chance) * 0.25)) < 0.03
    assert not torch.equal(*drop._factors[:2])
    with pytest.raises(ValueError, match="below 1, got 1.0"):
        HeadDrop(build_model(SMALL, "entmax", "nape"), 1.0, 2)


def test_keys_without_alibi_get_noise_of_their_size() -> None:
    model = build_model(SMALL, "entmax", "nape").train()
    batch = SMALL.test_batch(64, 64, torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    projection = model.model.layers[0].self_attn.k_proj
    with torch.no_grad():
        projection.weight[2 * SMALL.head_dim : 3 * SMALL.head_dim] *= 10  # the first head without ALiBi
        projection.register_forward_hook(lambda module, inputs, key: seen.append(key))
        jitter = ScoreJitter(model, 1.0, 2, noise=0.5)
        projection.register_forward_hook(lambda module, inputs, key: seen.append(key))
        jitter.draw(*batch.inputs.shape, torch.Generator().manual_seed(0))
        outputs_at(model, batch)
    before, after = (key.unflatten(-1, (SMALL.heads, SMALL.head_dim)) for key in seen)
    torch.testing.assert_close(before[..., :2, :], after[..., :2, :])
    ratio = (after - before).square().mean(dim=(0, 1, 3)) / before.square().mean(dim=(0, 1, 3))
    torch.testing.assert_close(ratio[2:], torch.full_like(ratio[2:], 0.25), rtol=0.05, atol=0)
    jitter.lowest(64, CPU)
    seen.clear()
    outputs_at(model, batch)
    assert torch.equal(*seen)
    everywhere = ScoreJitter(build_model(SMALL, "entmax", "nape"), 1.0, 2, noise=0.5, noise_on_all=True)
    everywhere.draw(2, 9, torch.Generator().manual_seed(0))
    key = torch.randn(2, 9, SMALL.heads * SMALL.head_dim)
    noisy = everywhere._noisy(nn.Module().train(), (), key)
    assert noisy is not None and bool((noisy != key).all())


def test_hard_samples_are_judged_without_chance(tmp_path: Path) -> None:
    settings = RunSettings(steps=1, batch=4, jitter=0.5, key_noise=0.5, head_drop=0.5, hard_candidates=3, hard_from=0)
    trainer = Trainer(SMALL, settings, 0, tmp_path, CPU)
    perturb_scalings(trainer.model)
    candidates = SMALL.test_batch(12, 64, torch.Generator().manual_seed(0))
    judged = trainer._hardness(candidates)
    trainer.jitter.draw(12, candidates.inputs.shape[1], trainer.data, 1.0, trainer.noise_times)
    trainer.heads.draw(12, trainer.data, 1.0)
    assert judged.shape == candidates.labels.shape and not torch.allclose(trainer._losses(candidates), judged)
    torch.testing.assert_close(trainer._hardness(candidates), judged, rtol=0, atol=0)
    states = [generator.get_state() for generator in (trainer.data, trainer.shapes)]
    drawn = SMALL.training_batch(12, trainer.data, trainer.shapes, 0.0)
    for generator, state in zip((trainer.data, trainer.shapes), states, strict=True):
        generator.set_state(state)
    chosen, weights = trainer._next_batch(0.0)
    expected = trainer._hardness(drawn).sum(dim=1).topk(4).values
    torch.testing.assert_close(trainer._hardness(chosen).sum(dim=1), expected)
    torch.testing.assert_close(weights, torch.full(chosen.labels.shape, 1 / chosen.labels.numel()))


@pytest.mark.parametrize("candidates", [1, 3])
def test_hard_samples_weigh_more(candidates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the plateau is left, by their losses; the log's loss is of even weights."""
    settings = RunSettings(
        steps=1, batch=4, warmup=0, hard_weight=0.75, hard_candidates=candidates, hard_from=0, log_every=1
    )
    trainer = Trainer(SMALL, settings, 0, tmp_path, CPU)
    batch, weights = trainer._next_batch(0.0)
    torch.testing.assert_close(weights, torch.full(batch.labels.shape, 1 / batch.labels.numel()))
    trainer.left_plateau = {"step": 0, "seconds": 0.0, "samples": 0}
    batch, weights = trainer._next_batch(0.0)
    losses = trainer._hardness(batch)
    torch.testing.assert_close(weights, 0.25 / losses.numel() + 0.75 * losses / losses.sum())
    one = torch.zeros_like(weights)
    one[1, 2] = 1.0
    alone = trainer._losses(batch)[1, 2]
    expected = torch.autograd.grad(alone, list(trainer.model.parameters()))
    gradients: list[torch.Tensor] = []
    monkeypatch.setattr(trainer, "_next_batch", lambda progress: (batch, one))
    clip = nn.utils.clip_grad_norm_

    def seen(parameters: Any, limit: float) -> torch.Tensor:
        members = list(parameters)
        gradients.extend(each.grad.clone() for each in members)
        return clip(members, limit)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", seen)
    trainer.run()
    torch.testing.assert_close(gradients, list(expected))
    assert trainer.log[0]["loss"] == pytest.approx(float(losses.sum()) / batch.labels.numel())
    norm = torch.stack([each.norm() for each in expected]).norm()  # before it was clipped
    assert trainer.log[0]["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
    with pytest.raises(ValueError, match="hard-weight must be from 0 to 1, got 1.5"):
        RunSettings(hard_weight=1.5)


def test_hard_samples_are_judged_with_corrupted_answers_and_kept_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RunSettings(steps=1, batch=4, corrupt=1.0, replay=0.25, hard_candidates=2, hard_from=0)
    trainer = Trainer(SMALL, settings, 0, tmp_path, CPU)
    trainer.left_plateau = {"step": 0, "seconds": 0.0, "samples": 0}
    judged: list[Batch] = []
    hardness = trainer._hardness
    monkeypatch.setattr(trainer, "_hardness", lambda batch: judged.append(batch) or hardness(batch))
    chosen, _ = trainer._next_batch(0.0)

    def first_letters(labels: torch.Tensor) -> torch.Tensor:
        return labels[:, :-1].unflatten(1, (-1, 3))[..., 1]

    (candidates,) = judged
    (kept,) = trainer.replay._kept.values()
    stored = kept["losses"] >= 0
    letters = candidates.answer_letters
    assert bool(stored.any())
    assert torch.equal(kept["inputs"][stored][:, letters], first_letters(kept["labels"][stored]))
    for batch in (candidates, chosen):
        assert (batch.inputs[:, letters] == first_letters(batch.labels)).float().mean() < 0.3


def test_hard_samples_come_again_until_they_are_no_longer_hard() -> None:
    def batch(first: int) -> Batch:
        tokens = torch.arange(first, first + 8)[:, None].expand(8, 3)
        return Batch(tokens, torch.tensor([2]), tokens[:, :1], torch.tensor([1]))

    replay = HardReplay(0.25, 8)
    assert replay.mix(batch(0), "3 1").inputs[:, 0].tolist() == list(range(8))
    losses = torch.arange(8.0)
    losses[2] = 100.0
    replay.update(losses)
    other = replay.mix(batch(10), "4 1")  # of other lengths: nothing is kept yet
    assert other.inputs[:, 0].tolist() == list(range(10, 18))
    mixed = replay.mix(batch(20), "3 1")
    assert mixed.inputs[:, 0].tolist() == [20, 21, 22, 23, 24, 25, 2, 7] and mixed.labels[6, 0] == 2
    replay.update(torch.tensor([0, 0, 0, 0, 0, 0, 50.0, 0.0]))  # the second is solved
    assert replay.mix(batch(30), "3 1").inputs[6:, 0].tolist() == [2, 6]
    again = HardReplay(0.25, 8)
    again.restore(replay.state(), CPU)
    assert torch.equal(again.mix(batch(30), "3 1").inputs, replay.mix(batch(30), "3 1").inputs)
    assert HardReplay(0.0, 8).mix(batch(0), "3 1").inputs is not None
    with pytest.raises(ValueError, match="replay's share of a batch must be at least 0 and below 1"):
        HardReplay(1.0, 8)
    for share, batch_size in ((0.1, 8), (0.75, 1024)):
        with pytest.raises(ValueError, match=rf"a replay of {share} of {batch_size} samples is .*expected 1 to 512"):
            HardReplay(share, batch_size)


def test_learning_rate() -> None:
    linear = RunSettings(warmup=10, decay=0.5)
    assert learning_rate(1.0, 4, 0.0, linear) == 0.5 and learning_rate(1.0, 99, 0.5, linear) == 1.0
    assert learning_rate(1.0, 99, 0.75, linear) == 0.5 and learning_rate(1.0, 99, 1.1, linear) == 0.0
    cosine = RunSettings(warmup=0, schedule="cosine")
    assert learning_rate(2.0, 0, 0.5, cosine) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="needs an end"):
        RunSettings(steps=0)


def test_queries_and_keys_learn_at_a_rate_of_their_own(tmp_path: Path) -> None:
    settings = RunSettings(steps=1, batch=4, warmup=1, decay=0.5, qk_lr=0.25, beta2=0.95)
    trainer = Trainer(SMALL, settings, 0, tmp_path, CPU)
    trainer._update()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {SMALL.lr}  # on the plateau: one for all
    trainer = Trainer(SMALL, settings, 0, tmp_path, CPU)
    trainer.left_plateau = {"step": 0}
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer._update()
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in trainer.model.named_parameters()}
    for name, distance in moved.items():  # Adam's first step is the learning rate, wherever there is a gradient
        if "self_attn" in name and "length_scaling" not in name:
            slow = "q_proj" in name or "k_proj" in name
            assert distance == pytest.approx(SMALL.lr * (0.25 if slow else 1.0), rel=0.01), name
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(before)
    assert all(group["betas"] == (0.9, 0.95) for group in trainer.optimizer.param_groups)
    with pytest.raises(ValueError, match="beta2 must be at least 0 and below 1, got 1.0"):
        RunSettings(beta2=1.0)
    with pytest.raises(ValueError, match="qk-lr must be above 0, got 0.0"):
        RunSettings(qk_lr=0.0)


def test_alpha_climbs_in_stairs() -> None:
    settings = RunSettings(alpha_start=1.1, alpha_stairs=4, alpha_until=0.4)
    alphas = [settings.alpha_at(progress, 1.5) for progress in (0.0, 0.09, 0.1, 0.3, 0.39, 0.4, 1.0)]
    assert alphas == pytest.approx([1.1, 1.1, 1.2, 1.4, 1.4, 1.5, 1.5])
    assert RunSettings().alpha_at(0.0, 1.5) == 1.5
    with pytest.raises(ValueError, match="entmax and asentmax"):
        RunSettings(alpha_start=1.1, method="softmax")


def trained(folder: Path, task: Task, settings: RunSettings, stops: bool = False) -> Trainer:
    """A finished run; with `stops` every step is made by a new process's trainer."""
    while True:
        trainer = Trainer(task, settings, 3, folder / "seed3", CPU)
        if trainer.run(0.0 if stops else float("inf")):
            return trainer


def test_resuming_is_exact(tmp_path: Path) -> None:
    task = replace(SMALL, near_misses_end=1.0, one_letter_end=0.3, min_queries=1, max_queries=5)
    settings = RunSettings(
        steps=7, batch=4, log_every=2, corrupt=0.5, jitter=0.5, jitter_law="log", channel_drop=0.1, head_drop=0.5,
        key_noise=0.1, key_noise_loss=1e9, hard_candidates=2,
        ease_in=3, plateau=1e9, warmup=3, validations=2, validate_multiple=1, validate_samples=4,
        alpha_start=1.1, alpha_until=0.6, ease_corrupt=True, average=0.5, replay=0.25,
    )  # fmt: skip
    straight, resumed = trained(tmp_path / "a", task, settings), trained(tmp_path / "b", task, settings, stops=True)
    assert len(straight.log) == 3 and len(straight.validations) == 2
    for name in ("loss", "gradient_norm"):
        assert [entry[name] for entry in straight.log] == [entry[name] for entry in resumed.log]
    assert straight.model.config.asentmax.alpha == 1.5
    assert straight.noise_times == resumed.noise_times > 1.01
    assert straight.tokens == resumed.tokens and straight.kept_step == resumed.kept_step
    for one_model, other_model in ((straight.model, resumed.model), (straight.kept_model, resumed.kept_model)):
        for (name, one), other in zip(one_model.state_dict().items(), other_model.state_dict().values(), strict=True):
            assert torch.equal(one, other), name
    with pytest.raises(ValueError, match="other settings"):
        Trainer(task, replace(settings, warmup=4), 3, tmp_path / "b" / "seed3", CPU)


def test_a_run_that_stays_on_the_plateau_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task", "mqmtar", "--hidden", "32", "--heads", "4", "--steps", "9", "--batch", "4", "--log-every", "1"]
    flags += ["--give-up", "8", "--device", "cpu", "--out", str(tmp_path)]
    train.main(flags)
    folder = tmp_path / "mqmtar-asentmax-nape" / "seed0"
    run = json.loads((folder / "run.json").read_text())
    assert run["given_up"] and run["steps"] == 2 and not (folder / "model").exists()
    assert "the plateau was not left in 8 samples" in capsys.readouterr().out
    evaluate.main([str(folder), "--results", str(tmp_path / "results"), "--device", "cpu"])
    assert not (tmp_path / "results").exists()
    train.main([*flags, "--plateau", "100", "--name", "left"])
    assert not json.loads((tmp_path / "mqmtar-asentmax-nape-left" / "seed0" / "run.json").read_text())["given_up"]


def test_the_average_of_the_weights_is_kept(tmp_path: Path) -> None:
    settings = RunSettings(steps=3, batch=4, warmup=1, average=0.75)
    trainer = Trainer(SMALL, settings, 0, tmp_path, CPU)
    weight, averages = trainer.model.lm_head.weight, []
    for _ in range(3):
        trainer._update()
        trainer.step += 1
        averages.append(weight.detach().clone() if not averages else averages[-1].lerp(weight.detach(), 0.25))
    trainer._keep()
    torch.testing.assert_close(load_model(tmp_path / "model").lm_head.weight, averages[-1])
    assert not torch.allclose(averages[-1], weight)
    with pytest.raises(ValueError, match="below 1"):
        RunSettings(average=1.0)


def test_corruption_can_wait_for_the_end_of_the_plateau(tmp_path: Path) -> None:
    settings = RunSettings(steps=8, batch=64, corrupt=1.0, ease_corrupt=True, ease_in=4, plateau=1e9, log_every=1)
    trainer = Trainer(SMALL, settings, 0, tmp_path, CPU)

    def wrong_inputs() -> int:
        batch, _ = trainer._next_batch(0.0)
        letters = batch.inputs[:, batch.answer_letters]
        return int((letters != batch.labels[:, batch.answer_letters - batch.answer_letters[0] + 1]).sum())

    assert wrong_inputs() == 0
    trainer.left_plateau, trainer.step = {"step": 0}, 2
    some = wrong_inputs()
    trainer.step = 4
    assert 0 < some < wrong_inputs()
    with pytest.raises(ValueError, match="give --ease-in"):
        RunSettings(ease_corrupt=True)


def test_key_noise_follows_the_loss(tmp_path: Path) -> None:
    settings = RunSettings(steps=4, batch=4, log_every=1, key_noise=0.1, key_noise_loss=1e9, plateau=1e9)
    growing = [entry["key_noise"] for entry in trained(tmp_path / "a", SMALL, settings).log]
    assert growing == pytest.approx([0.1, 0.1 * 1.005, 0.1 * 1.005**2, 0.1 * 1.005**3])
    shrinking = trained(tmp_path / "b", SMALL, replace(settings, key_noise_loss=1e-9))
    assert shrinking.log[-1]["key_noise"] == pytest.approx(0.1 / 1.005**3)
    still_on_the_plateau = trained(tmp_path / "c", SMALL, replace(settings, plateau=1e-9))
    assert still_on_the_plateau.log[-1]["key_noise"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="give --key-noise"):
        RunSettings(key_noise_loss=0.1)


def test_starts_of_the_projections(tmp_path: Path) -> None:
    plain = Trainer(SMALL, RunSettings(), 0, tmp_path, CPU).model.state_dict()
    moved = RunSettings(projection_std=0.02, gamma_start=-0.3, bf16_weights=True)
    model = Trainer(SMALL, moved, 0, tmp_path, CPU).model
    scaling = "model.layers.1.self_attn.length_scaling"
    assert not plain[f"{scaling}.gamma_weight"].any() and model.dtype == torch.bfloat16
    assert 0.01 < model.state_dict()[f"{scaling}.gamma_weight"].std() < 0.03
    assert (model.state_dict()[f"{scaling}.gamma_bias"] == torch.tensor(-0.3, dtype=torch.bfloat16)).all()


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_and_loads(name: str, tmp_path: Path) -> None:
    task = small(name)
    positions = "nope" if name == "max_retrieval" else "nape"
    trainer = trained(tmp_path, task, RunSettings(positions=positions, steps=2, batch=4, log_every=1))
    assert all(entry["loss"] > 0 for entry in trainer.log)
    batch = task.test_batch(2, task.max_length, torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            outputs_at(load_model(trainer.folder / "model"), batch), outputs_at(trainer.model.eval(), batch)
        )


def test_a_run_learns(tmp_path: Path) -> None:
    task = replace(small("flip_flop"), min_length=8, max_length=8, lr=1e-2)
    settings = RunSettings(steps=60, batch=32, warmup=5, log_every=10, plateau=0.6)
    trainer = trained(tmp_path, task, settings)
    assert trainer.log[-1]["loss"] < 0.5 * trainer.log[0]["loss"] and trainer.left_plateau is not None
    assert measure(load_model(trainer.folder / "model"), task, 8, 100)["exact_match"] > 0.4


# --- command lines


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
    torch.manual_seed(0)
    model = build_model(SMALL, method, positions_for(method)).double().eval()
    for parameter in model.parameters():  # far from uniform outputs
        nn.init.normal_(parameter, std=0.3) if parameter.ndim == 2 else None
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
    output.with_suffix(".png").unlink()
    law.main(["--report", "--output", str(output)])
    assert output.with_suffix(".png").exists() and "| 1x | 2x |" in output.with_suffix(".md").read_text()
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


@pytest.mark.parametrize("distribution", ["own", "paper"])
def test_mqmtar_in_two_runs(distribution: str, tmp_path: Path) -> None:
    """mqmtar.sh from its first run to its test, in seconds."""
    flags = " ".join([*SIZE_FLAGS, "--no-compile --minutes 0.01 --batch 8 --validate-samples 4 --validate-multiple 1"])
    results = tmp_path / "results"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RUNS": str(tmp_path / "runs"),
        "FLAGS": f"{flags} --plateau 100 --log-every 1",
        "EVALUATE_FLAGS": f"--multiples 1 --samples 4 --results {results}",
        "TRIES": "2",
        "GOOD": "5e-5" if distribution == "paper" else "2",
    }
    script = Path(train.__file__).with_name("mqmtar.sh")
    root = script.parents[2]
    run: Any = partial(subprocess.run, cwd=root, env=environment, capture_output=True, text=True)
    done = run(["bash", script, distribution, "0"])
    assert done.returncode == 0, done.stderr
    result = json.loads((results / f"mqmtar-asentmax-nape-{distribution}-seed0.json").read_text())
    assert result["run"]["track"] == distribution and result["run"]["started_from"]["samples"] > 0
    found = re.findall(r"first run of seed (\d+): e = (\S+) \(good: below", done.stdout)
    errors = {int(seed): float(e) for seed, e in found}
    assert set(errors) == ({0, 100} if distribution == "paper" else {0}), "e is 1 at most, and not below 5e-5 so soon"
    assert result["run"]["started_from"]["seed"] == min(errors, key=errors.__getitem__)
    assert result["run"]["settings"]["head_drop"] == 0.75
    assert result["run"]["settings"]["hard_candidates"] == (4 if distribution == "paper" else 1)
    assert result["run"]["task_settings"]["swapped"] == (0.2 if distribution == "own" else 0.0)
    shown = run(["bash", script, "--help"]).stdout
    assert shown.startswith("MQMTAR in two runs") and "MORE_MINUTES" in shown and "set -" not in shown
    never = {**environment, "RUNS": str(tmp_path / "never"), "FLAGS": f"{flags} --give-up 8 --plateau 0", "TRIES": "1"}
    done = run(["bash", script, distribution, "0"], env=never)
    assert done.returncode == 1 and "no first run of seed 0 left the plateau (tries: 1)" in done.stderr
    refused = run(["bash", script, "mine"])
    assert refused.returncode == 2 and "expected own or paper, got mine" in refused.stderr
    refused = run(["bash", script, distribution, "0", "1"])
    assert refused.returncode == 2 and f"expected a distribution and one seed, got {distribution} 0 1" in refused.stderr


def test_ablations_run_once_and_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


# --- the lookups of a model


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


# --- the lookup alone


def test_lookup_learns_and_writes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "BATCH", 64)
    monkeypatch.setattr(lookup, "TEST_BATCH", 20)
    monkeypatch.setattr(lookup, "WARMUP", 5)
    output = tmp_path / "lookup.json"
    flags = ["--variants", "gain 5", "head drop 0.9", "--seeds", "0", "--queries", "40", "--output", str(output)]
    lookup.main([*flags, "--steps", "100"])
    rows = json.loads(output.read_text())["rows"]
    assert rows[0]["e"] < 0.9 / lookup.TEST_KEYS  # better than chance
    assert [row["variant"] for row in rows] == ["gain 5", "head drop 0.9"]
    for row in rows:
        assert 0 <= row["e"] <= 1 / lookup.TEST_KEYS and 0 < row["e_of_one_head"] <= 1 / lookup.TEST_KEYS
        assert row["wrong"] == pytest.approx(row["e"] * 40 * lookup.TEST_KEYS)
