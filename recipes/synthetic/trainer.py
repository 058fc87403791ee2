"""The training of one model: updates, log, validation, and checkpoints that resume exactly."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import hf_asentmax
from recipes.synthetic.batches import Perturbations, TrainingBatches
from recipes.synthetic.measuring import VALIDATION_SEED, autocast, measure
from recipes.synthetic.models import build_model, outputs_at
from recipes.synthetic.settings import RunSettings
from recipes.synthetic.start import load_weights, runs_before
from recipes.synthetic.tasks import IGNORED, Batch, Task

__all__ = ["Trainer", "learning_rate"]

BETAS, CLIP = (0.9, 0.99), 1.0  # of AdamW, and the largest norm of the gradient: the paper's
SAVE_EVERY = 60.0  # seconds between two checkpoints
# Added to the data's seed in a run that begins with another run's weights, so that it draws other samples.
_FURTHER_DATA = 1_000_003
_COUNTERS = ("step", "seconds", "loss_sum", "norm_sum", "log", "validations", "left_plateau", "kept_step")


def learning_rate(peak: float, step: int, progress: float, settings: RunSettings) -> float:
    """The learning rate of an update: warm-up by steps, then the schedule by the part of the run that is over."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    if settings.schedule == "cosine":
        return peak * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * warm * max(0.0, min(1.0, (1 - progress) / max(settings.decay, 1e-9)))


