"""Hard samples: chosen by their loss, weighed, seen again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recipes.synthetic.replay import HardReplay
from recipes.synthetic.settings import RunSettings
from recipes.synthetic.tasks import Batch
from recipes.synthetic.trainer import Trainer

from small_tasks import CPU, SMALL
from tiny_models import perturb_scalings


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
