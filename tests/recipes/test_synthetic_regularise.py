"""What is done in training only: corrupted inputs, changed scores, heads left out, noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from recipes.synthetic.models import METHODS, build_model, load_model, outputs_at
from recipes.synthetic.regularise import AlibiWindow, HeadDrop, ScoreJitter, corrupted_answers, corrupted_questions
from recipes.synthetic.settings import RunSettings
from recipes.synthetic.trainer import Trainer

from small_tasks import CPU, SMALL, positions_for, small


def test_corrupted_answers_touch_answer_letters_only() -> None:
    batch = SMALL.test_batch(50, 64, torch.Generator().manual_seed(0))
    corrupted = corrupted_answers(batch, SMALL, 0.5, torch.Generator().manual_seed(1))
    changed = corrupted.inputs != batch.inputs
    at_letters = changed[:, batch.answer_letters]
    assert changed.sum() == at_letters.sum() and 0.4 < at_letters.float().mean() < 0.6
    assert torch.equal(corrupted.labels, batch.labels)
    assert corrupted.inputs[:, batch.answer_letters].min() >= SMALL.FIRST_LETTER
    assert corrupted_answers(batch, SMALL, 0.0, torch.Generator()) is batch


@pytest.mark.parametrize("padded", [False, True])
def test_corrupted_questions_change_one_letter_of_a_key_that_is_asked_for(padded: bool) -> None:
    batch = SMALL.test_batch(200, 64, torch.Generator().manual_seed(0))
    markers, _ = SMALL.query_markers(batch.inputs)
    batch = batch.padded(*SMALL.padded_shape()).select(slice(0, 150)) if padded else batch
    assert torch.equal(batch.question_letters, markers[0, :, None] + torch.tensor([1, 2]))
    corrupted = corrupted_questions(batch, SMALL, 0.5, torch.Generator().manual_seed(1))
    changed = corrupted.inputs != batch.inputs
    of_questions = changed[:, batch.question_letters]
    assert changed.sum() == of_questions.sum() and of_questions.sum(dim=2).max() == 1
    assert 0.4 < of_questions.any(dim=2).float().mean() < 0.6
    first, second = of_questions.float().mean(dim=(0, 1))
    assert 0.2 < first < 0.3 and 0.2 < second < 0.3
    assert torch.equal(corrupted.labels, batch.labels)
    assert corrupted.inputs[:, batch.question_letters].min() >= SMALL.FIRST_LETTER
    starts = SMALL.key_starts(batch.inputs)
    letters = torch.stack([batch.inputs.gather(1, starts), batch.inputs.gather(1, starts + 1)], dim=2)
    put_in = corrupted.inputs[:, batch.question_letters]  # (batch, queries, 2), against letters of (batch, pairs, 2)
    misplaced = (put_in[:, :, None] == letters.flip(2)[:, None]).any(dim=2)[of_questions].float().mean()
    in_place = (put_in[:, :, None] == letters[:, None]).any(dim=2)[of_questions].float().mean()
    assert 0.45 < misplaced < 0.65 and in_place < 0.15
    assert corrupted_questions(batch, SMALL, 0.0, torch.Generator()) is batch


def test_questions_are_corrupted_after_the_plateau_and_after_what_is_hard_was_chosen(tmp_path: Path) -> None:
    settings = RunSettings(steps=8, batch=64, corrupt_questions=1.0, ease_in=4, replay=0.25, plateau=1e9, log_every=1)
    trainer = Trainer(SMALL, settings, 0, tmp_path, CPU)

    def known_keys() -> float:
        batch, _ = trainer._next_batch(0.0)
        starts = SMALL.key_starts(batch.inputs)
        keys = torch.stack([batch.inputs.gather(1, starts), batch.inputs.gather(1, starts + 1)], dim=2)
        asked = batch.inputs[:, batch.question_letters]
        return (asked[:, :, None] == keys[:, None]).all(dim=3).any(dim=2).float().mean().item()

    assert known_keys() == 1
    trainer.left_plateau, trainer.step = {"step": 0}, 2
    assert 0.3 < known_keys() < 0.7
    trainer.step = 4
    assert known_keys() < 0.2
    (kept,) = trainer.replay._kept.values()
    stored = kept["inputs"][kept["losses"] >= 0]
    assert len(stored) > 0
    starts, (markers, _) = SMALL.key_starts(stored), SMALL.query_markers(stored)
    first = stored.gather(1, markers + 1)
    assert bool((first[:, :, None] == stored.gather(1, starts)[:, None]).any(dim=2).all()), "kept without"


def test_corruption_needs_something_to_corrupt(tmp_path: Path) -> None:
    copy, two_back = small("copy"), small("two_back")
    with pytest.raises(ValueError, match="corrupt-questions: samples of copy hold nothing that it could corrupt"):
        Trainer(copy, RunSettings(steps=1, corrupt_questions=0.5), 0, tmp_path, CPU)
    for settings in (RunSettings(steps=1, corrupt=0.5), RunSettings(steps=1, corrupt_start=0.5, ease_in=1)):
        with pytest.raises(ValueError, match="corrupt: samples of two_back hold nothing"):
            Trainer(two_back, settings, 0, tmp_path, CPU)
    Trainer(copy, RunSettings(steps=1, corrupt=0.5), 0, tmp_path, CPU)
    with pytest.raises(ValueError, match="corrupt-questions is a probability, from 0 to 1, got 1.5"):
        RunSettings(corrupt_questions=1.5)


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


def test_window_of_heads_with_alibi() -> None:
    """Half of the batches: these heads see the last tokens only, and no others change."""
    window = AlibiWindow(3, heads=4, alibi_heads=2, device=CPU)
    generator = torch.Generator().manual_seed(0)
    masks = []
    for _ in range(1000):
        window.draw(generator)
        masks.append(window.mask(6))
    narrow = [mask for mask in masks if mask is not None]
    assert 450 < len(narrow) < 550
    for mask in narrow:
        assert mask.shape == (1, 4, 6, 6) and mask[0, 0].int().tolist()[4] == [0, 0, 1, 1, 1, 0]
        assert torch.equal(mask[0, 2:], torch.ones(6, 6, dtype=torch.bool).tril().expand(2, -1, -1))
    window.draw(generator, strength=0.0)
    assert not window.narrow and window.mask(6) is None
    window = AlibiWindow(0, 4, 2, CPU)
    window.draw(generator)
    assert window.mask(6) is None


@pytest.mark.parametrize("method", ["softmax", "asentmax"])
def test_window_as_the_attention_takes_it(method: str) -> None:
    """One that is as wide as the sample is as none, and a narrow one keeps far tokens out."""
    torch.manual_seed(0)
    model = build_model(SMALL, method, "nape").double().eval()
    batch = SMALL.test_batch(3, 64, torch.Generator().manual_seed(0))
    length = batch.inputs.shape[1]
    wide, narrow = (AlibiWindow(window, SMALL.heads, SMALL.heads, CPU) for window in (length, 5))
    wide.narrow = narrow.narrow = True
    torch.testing.assert_close(outputs_at(model, batch, wide.mask(length)), outputs_at(model, batch))
    seen = outputs_at(model, batch, narrow.mask(length))
    batch.inputs[:, 0] = SMALL.FIRST_LETTER  # further back than all layers' windows reach
    torch.testing.assert_close(outputs_at(model, batch, narrow.mask(length)), seen)


def test_window_needs_heads_with_alibi_and_tokens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="alibi-window is for heads with ALiBi, and positions nope"):
        RunSettings(positions="nope", alibi_window=8)
    with pytest.raises(ValueError, match="alibi-window must be at least 1"):
        RunSettings(alibi_window=-1)
    task = small("max_retrieval")
    model = build_model(task, "asentmax", "nope")
    batch = task.test_batch(2, 8, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="leave out alibi-window"):
        outputs_at(model, batch, torch.ones(1, 1, 8, 8, dtype=torch.bool))
    settings = RunSettings(positions="alibi", alibi_window=8)
    with pytest.raises(ValueError, match="alibi-window is for tasks of tokens"):
        Trainer(task, settings, 0, tmp_path, CPU)
    with pytest.raises(ValueError, match="must be smaller than a sample, 91 tokens at most, to have an effect; got 91"):
        Trainer(SMALL, RunSettings(alibi_window=91), 0, tmp_path, CPU)