class Trainer:
    """Trains one model and keeps what a resumed run needs in ``folder/checkpoint.pt``.

    A run that is limited by steps is a function of task, settings and seed, wherever it was interrupted. The learning
    rate of a run that is limited by minutes follows the clock.

    Args:
        task, settings, seed: what to train.
        folder: for the checkpoint and the model. An interrupted run in this folder is continued.
        device: where to train.

    Raises:
        ValueError: the settings do not fit the task, or the folder's checkpoint belongs to other settings.
        FileNotFoundError: `settings.start_from` has no finished run.
    """

    def __init__(self, task: Task, settings: RunSettings, seed: int, folder: Path, device: torch.device) -> None:
        self.task, self.settings, self.seed, self.folder, self.device = task, settings, seed, folder, device
        torch.manual_seed(seed)
        self.model = build_model(task, settings.method, settings.positions, settings.attention_flags)
        self.model.to(device)  # type: ignore[arg-type]
        self.earlier = load_weights(self.model, task, settings) if settings.start_from else None
        self.perturbations = Perturbations(self.model, task, settings, device)
        source = seed + 1 + _FURTHER_DATA * runs_before(self.earlier)
        self.batches = TrainingBatches(task, settings, source, device, self.perturbations, self.losses)
        self.forward: nn.Module = torch.compile(self.model) if settings.compile else self.model  # type: ignore[assignment]
        self.optimizer = torch.optim.AdamW(
            hf_asentmax.parameter_groups(self.model, 0.0), lr=task.lr, betas=BETAS, fused=device.type == "cuda"
        )
        self.step, self.seconds = 0, 0.0
        self.loss_sum, self.norm_sum = (torch.zeros((), device=device) for _ in range(2))  # since the log's last entry
        self.log: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self.left_plateau: dict[str, Any] | None = None
        self.kept_step: int | None = None
        if self._checkpoint.exists():
            self._restore()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def given_up(self) -> bool:
        """Whether the run has ended because it did not leave the plateau."""
        samples = self.step * self.settings.batch
        return self.left_plateau is None and 0 < self.settings.give_up <= samples

    @property
    def progress(self) -> float:
        """The part of the run that is over, from 0 to 1."""
        steps, minutes = self.settings.steps, self.settings.minutes
        return max(self.step / steps if steps > 0 else 0.0, self.seconds / (60 * minutes) if minutes > 0 else 0.0)

    @property
    def eased_in(self) -> float:
        """How much of the changes of the model is on: all, or from none to all once the plateau has been left."""
        if self.settings.ease_in == 0:
            return 1.0
        if self.left_plateau is None:
            return 0.0
        return min(1.0, (self.step - self.left_plateau["step"]) / self.settings.ease_in)

    def run(self, stop_after: float = math.inf) -> bool:
        """Trains to the end, or for about `stop_after` minutes of this process.

        Returns:
            Whether the run is over. If not, a checkpoint was saved, and another call continues.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model.train()
        process_start = last_save = time.monotonic()
        clock = process_start
        compiled: set[bool] = set()  # the first step with or without ALiBi's window compiles, and does not count
        with self._bar() as bar:
            while self.progress < 1 and not self.given_up:
                self.update()
                self.step += 1
                bar.update()
                if self.perturbations.window.narrow not in compiled:
                    compiled.add(self.perturbations.window.narrow)
                    self._wait()
                    clock = time.monotonic()
                now = time.monotonic()
                self.seconds, clock = self.seconds + now - clock, now
                if self.step % self.settings.log_every == 0:
                    self._write_log(bar)
                if len(self.validations) + 1 <= self.settings.validations * self.progress:
                    self._wait()
                    self.seconds += time.monotonic() - clock
                    self._validate(bar)
                    clock = time.monotonic()
                now = time.monotonic()
                if now - process_start >= 60 * stop_after and self.progress < 1 and not self.given_up:
                    self._save()
                    return False
                if now - last_save >= SAVE_EVERY:
                    self._save()
                    last_save = now
        self.model.eval()
        if self.settings.validations == 0 and not self.given_up:
            self._keep()
        self._save()
        return True

    def summary(self) -> dict[str, Any]:
        """What a results file says about the run. The log is not part of it, except for its last loss."""
        samples = self.step * self.settings.batch
        return {
            "task": self.task.name,
            "track": self.task.track if self.earlier is None or self.earlier["track"] == "paper" else "own",
            "seed": self.seed,
            "task_settings": asdict(self.task),
            "settings": asdict(self.settings),
            "steps": self.step,
            "samples": samples,
            "seconds": round(self.seconds, 1),
            "samples_per_second": round(samples / self.seconds, 1) if self.seconds > 0 else 0.0,
            "tokens_per_second": round(self.batches.tokens / self.seconds, 1) if self.seconds > 0 else 0.0,
            "started_from": self.earlier,
            "left_plateau": self.left_plateau,
            "given_up": self.given_up,
            "kept_step": self.kept_step,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "validations": self.validations,
            "final_loss": self.log[-1]["loss"] if self.log else None,
        }

    def profile(self, steps: int = 5) -> str:
        """A table of where the time of a few updates goes; on a GPU, by kernel."""
        self.model.train()
        for _ in range(3):
            self.update()
        self._wait()
        on_gpu = self.device.type == "cuda"
        activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profiler:
            for _ in range(steps):
                self.update()
            self._wait()
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        return str(profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))

    def update(self) -> None:
        """One update of the weights."""
        progress, strength = self.progress, self.eased_in
        self.perturbations.window.draw(self.batches.shapes, strength)  # first: hardness is judged with the window
        batch, weights = self.batches.next(progress, self.left_plateau is not None)
        self.perturbations.draw(batch, self.batches.data, strength)
        losses = self.losses(batch)
        loss = (losses * weights).sum()
        rate = learning_rate(self.task.lr, self.step, progress, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss.backward()
        self.norm_sum += nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += losses.detach().sum() / (batch.labels != IGNORED).sum()  # evenly weighted, whatever the update

    def losses(self, batch: Batch) -> torch.Tensor:
        """(samples, targets) losses of the model as it is now perturbed, 0 where the label is IGNORED."""
        mask = self.perturbations.window.mask(batch.inputs.shape[1])
        with autocast(self.task, self.device):
            logits = outputs_at(self.forward, batch, mask)
        return nn.functional.cross_entropy(logits.float().transpose(1, 2), batch.labels, reduction="none")

    def _bar(self) -> tqdm[Any]:
        return tqdm(
            total=self.settings.steps or None,
            initial=self.step,
            unit="step",
            desc=f"{self.folder.parent.name} {self.folder.name}",
            mininterval=1.0 if sys.stderr.isatty() else 15.0,  # few lines in a log file
        )

    def _write_log(self, bar: tqdm[Any]) -> None:
        loss, norm = (float(total) / self.settings.log_every for total in (self.loss_sum, self.norm_sum))
        self.loss_sum.zero_()
        self.norm_sum.zero_()
        self.log.append({"step": self.step, "seconds": round(self.seconds, 2), "loss": loss, "gradient_norm": norm})
        if self.left_plateau is None and loss < self.settings.plateau:
            samples = self.step * self.settings.batch
            self.left_plateau = {"step": self.step, "seconds": round(self.seconds, 1), "samples": samples}
        rate = self.step * self.settings.batch / self.seconds if self.seconds > 0 else 0.0
        bar.set_postfix_str(
            f"loss {loss:.5f}, gradient {norm:.3g}, {rate:,.0f} samples/s, {self.seconds:.0f} s", refresh=False
        )

    def _validate(self, bar: tqdm[Any]) -> None:
        self.model.eval()
        length = self.settings.validate_multiple * self.task.max_length
        result = measure(self.model, self.task, length, self.settings.validate_samples, seed=VALIDATION_SEED)
        self.model.train()
        better = all(_error(result) <= _error(earlier) for earlier in self.validations)
        self.validations.append({"step": self.step, **result})
        bar.write(f"step {self.step}: " + ", ".join(f"{name} {value}" for name, value in result.items()))
        if better:
            self._keep()

    def _keep(self) -> None:
        self.model.save_pretrained(self.folder / "model")
        self.kept_step = self.step

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state(),
            **{name: getattr(self, name) for name in _COUNTERS},
            **self._identity(),
        }
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._checkpoint)

    def _restore(self) -> None:
        state = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        differing = [name for name, value in self._identity().items() if state[name] != value]
        if differing:
            raise ValueError(
                f"{self._checkpoint} belongs to a run with other {' and '.join(differing)}: give this run another "
                "--name or --out"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.restore(state["batches"])
        for name in _COUNTERS:
            setattr(self, name, state[name])
        for name in ("loss_sum", "norm_sum"):
            setattr(self, name, getattr(self, name).to(self.device))

    def _identity(self) -> dict[str, Any]:
        """What must agree with a checkpoint for the run to continue from it."""
        task = {"name": self.task.name, **asdict(self.task)}
        return {"task": task, "settings": asdict(self.settings), "seed": self.seed}


def _error(result: dict[str, Any]) -> float:
    """What validation minimises: e of the query-error law where there is one, else the share of wrong tokens."""
    return result["e"] if "e" in result else 1 - result["token_accuracy"]
