"""Training runs of the synthetic tasks: schedules, resuming, giving up; with tiny models on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recipes.synthetic import evaluate, train
from recipes.synthetic.measuring import measure
from recipes.synthetic.models import load_model, outputs_at
from recipes.synthetic.settings import RunSettings
from recipes.synthetic.tasks import TASKS
from recipes.synthetic.trainer import Trainer, learning_rate

from small_tasks import CPU, SMALL, small, trained


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


def test_resuming_is_exact(tmp_path: Path) -> None:
    task = replace(SMALL, near_misses_end=1.0, one_letter_end=0.3, min_queries=1, max_queries=5)
    settings = RunSettings(
        steps=7, batch=4, log_every=2, corrupt=0.5, jitter=0.5, jitter_law="log", channel_drop=0.1, head_drop=0.5,
        key_noise=0.1, key_noise_loss=1e9, hard_candidates=2,
        ease_in=3, plateau=1e9, warmup=3, validations=2, validate_multiple=1, validate_samples=4,
        alpha_start=1.1, alpha_until=0.6, corrupt_start=0.2, average=0.5, replay=0.25, alibi_window=9,
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


def test_corruption_goes_from_one_share_to_another_after_the_plateau(tmp_path: Path) -> None:
    settings = RunSettings(steps=8, batch=64, corrupt=1.0, corrupt_start=0.25, ease_in=4, plateau=1e9, log_every=1)
    assert [settings.corrupt_at(part) for part in (0.0, 0.5, 1.0)] == [0.25, 0.625, 1.0]
    assert replace(settings, corrupt_start=None).corrupt_at(0.0) == 1.0
    trainer = Trainer(SMALL, settings, 0, tmp_path, CPU)

    def wrong_inputs() -> float:
        batch, _ = trainer._next_batch(0.0)
        letters = batch.inputs[:, batch.answer_letters]
        return (letters != batch.labels[:, batch.answer_letters - batch.answer_letters[0] + 1]).float().mean().item()

    assert 0.1 < wrong_inputs() < 0.4
    trainer.left_plateau, trainer.step = {"step": 0}, 2
    assert 0.45 < wrong_inputs() < 0.8
    trainer.step = 4
    assert wrong_inputs() > 0.95
    with pytest.raises(ValueError, match="give --ease-in"):
        RunSettings(corrupt_start=0.5)
    with pytest.raises(ValueError, match="corrupt-start is a probability, from 0 to 1, got 2"):
        RunSettings(corrupt_start=2.0, ease_in=4)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        RunSettings(tries=0)
    with pytest.raises(ValueError, match="give --start-from"):
        RunSettings(tries=2)


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


def test_steps_that_compile_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step without ALiBi's window and the first one with it; by a clock of the test's own."""
    trainer = Trainer(SMALL, RunSettings(steps=6, alibi_window=8), 0, tmp_path, CPU)
    now, forms = 0.0, [False, False, True, False, True, True]

    def update() -> None:
        nonlocal now
        trainer.window.narrow = forms[trainer.step]
        now += 100.0 if trainer.step in (0, 2) else 1.0

    monkeypatch.setattr("recipes.synthetic.trainer.time.monotonic", lambda: now)
    monkeypatch.setattr(trainer, "_update", update)
    assert trainer.run() and trainer.seconds == 4.0
