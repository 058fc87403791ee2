"""The training of one model: steps, log, checkpoints that resume exactly, validation."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

import hf_asentmax
from recipes.synthetic.measuring import VALIDATION_SEED, autocast, measure
from recipes.synthetic.models import alibi_heads, build_model, load_model, outputs_at
from recipes.synthetic.regularise import AlibiWindow, HeadDrop, ScoreJitter, corrupted_answers, corrupted_questions
from recipes.synthetic.replay import HardReplay
from recipes.synthetic.settings import RunSettings
from recipes.synthetic.tasks import IGNORED, Batch, MaxRetrieval, Task

__all__ = ["Trainer", "learning_rate"]

NOISE_STEP = 1.005  # by which key noise grows or shrinks in an update: twice as much after 140
_FURTHER_DATA = 1_000_003  # added to the seed of a run that begins with another's weights: other samples than those


def learning_rate(peak: float, step: int, progress: float, settings: RunSettings) -> float:
    """Warm-up by steps, then the schedule by how much of the run lies behind (0 to 1)."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    if settings.schedule == "cosine":
        return peak * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * warm * max(0.0, min(1.0, (1 - progress) / max(settings.decay, 1e-9)))


class Trainer:
    """Trains one model and keeps what a resumed run needs in ``folder/checkpoint.pt``.

    The run is a function of task, settings and seed, wherever it was interrupted, when it is limited by steps. Limited
    by minutes, its learning rate follows the clock.

    Args:
        task, settings, seed: what to train.
        folder: for the checkpoint and the model; an interrupted run found there goes on.
        device: where to train.
    """

    def __init__(self, task: Task, settings: RunSettings, seed: int, folder: Path, device: torch.device) -> None:
        self.task, self.settings, self.seed, self.folder, self.device = task, settings, seed, folder, device
        torch.manual_seed(seed)
        self.model = build_model(
            task, settings.method, settings.positions, settings.attention_flags, qk_norm=settings.qk_norm
        )
        self.model.to(device)  # type: ignore[arg-type]
        _start_projections(self.model, settings)
        self.earlier = _start_from(self.model, task, settings) if settings.start_from else None
        if settings.bf16_weights:
            self.model.to(torch.bfloat16)  # type: ignore[arg-type]
        if settings.alibi_window > 0 and isinstance(task, MaxRetrieval):
            raise ValueError("alibi-window is for tasks of tokens; max_retrieval's model of items takes no mask")
        if settings.alibi_window >= task.padded_shape()[0]:
            raise ValueError(
                f"alibi-window must be smaller than a sample, {task.padded_shape()[0]} tokens at most, to have an "
                f"effect; got {settings.alibi_window}"
            )
        _refuse_corruption_of_nothing(task, settings)
        with_alibi = alibi_heads(settings.positions, task.heads)
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False) if settings.average > 0 else None
        self.jitter = ScoreJitter(
            self.model,
            settings.jitter,
            with_alibi,
            settings.channel_drop,
            settings.key_noise,
            settings.key_noise_heads == "all",
            settings.jitter_law == "log",
        )
        self.heads = HeadDrop(self.model, settings.head_drop, with_alibi)
        self.window = AlibiWindow(settings.alibi_window, task.heads, with_alibi, device)
        self.replay = HardReplay(settings.replay, settings.batch)
        self.forward: nn.Module = torch.compile(self.model) if settings.compile else self.model  # type: ignore[assignment]
        self.optimizer = torch.optim.AdamW(
            _with_rates(hf_asentmax.parameter_groups(self.model, settings.weight_decay), self.model, settings.qk_lr),
            lr=task.lr,
            betas=(0.9, settings.beta2),
            fused=device.type == "cuda",
        )
        # One source for the data and what is done to it, on the device; one for shapes, on the host.
        source = seed + 1 + _FURTHER_DATA * _runs_before(self.earlier)
        self.data = torch.Generator(device).manual_seed(source)
        self.shapes = torch.Generator().manual_seed(source)
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.loss_sum, self.norm_sum = (torch.zeros((), device=device) for _ in range(2))  # since the log's last line
        self.noise_times = torch.ones((), device=device)  # of --key-noise, where --key-noise-loss steers it
        self.log: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self.left_plateau: dict[str, Any] | None = None
        self.kept_step: int | None = None
        self.alpha: float | None = None  # what set_alpha was given last
        if self._checkpoint.exists():
            self._restore()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def kept_model(self) -> PreTrainedModel:
        """What is validated and kept: the model, or the average of its weights."""
        return self.model if self.averaged is None else self.averaged

    @property
    def given_up(self) -> bool:
        """Whether the run has ended because it did not leave the plateau."""
        samples = self.step * self.settings.batch
        return self.left_plateau is None and 0 < self.settings.give_up <= samples

    @property
    def progress(self) -> float:
        """How much of the run lies behind, from 0 to 1."""
        steps, minutes = self.settings.steps, self.settings.minutes
        return max(self.step / steps if steps > 0 else 0.0, self.seconds / (60 * minutes) if minutes > 0 else 0.0)

    def run(self, stop_after: float = math.inf) -> bool:
        """Train to the end, or for about `stop_after` minutes of this process.

        Returns:
            Whether the run is over; else a checkpoint was saved, and another call goes on.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model.train()
        process_start = last_save = time.monotonic()
        clock = process_start
        compiled: set[tuple[bool, float | None]] = set()  # forms of a step; its first one compiles, and does not count
        bar = tqdm(
            total=self.settings.steps or None,
            initial=self.step,
            unit="step",
            desc=f"{self.folder.parent.name} {self.folder.name}",
            mininterval=1.0 if sys.stderr.isatty() else 15.0,  # a log file is spared thousands of lines
        )
        while self.progress < 1 and not self.given_up:
            self._update()
            self.step += 1
            bar.update()
            form = (self.window.narrow, self.alpha)
            if form not in compiled:
                compiled.add(form)
                self._wait()
                clock = time.monotonic()
            now = time.monotonic()
            self.seconds, clock = self.seconds + now - clock, now
            if self.step % self.settings.log_every == 0:
                self._write_log(bar)
            due = self.settings.validations * self.progress >= len(self.validations) + 1
            if due and self.settings.validations > 0:
                self._wait()
                self.seconds += time.monotonic() - clock
                self._validate(bar)
                clock = time.monotonic()
            now = time.monotonic()
            if now - process_start >= 60 * stop_after and self.progress < 1 and not self.given_up:
                self._save()
                bar.close()
                return False
            if now - last_save >= self.settings.save_every:
                self._save()
                last_save = now
        bar.close()
        self.model.eval()
        if self.settings.validations == 0 and not self.given_up:
            self._keep()
        self._save()
        return True

    def summary(self) -> dict[str, Any]:
        """What a results file says about the run."""
        rate = self.step / self.seconds if self.seconds > 0 else 0.0
        return {
            "task": self.task.name,
            "track": self.task.track if self.earlier is None or self.earlier["track"] == "paper" else "own",
            "seed": self.seed,
            "task_settings": asdict(self.task),
            "settings": asdict(self.settings),
            "steps": self.step,
            "samples": self.step * self.settings.batch,
            "seconds": round(self.seconds, 1),
            "samples_per_second": round(rate * self.settings.batch, 1),
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds > 0 else 0.0,
            "started_from": self.earlier,
            "left_plateau": self.left_plateau,
            "given_up": self.given_up,
            "kept_step": self.kept_step,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "validations": self.validations,
            "log": self.log,
        }

    def profile(self, steps: int = 5) -> str:
        """A table of what takes the time in a few (further) steps: on a GPU its kernels, those of attention by name."""
        self.model.train()
        for _ in range(3):
            self._update()
        self._wait()
        on_gpu = self.device.type == "cuda"
        activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profiler:
            for _ in range(steps):
                self._update()
            self._wait()
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        return str(profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))

    def _update(self) -> None:
        settings, progress = self.settings, self.progress
        alpha = settings.alpha_at(progress, settings.alpha or 1.5)
        if settings.alpha_start is not None and alpha != self.alpha:
            for model in {self.model, self.kept_model}:
                hf_asentmax.set_alpha(model, alpha)
            self.alpha = alpha
        self.window.draw(self.shapes, self._eased_in())  # before the batch: its hardness is judged with it
        batch, weights = self._next_batch(progress)
        self.jitter.draw(len(batch), batch.inputs.shape[1], self.data, self._eased_in(), self.noise_times)
        self.heads.draw(len(batch), self.data, self._eased_in())
        losses = self._losses(batch)
        loss = (losses * weights).sum()
        rate = learning_rate(self.task.lr, self.step, progress, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate if self.left_plateau is None else group["rate"] * rate
        loss.backward()
        self.norm_sum += nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._move_average()
        even = losses.detach().sum() / (batch.labels != IGNORED).sum()
        self.loss_sum += even
        if settings.key_noise_loss > 0 and self.left_plateau is not None:
            self.noise_times *= torch.where(even < settings.key_noise_loss, NOISE_STEP, 1 / NOISE_STEP)

    @torch.no_grad()
    def _move_average(self) -> None:
        """The average of the weights after an update. torch's AveragedModel would wait for the GPU each time."""
        if self.averaged is not None:
            decay = self.settings.average if self.step > 0 else 0.0
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay)

    def _eased_in(self) -> float:
        """How much of the changes of scores is on: all, or from none to all after the plateau has been left."""
        if self.settings.ease_in == 0:
            return 1.0
        if self.left_plateau is None:
            return 0.0
        return min(1.0, (self.step - self.left_plateau["step"]) / self.settings.ease_in)

    def _next_batch(self, progress: float) -> tuple[Batch, torch.Tensor]:
        """What to train on, and the weight of each target's loss (samples, targets), which sum to 1."""
        settings = self.settings
        choosing = settings.hard_candidates > 1 and progress >= settings.hard_from
        size = settings.batch * (settings.hard_candidates if choosing else 1)
        batch = self.task.training_batch(size, self.data, self.shapes, progress)
        self.tokens += settings.batch * batch.inputs.shape[1]
        lengths = f"{batch.inputs.shape[1]} {batch.labels.shape[1]}"
        if settings.compile:
            batch = batch.padded(*self.task.padded_shape())
        left = self.left_plateau is not None
        replaying = settings.replay > 0 and left
        if replaying:
            batch = self.replay.mix(batch, lengths)
        batch = corrupted_answers(batch, self.task, settings.corrupt_at(self._eased_in()), self.data)
        weighing = settings.hard_weight > 0 and left
        if choosing or replaying or weighing:
            # Judged with corrupted answers, which give nothing away; kept without.
            hardness = self._hardness(batch)
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
        # Last: a sample whose question was corrupted would be hard by that.
        share = settings.corrupt_questions * self._eased_in()
        return corrupted_questions(batch, self.task, share, self.data), weights

    @torch.no_grad()
    def _hardness(self, batch: Batch) -> torch.Tensor:
        """(samples, targets) losses without what training changes in the model at random, at jitter's smallest factor.

        With noise or with heads left out any sample may have a large loss, by chance; without, only those do that the
        model gets wrong, or nearly. ALiBi's window stays: what needs more than it is wrong.
        """
        size = self.settings.batch
        self.jitter.lowest(size, self.device)
        self.heads.draw(size, self.data, 0.0)
        starts = range(0, len(batch), size)
        return torch.cat([self._losses(batch.select(slice(start, start + size))) for start in starts])

    def _losses(self, batch: Batch) -> torch.Tensor:
        """(batch, targets) losses, 0 where the label is IGNORED."""
        with autocast(self.task, self.device):
            logits = outputs_at(self.forward, batch, self.window.mask(batch.inputs.shape[1]))
        return nn.functional.cross_entropy(logits.float().transpose(1, 2), batch.labels, reduction="none")

    def _write_log(self, bar: tqdm[Any]) -> None:
        loss, norm = (float(total) / self.settings.log_every for total in (self.loss_sum, self.norm_sum))
        self.loss_sum.zero_()
        self.norm_sum.zero_()
        self.log.append({"step": self.step, "seconds": round(self.seconds, 2), "loss": loss, "gradient_norm": norm})
        if self.settings.key_noise_loss > 0:
            self.log[-1]["key_noise"] = self.settings.key_noise * float(self.noise_times)
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
        result = measure(self.kept_model, self.task, length, self.settings.validate_samples, seed=VALIDATION_SEED)
        self.model.train()
        better = all(_error(result) <= _error(earlier) for earlier in self.validations)
        self.validations.append({"step": self.step, **result})
        bar.write(f"step {self.step}: " + ", ".join(f"{name} {value}" for name, value in result.items()))
        if better:
            self._keep()

    def _keep(self) -> None:
        self.kept_model.save_pretrained(self.folder / "model")
        self.kept_step = self.step

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "data": self.data.get_state(),
            "shapes": self.shapes.get_state(),
            "replay": self.replay.state(),
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
                f"{self._checkpoint} is of a run with other {' and '.join(differing)}; name this one apart"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.data.set_state(state["data"])
        self.shapes.set_state(state["shapes"])
        self.replay.restore(state["replay"], self.device)
        for name in _COUNTERS:
            setattr(self, name, state[name])
        for name in ("loss_sum", "norm_sum", "noise_times"):
            setattr(self, name, getattr(self, name).to(self.device))

    def _identity(self) -> dict[str, Any]:
        """What must agree for a checkpoint to go on."""
        task = {"name": self.task.name, **asdict(self.task)}
        return {"task": task, "settings": asdict(self.settings), "seed": self.seed}


