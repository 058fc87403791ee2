"""Changes made in training only: corrupted answers, scaled scores, noise on keys, omitted heads, ALiBi's window."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.synthetic.models import METHODS, build_model, outputs_at
from recipes.synthetic.regularise import AlibiWindow, HeadDrop, ScoreJitter, corrupted_answers
from recipes.synthetic.settings import RunSettings
from recipes.synthetic.trainer import Trainer

from small_tasks import CPU, SMALL, positions_for, small


def test_corrupted_answers_change_answer_letters_only(tmp_path: Path) -> None:
    batch = SMALL.test_batch(50, 64, torch.Generator().manual_seed(0))
    corrupted = corrupted_answers(batch, SMALL, 0.5, torch.Generator().manual_seed(1))
    changed = corrupted.inputs != batch.inputs
    at_letters = changed[:, batch.answer_letters]
    assert changed.sum() == at_letters.sum() and 0.4 < at_letters.float().mean() < 0.6
    assert torch.equal(corrupted.labels, batch.labels)
    assert corrupted.inputs[:, batch.answer_letters].min() >= SMALL.FIRST_LETTER
    assert corrupted_answers(batch, SMALL, 0.0, torch.Generator()) is batch
    Trainer(small("copy"), RunSettings(steps=1, corrupt=0.5), 0, tmp_path, CPU)
    with pytest.raises(ValueError, match="corrupt: samples of two_back have nothing that it could corrupt"):
        Trainer(small("two_back"), RunSettings(steps=1, corrupt=0.5), 0, tmp_path, CPU)


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
    if method != "adaptive_temperature":  # outside of training it is another mapping
        torch.testing.assert_close(evaluated, plain)
    jitter.off()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[alibi_heads * SMALL.head_dim :] *= 0.3
    torch.testing.assert_close(outputs_at(model, batch), jittered)


def test_jitter_draws_one_factor_for_each_sample() -> None:
    jitter = ScoreJitter(build_model(SMALL, "entmax", "nape"), 0.5, 2)
    jitter.draw(1000, 9, torch.Generator().manual_seed(0))
    factor = jitter.factor
    assert factor is not None and factor.shape == (1000, 1, 1)
    assert 0.5 <= float(factor.min()) < 0.51 and 0.99 < float(factor.max()) <= 1.0
    jitter = ScoreJitter(build_model(SMALL, "entmax", "nape"), 0.01, 2, log_uniform=True)
    jitter.draw(1000, 9, torch.Generator().manual_seed(0))
    assert jitter.factor is not None
    logarithm = jitter.factor.log10()
    assert -2 <= float(logarithm.min()) < -1.98 and abs(float(logarithm.mean()) + 1) < 0.05
    jitter.draw(1000, 9, torch.Generator().manual_seed(0), 0.0)
    assert bool((jitter.factor == 1).all())


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


@pytest.mark.parametrize("method", ["asentmax", "softmax", "stick_breaking"])
def test_heads_without_alibi_are_left_out_sample_by_sample(method: str) -> None:
    torch.manual_seed(0)
    alibi_heads = 2 if positions_for(method) == "nape" else 0
    model = build_model(SMALL, method, positions_for(method)).train()
    batch = SMALL.test_batch(3, 64, torch.Generator().manual_seed(0))
    plain = outputs_at(model, batch)
    drop = HeadDrop(model, 0.9, alibi_heads)
    assert torch.equal(outputs_at(model, batch), plain)  # nothing was drawn yet
    drop.draw(3, torch.Generator().manual_seed(0))
    assert drop.factors is not None and len(drop.factors) == SMALL.layers
    dropped = outputs_at(model, batch)
    assert not torch.allclose(dropped, plain)
    model.eval()
    torch.testing.assert_close(outputs_at(model, batch), plain)
    model.train()
    factors, drop.factors = drop.factors, None
    for sample in range(3):  # the same, by scaling columns of the output projections
        copy = build_model(SMALL, method, positions_for(method))
        copy.load_state_dict(model.state_dict())
        with torch.no_grad():
            for layer, factor in zip(copy.model.layers, factors, strict=True):
                layer.self_attn.o_proj.weight *= factor[sample]
        alone = outputs_at(copy.train(), batch.select(slice(sample, sample + 1)))
        torch.testing.assert_close(dropped[sample : sample + 1], alone, rtol=1e-4, atol=1e-5)
    drop.draw(3, torch.Generator().manual_seed(0), 0.0)  # still tensors, so that a compiled model stays compiled
    assert drop.factors is not None and all(bool((factor == 1).all()) for factor in drop.factors)
    assert torch.equal(outputs_at(model, batch), plain)


def test_one_of_the_dropped_heads_stays_and_the_sum_is_kept() -> None:
    drop = HeadDrop(build_model(SMALL, "entmax", "nape"), 0.75, 2)
    drop.draw(1000, torch.Generator().manual_seed(0))
    assert drop.factors is not None
    for factor in drop.factors:
        heads = factor.unflatten(2, (SMALL.heads, SMALL.head_dim))[:, 0, :, 0]
        assert bool((heads[:, :2] == 1).all())
        free = heads[:, 2:]
        torch.testing.assert_close(free.sum(dim=1), torch.full((1000,), float(SMALL.heads - 2)))
        chance = 1 / (SMALL.heads - 2)
        assert abs(float((free > 0).float().mean()) - (chance + (1 - chance) * 0.25)) < 0.03
    assert not torch.equal(*drop.factors[:2])


def test_the_window_narrows_heads_with_alibi_in_half_of_the_batches() -> None:
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
    none = AlibiWindow(0, 4, 2, CPU)
    none.draw(generator)
    assert none.mask(6) is None


@pytest.mark.parametrize("method", ["softmax", "asentmax"])
def test_the_attention_applies_the_window(method: str) -> None:
    """A window as wide as the sample changes nothing, and a narrow one hides distant tokens."""
    torch.manual_seed(0)
    model = build_model(SMALL, method, "nape").double().eval()
    batch = SMALL.test_batch(3, 64, torch.Generator().manual_seed(0))
    length = batch.inputs.shape[1]
    wide, narrow = (AlibiWindow(window, SMALL.heads, SMALL.heads, CPU) for window in (length, 5))
    wide.narrow = narrow.narrow = True
    torch.testing.assert_close(outputs_at(model, batch, wide.mask(length)), outputs_at(model, batch))
    seen = outputs_at(model, batch, narrow.mask(length))
    batch.inputs[:, 0] = SMALL.FIRST_LETTER  # further back than the windows of all layers reach
    torch.testing.assert_close(outputs_at(model, batch, narrow.mask(length)), seen)


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    for name, value in {"jitter": 0.5, "key_noise": 0.1, "head_drop": 0.1}.items():
        RunSettings(positions="nape", **{name: value})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"{name.replace('_', '-')} change heads without ALiBi"):
            RunSettings(positions="alibi", **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alibi-window is for heads with ALiBi, and positions nope"):
        RunSettings(positions="nope", alibi_window=8)
    task, window = small("max_retrieval"), RunSettings(positions="alibi", alibi_window=8)
    with pytest.raises(ValueError, match="alibi-window is for tasks with tokens"):
        Trainer(task, window, 0, tmp_path, CPU)
    with pytest.raises(ValueError, match="leave out alibi-window"):
        batch = task.test_batch(2, 8, torch.Generator().manual_seed(0))
        outputs_at(build_model(task, "asentmax", "nope"), batch, torch.ones(1, 1, 8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be smaller than a sample to have an effect.* 91 tokens .*; got 91"):
        Trainer(SMALL, RunSettings(alibi_window=91), 0, tmp_path, CPU)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "needs an end"),
        ({"schedule": "step"}, "schedule must be linear or cosine"),
        ({"jitter_law": "normal"}, "jitter-law must be uniform or log"),
        ({"corrupt": 1.5}, "corrupt is a probability, from 0 to 1, got 1.5"),
        ({"alibi_window": -1}, "alibi-window must be at least 1"),
        ({"hard_weight": 1.5}, "hard-weight must be from 0 to 1, got 1.5"),
        ({"tries": 0}, "at least 1; got 0"),
        ({"tries": 2}, "give --start-from"),
        ({"attention": "delta"}, "attention must be NAME=VALUE"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunSettings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: ScoreJitter(model, 0.0, 2), "above 0 and at most 1, got 0.0"),
        (lambda model: ScoreJitter(model, 1.0, 2, noise=-0.1), "must be at least 0, got -0.1"),
        (lambda model: HeadDrop(model, 1.0, 2), "at least 0 and below 1, got 1.0"),
    ],
)
def test_sizes_of_changes_out_of_range_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(build_model(SMALL, "entmax", "nape"))  # type: ignore[operator]


def test_further_fields_of_the_attention_are_set(tmp_path: Path) -> None:
    settings = RunSettings(attention="delta=0,alibi_slopes=geometric, gamma_range=3")
    assert settings.attention_flags == {"delta": 0, "alibi_slopes": "geometric", "gamma_range": 3}
    config = Trainer(SMALL, settings, 0, tmp_path, CPU).model.config.asentmax
    assert (config.delta, config.alibi_slopes, config.gamma_range) == (0, "geometric", 3)
