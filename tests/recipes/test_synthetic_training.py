"""Training runs of the synthetic tasks with tiny models on a CPU: schedules, hard samples, resuming, giving up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recipes.synthetic import evaluate, train
from recipes.synthetic.measuring import measure
from recipes.synthetic.models import load_model, outputs_at
from recipes.synthetic.replay import HardReplay
from recipes.synthetic.settings import RunSettings
from recipes.synthetic.tasks import TASKS, Batch
from recipes.synthetic.trainer import Trainer, learning_rate

from small_tasks import CPU, SMALL, small, trained
from tiny_models import perturb_scalings

LEFT = {"step": 0, "seconds": 0.0, "samples": 0}


def test_learning_rate() -> None:
    linear = RunSettings(warmup=10, decay=0.5)
    assert learning_rate(1.0, 4, 0.0, linear) == 0.5 and learning_rate(1.0, 99, 0.5, linear) == 1.0
    assert learning_rate(1.0, 99, 0.75, linear) == 0.5 and learning_rate(1.0, 99, 1.1, linear) == 0.0
    cosine = RunSettings(warmup=0, schedule="cosine")
    assert learning_rate(2.0, 0, 0.5, cosine) == pytest.approx(1.0)


def test_resuming_is_exact(tmp_path: Path) -> None:
    """A run that is stopped after every step ends with the same weights, bit for bit."""
    task = replace(SMALL, near_misses_end=1.0, one_letter_end=0.3, min_queries=1, max_queries=5)
    settings = RunSettings(
        steps=7, batch=4, log_every=2, corrupt=0.5, jitter=0.5, jitter_law="log", head_drop=0.5, key_noise=0.1,
        hard_candidates=2, hard_weight=0.3, ease_in=3, plateau=1e9, warmup=3, validations=2, validate_multiple=1,
        validate_samples=4, replay=0.25, alibi_window=9,
    )  # fmt: skip
    straight, resumed = trained(tmp_path / "a", task, settings), trained(tmp_path / "b", task, settings, stops=True)
    assert len(straight.log) == 3 and len(straight.validations) == 2
    for name in ("loss", "gradient_norm"):
        assert [entry[name] for entry in straight.log] == [entry[name] for entry in resumed.log]
    assert straight.batches.tokens == resumed.batches.tokens and straight.kept_step == resumed.kept_step
    for (name, one), other in zip(
        straight.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    with pytest.raises(ValueError, match="other settings"):
        Trainer(task, replace(settings, warmup=4), 3, tmp_path / "b" / "seed3", CPU)


def test_changes_of_the_model_are_introduced_after_the_plateau(tmp_path: Path) -> None:
    settings = RunSettings(steps=8, batch=4, log_every=2, jitter=0.5, ease_in=4, plateau=1e9)
    trainer = Trainer(SMALL, settings, 0, tmp_path, CPU)
    assert trainer.eased_in == 0.0
    trainer.run()
    assert trainer.left_plateau is not None and trainer.left_plateau["step"] == 2
    trainer.step = 4
    assert trainer.eased_in == 0.5
    trainer.step = 100
    assert trainer.eased_in == 1.0


def test_a_run_that_stays_on_the_plateau_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task", "mqmtar", "--hidden", "32", "--heads", "4", "--steps", "9", "--batch", "4", "--log-every", "1"]
    flags += ["--give-up", "8", "--device", "cpu", "--out", str(tmp_path)]
    train.main(flags)
    folder = tmp_path / "mqmtar-asentmax-nape" / "seed0"
    run = json.loads((folder / "run.json").read_text())
    assert run["given_up"] and run["steps"] == 2 and not (folder / "model").exists()
    assert "8 samples did not leave the plateau" in capsys.readouterr().out
    evaluate.main([str(folder), "--results", str(tmp_path / "results"), "--device", "cpu"])
    assert not (tmp_path / "results").exists()
    train.main([*flags, "--plateau", "100", "--name", "left"])
    assert not json.loads((tmp_path / "mqmtar-asentmax-nape-left" / "seed0" / "run.json").read_text())["given_up"]


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
    """The first step without ALiBi's window and the first one with it, by a clock of the test's own."""
    trainer = Trainer(SMALL, RunSettings(steps=6, alibi_window=8), 0, tmp_path, CPU)
    now, forms = 0.0, [False, False, True, False, True, True]

    def update() -> None:
        nonlocal now
        trainer.perturbations.window.narrow = forms[trainer.step]
        now += 100.0 if trainer.step in (0, 2) else 1.0

    monkeypatch.setattr("recipes.synthetic.trainer.time.monotonic", lambda: now)
    monkeypatch.setattr(trainer, "update", update)
    assert trainer.run() and trainer.seconds == 4.0


def test_a_run_begins_with_the_weights_of_another(tmp_path: Path) -> None:
    """Its summary counts the samples of both, and its training distribution is that of both."""
    task = small("mqmtar")
    first = trained(tmp_path / "first", replace(task, near_misses=0.5), RunSettings(steps=2, batch=8))
    start = tmp_path / "first" / "seed3"
    (start / "run.json").write_text(json.dumps(first.summary()))
    settings = RunSettings(steps=1, batch=8, start_from=str(start))
    second = Trainer(task, settings, 0, tmp_path / "second", CPU)
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, first.model.state_dict()[name])
    plain = Trainer(task, RunSettings(steps=1), 0, tmp_path, CPU)
    assert not torch.equal(second.batches.data.get_state(), plain.batches.data.get_state())
    second.run()
    summary = second.summary()
    assert summary["track"] == "own" and summary["samples"] == 8 and summary["started_from"]["samples"] == 16
    assert "log" not in summary and "log" not in summary["started_from"]
    with pytest.raises(FileNotFoundError, match="start-from expects the folder of a finished seed"):
        Trainer(task, replace(settings, start_from=str(tmp_path)), 0, tmp_path / "third", CPU)
    with pytest.raises(ValueError, match="was trained on mqmtar, but this run learns copy"):
        Trainer(small("copy"), settings, 0, tmp_path / "third", CPU)
    with pytest.raises(ValueError, match="has another method and positions than this run"):
        Trainer(task, replace(settings, method="softmax", positions="rope"), 0, tmp_path / "third", CPU)
    with pytest.raises(ValueError, match="has other sizes"):
        Trainer(replace(task, hidden=32), settings, 0, tmp_path / "third", CPU)


def test_hard_samples_are_judged_without_chance(tmp_path: Path) -> None:
    settings = RunSettings(steps=1, batch=4, jitter=0.5, key_noise=0.5, head_drop=0.5, hard_candidates=3, hard_from=0)
    trainer = Trainer(SMALL, settings, 0, tmp_path, CPU)
    batches = trainer.batches
    perturb_scalings(trainer.model)
    candidates = SMALL.test_batch(12, 64, torch.Generator().manual_seed(0))
    judged = batches.hardness(candidates)
    trainer.perturbations.draw(candidates, batches.data, 1.0)
    assert judged.shape == candidates.labels.shape and not torch.allclose(trainer.losses(candidates), judged)
    torch.testing.assert_close(batches.hardness(candidates), judged, rtol=0, atol=0)
    states = [generator.get_state() for generator in (batches.data, batches.shapes)]
    drawn = SMALL.training_batch(12, batches.data, batches.shapes, 0.0)
    for generator, state in zip((batches.data, batches.shapes), states, strict=True):
        generator.set_state(state)
    chosen, weights = batches.next(0.0, False)
    expected = batches.hardness(drawn).sum(dim=1).topk(4).values
    torch.testing.assert_close(batches.hardness(chosen).sum(dim=1), expected)
    torch.testing.assert_close(weights, torch.full(chosen.labels.shape, 1 / chosen.labels.numel()))


@pytest.mark.parametrize("candidates", [1, 3])
def test_hard_samples_weigh_more(candidates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the plateau is left, the weights follow the losses; the loss in the log is evenly weighted."""
    settings = RunSettings(
        steps=1, batch=4, warmup=0, hard_weight=0.75, hard_candidates=candidates, hard_from=0, log_every=1
    )
    trainer = Trainer(SMALL, settings, 0, tmp_path, CPU)
    batch, weights = trainer.batches.next(0.0, False)
    torch.testing.assert_close(weights, torch.full(batch.labels.shape, 1 / batch.labels.numel()))
    trainer.left_plateau = LEFT
    batch, weights = trainer.batches.next(0.0, True)
    losses = trainer.batches.hardness(batch)
    torch.testing.assert_close(weights, 0.25 / losses.numel() + 0.75 * losses / losses.sum())
    one = torch.zeros_like(weights)
    one[1, 2] = 1.0
    expected = torch.autograd.grad(trainer.losses(batch)[1, 2], list(trainer.model.parameters()))
    gradients: list[torch.Tensor] = []
    monkeypatch.setattr(trainer.batches, "next", lambda progress, left: (batch, one))
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