def _refuse_corruption_of_nothing(task: Task, settings: RunSettings) -> None:
    sample = task.test_batch(1, task.max_length, torch.Generator().manual_seed(0))
    corruptible = {
        "corrupt": (settings.corrupt > 0 or bool(settings.corrupt_start), sample.answer_letters),
        "corrupt-questions": (settings.corrupt_questions > 0, sample.question_letters),
    }
    for name, (asked_for, places) in corruptible.items():
        if asked_for and places.numel() == 0:
            raise ValueError(f"{name}: samples of {task.name} hold nothing that it could corrupt; leave it out")


_KIND = ("method", "positions", "qk_norm")  # what weights of equal shapes do not tell

_COUNTERS = (
    "step",
    "seconds",
    "tokens",
    "loss_sum",
    "norm_sum",
    "noise_times",
    "log",
    "validations",
    "left_plateau",
    "kept_step",
)


def _error(result: dict[str, Any]) -> float:
    """What validation minimises: the query-error law's e where there is one, else the share of wrong tokens."""
    return result["e"] if "e" in result else 1 - result["token_accuracy"]


def _start_from(model: PreTrainedModel, task: Task, settings: RunSettings) -> dict[str, Any]:
    """Gives the model the weights of a finished run; what is to be said of that run, with all that came before it.

    Raises:
        FileNotFoundError: no finished run is there.
        ValueError: it has another task, method or positions, or a model of another size.
    """
    folder = settings.start_from
    run_file, weights = Path(folder) / "run.json", Path(folder) / "model"
    if not run_file.exists() or not weights.exists():
        raise FileNotFoundError(
            f"start-from takes the folder of a finished seed, with run.json and model/; {folder} has not both"
        )
    run = json.loads(run_file.read_text())
    if run["task"] != task.name:
        raise ValueError(f"start-from: {folder} was trained on {run['task']}, this run is to learn {task.name}")
    found = load_model(weights).state_dict()
    differing = [name for name in _KIND if run["settings"].get(name, False) != getattr(settings, name)]
    if differing:
        raise ValueError(
            f"start-from: the run in {folder} has other {' and '.join(differing)} than this one; a table would name it "
            "by the last run's alone"
        )
    own = {name: value.shape for name, value in model.state_dict().items()}
    if own != {name: value.shape for name, value in found.items()}:
        raise ValueError(f"start-from: the model in {folder} has other weights than this run's sizes ask for")
    model.load_state_dict(found)
    earlier = run.get("started_from") or {"samples": 0, "seconds": 0.0}
    return {
        "track": run["track"],
        "command": run.get("header", {}).get("command", ""),
        "samples": run["samples"] + earlier["samples"],
        "seconds": run["seconds"] + earlier["seconds"],
        "seed": run["seed"],
        "task_settings": run["task_settings"],
        "settings": run["settings"],
        "started_from": run.get("started_from"),
    }


