"""The batches of a training run: drawn, mixed with earlier samples, corrupted, and chosen by their loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from recipes.synthetic.models import alibi_heads
from recipes.synthetic.regularise import AlibiWindow, HeadDrop, ScoreJitter, corrupted_answers
from recipes.synthetic.replay import HardReplay
from recipes.synthetic.settings import RunSettings
from recipes.synthetic.tasks import IGNORED, Batch, MaxRetrieval, Task

__all__ = ["Perturbations", "TrainingBatches"]


class Perturbations:
    """What training changes in a model at random: its scores, its keys, its heads, and the view of heads with ALiBi.

    Args:
        model: whose layers get the hooks.
        task, settings: of the run.
        device: where the model is.

    Raises:
        ValueError: ALiBi's window has no effect on this task.
    """

    def __init__(self, model: PreTrainedModel, task: Task, settings: RunSettings, device: torch.device) -> None:
        if settings.alibi_window > 0 and isinstance(task, MaxRetrieval):
            raise ValueError("alibi-window is for tasks with tokens; max_retrieval's model of items takes no mask")
        longest = task.padded_shape()[0]
        if settings.alibi_window >= longest:
            raise ValueError(
                f"alibi-window must be smaller than a sample to have an effect, and samples have {longest} tokens at "
                f"most; got {settings.alibi_window}"
            )
        with_alibi = alibi_heads(settings.positions, task.heads)
        self.jitter = ScoreJitter(
            model, settings.jitter, with_alibi, settings.key_noise, log_uniform=settings.jitter_law == "log"
        )
        self.heads = HeadDrop(model, settings.head_drop, with_alibi)
        self.window = AlibiWindow(settings.alibi_window, task.heads, with_alibi, device)

    def draw(self, batch: Batch, generator: torch.Generator, strength: float) -> None:
        """New changes for this batch. ALiBi's window is drawn apart and earlier, as hardness is judged with it."""
        self.jitter.draw(len(batch), batch.inputs.shape[1], generator, strength)
        self.heads.draw(len(batch), generator, strength)

    def fixed(self, size: int, generator: torch.Generator) -> None:
        """No randomness: the smallest factor of jitter for all samples, no noise, all heads."""
        self.jitter.lowest(size, generator.device)
        self.heads.draw(size, generator, 0.0)


class TrainingBatches:
    """Draws a run's training batches, and says how much each target counts.

    Args:
        task, settings: of the run.
        source: seed of the data, and of everything else that is random in training.
        device: where samples are drawn.
        perturbations: of the model.
        losses: a batch -> its (samples, targets) losses, 0 where the label is IGNORED.

    Attributes:
        data: the generator of the data and of what is changed in them, on the device.
        shapes: the generator of lengths, on the CPU.
        tokens: how many input tokens the run has trained on.

    Raises:
        ValueError: the settings corrupt answers of a task that has none to corrupt.
    """

    def __init__(
        self,
        task: Task,
        settings: RunSettings,
        source: int,
        device: torch.device,
        perturbations: Perturbations,
        losses: Callable[[Batch], torch.Tensor],
    ) -> None:
        self.task, self.settings, self.perturbations, self._losses = task, settings, perturbations, losses
        sample = task.test_batch(1, task.max_length, torch.Generator().manual_seed(0))
        if settings.corrupt > 0 and sample.answer_letters.numel() == 0:
            raise ValueError(f"corrupt: samples of {task.name} have nothing that it could corrupt; leave it out")
        self.data = torch.Generator(device).manual_seed(source)
        self.shapes = torch.Generator().manual_seed(source)
        self.replay = HardReplay(settings.replay, settings.batch)
        self.tokens = 0

    def next(self, progress: float, left_plateau: bool) -> tuple[Batch, torch.Tensor]:
        """The next batch, and the weight of each target's loss, (samples, targets), which sum to 1.

        Args:
            progress: part of the run that is over, from 0 to 1.
            left_plateau: whether the run has left the plateau.
        """
        settings = self.settings
        choosing = settings.hard_candidates > 1 and progress >= settings.hard_from
        size = settings.batch * (settings.hard_candidates if choosing else 1)
        batch = self.task.training_batch(size, self.data, self.shapes, progress)
        self.tokens += settings.batch * batch.inputs.shape[1]
        lengths = f"{batch.inputs.shape[1]} {batch.labels.shape[1]}"
        if settings.compile:
            batch = batch.padded(*self.task.padded_shape())
        replaying = settings.replay > 0 and left_plateau
        if replaying:
            batch = self.replay.mix(batch, lengths)
        batch = corrupted_answers(batch, self.task, settings.corrupt, self.data)
        weighing = settings.hard_weight > 0 and left_plateau
        if choosing or replaying or weighing:
            # Samples are judged with corrupted answers, which reveal nothing, and kept for replay without corruption.
            hardness = self.hardness(batch)
            losses = hardness.sum(dim=1)
            if replaying:
                self.replay.update(losses)
            if choosing:
                hardest = losses.topk(settings.batch).indices
                batch, hardness = batch.select(hardest), hardness[hardest]
        scored = (batch.labels != IGNORED).float()
        weights = scored / scored.sum()
        if weighing:
            weights = torch.lerp(weights, hardness / hardness.sum().clamp(min=1e-30), settings.hard_weight)
        return batch, weights

    @torch.no_grad()
    def hardness(self, batch: Batch) -> torch.Tensor:
        """(samples, targets) losses without the random changes of the model, at the smallest factor of jitter.

        With noise or with heads left out, any sample may have a large loss by chance. Without them only those do that
        the model gets wrong, or nearly so. ALiBi's window stays: a sample that needs more than the window is wrong.
        """
        size = self.settings.batch
        self.perturbations.fixed(size, self.data)
        starts = range(0, len(batch), size)
        return torch.cat([self._losses(batch.select(slice(start, start + size))) for start in starts])

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "data": self.data.get_state(),
            "shapes": self.shapes.get_state(),
            "replay": self.replay.state(),
            "tokens": self.tokens,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.data.set_state(state["data"])
        self.shapes.set_state(state["shapes"])
        self.replay.restore(state["replay"], self.data.device)
        self.tokens = state["tokens"]