def test_hard_samples_are_judged_with_corrupted_answers_and_kept_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RunSettings(steps=1, batch=4, corrupt=1.0, replay=0.25, hard_candidates=2, hard_from=0)
    batches = Trainer(SMALL, settings, 0, tmp_path, CPU).batches
    judged: list[Batch] = []
    hardness = batches.hardness
    monkeypatch.setattr(batches, "hardness", lambda batch: judged.append(batch) or hardness(batch))
    chosen, _ = batches.next(0.0, True)

    def first_letters(labels: torch.Tensor) -> torch.Tensor:
        return labels[:, :-1].unflatten(1, (-1, 3))[..., 1]

    (candidates,) = judged
    (kept,) = batches.replay.state().values()
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
    other = replay.mix(batch(10), "4 1")  # of other lengths, of which nothing is kept yet
    assert other.inputs[:, 0].tolist() == list(range(10, 18))
    mixed = replay.mix(batch(20), "3 1")
    assert mixed.inputs[:, 0].tolist() == [20, 21, 22, 23, 24, 25, 2, 7] and mixed.labels[6, 0] == 2
    replay.update(torch.tensor([0, 0, 0, 0, 0, 0, 50.0, 0.0]))  # the second one is solved
    assert replay.mix(batch(30), "3 1").inputs[6:, 0].tolist() == [2, 6]
    again = HardReplay(0.25, 8)
    again.restore(replay.state(), CPU)
    assert torch.equal(again.mix(batch(30), "3 1").inputs, replay.mix(batch(30), "3 1").inputs)
    assert HardReplay(0.0, 8).mix(batch(0), "3 1").inputs is not None
    with pytest.raises(ValueError, match="replay is a share of a batch: at least 0 and below 1"):
        HardReplay(1.0, 8)
    for share, batch_size in ((0.1, 8), (0.75, 1024)):
        with pytest.raises(ValueError, match=rf"a replay of {share} of {batch_size} samples is .*expected 1 to 512"):
            HardReplay(share, batch_size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's MQMTAR model, compiled, with the changes of training; then 65,536 tokens."""
    runs = tmp_path / "runs"
    everything = "--corrupt 0.5 --jitter 0.5 --hard-candidates 2 --near-misses 0.3 --one-letter 0.1 --max-queries 8"
    for method in ("asentmax", "ssmax"):
        train.main(f"--method {method} --steps 30 --log-every 10 --compile {everything} --out {runs}".split())
    losses = [entry["loss"] for entry in json.loads(next(runs.rglob("log.json")).read_text())["log"]]
    assert losses[-1] < losses[0]
    evaluate.main(f"{runs} --multiples 1 64 1024 --samples 8 --long-samples 2 --results {tmp_path / 'results'}".split())
    assert "at 1024x: 0.0% of 2 exact" in capsys.readouterr().out