def _with_rates(groups: list[dict[str, Any]], model: PreTrainedModel, of_scores: float) -> list[dict[str, Any]]:
    """An optimizer's groups, each with the factor on its learning rate ("rate"): another one for queries and keys."""
    attentions = [layer.self_attn for layer in model.model.layers] if of_scores != 1 else []
    projections = {id(p.weight) for attention in attentions for p in (attention.q_proj, attention.k_proj)}
    split = []
    for group in groups:
        for rate, chosen in ((1.0, False), (of_scores, True)):
            members = [p for p in group["params"] if (id(p) in projections) == chosen]
            if members:
                split.append({**group, "params": members, "rate": rate})
    return split


def _runs_before(earlier: dict[str, Any] | None) -> int:
    """How many runs, one from the weights of the other, `earlier` is the last of."""
    return 0 if earlier is None else 1 + _runs_before(earlier.get("started_from"))


def _start_projections(model: nn.Module, settings: RunSettings) -> None:
    """Start ASEntmax's projections elsewhere than at zero, where that was asked for."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("length_scaling.beta_weight", "length_scaling.gamma_weight")) and settings.projection_std:
                parameter.normal_(0.0, settings.projection_std)
            if name.endswith("length_scaling.gamma_bias") and settings.gamma_start:
                parameter.fill_(settings.gamma_start)
