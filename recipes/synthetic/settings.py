"""How a run trains, as one dataclass; and dataclasses as command line flags."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_args, get_type_hints

from recipes.synthetic.tasks.base import flag

__all__ = ["RunSettings", "add_flags", "from_flags"]

T = TypeVar("T")


@dataclass(frozen=True)
class RunSettings:
    """Everything about a run but its task and seed. A run ends when its steps or its minutes are over."""

    method: str = flag(
        "asentmax", "attention: softmax, ssmax, adaptive_temperature, topk, entmax, asentmax, stick_breaking"
    )
    positions: str = flag("nape", "rope, nope, alibi or nape (stick_breaking: rope or nope)")
    start_from: str = flag(
        "", "folder of a finished seed (run.json, model/) whose weights this run begins with, in place of random ones"
    )
    tries: int = flag(
        1, "how many finished runs the one of --start-from was chosen from: kept for the tables, which name their time"
    )
    qk_norm: bool = flag(False, "queries and keys of one length each, with a learned factor a channel: Qwen3's layers")
    steps: int = flag(20_000, "updates, 0 for no limit")
    minutes: float = flag(0.0, "training time of each seed, 0 for no limit; compilation and validation don't count")
    batch: int = flag(1024, "samples in an update")
    warmup: int = flag(500, "updates over which the learning rate rises")
    qk_lr: float = flag(
        1.0, "factor on the learning rate of query and key projections once the plateau is left, as scores grow sharp"
    )
    schedule: str = flag("linear", "linear (constant, then linear to 0) or cosine")
    decay: float = flag(0.5, "part of the run over which a linear schedule falls to 0")
    weight_decay: float = flag(0.0, "on matrices; length scalings, biases and norms have none")
    beta2: float = flag(0.99, "AdamW's: how much of its second moment an update keeps")
    clip: float = flag(1.0, "largest norm of the gradient")
    corrupt: float = flag(
        0.0, "probability with which an answer token, as an input in training, becomes a random letter"
    )
    corrupt_start: float | None = flag(
        None,
        "that probability before the plateau is left, from which it goes to --corrupt over the updates of --ease-in; "
        "None: --corrupt from the start",
    )
    corrupt_questions: float = flag(
        0.0,
        "probability with which one letter of what is asked for, as an input in training, becomes a random letter or "
        "one that something else in the sample has in another place; comes in with --ease-in",
    )
    jitter: float = flag(1.0, "scores of heads without ALiBi times a factor in [jitter, 1] per sample in training")
    jitter_law: str = flag("uniform", "law of jitter's factor: uniform, or log: its logarithm is uniform")
    channel_drop: float = flag(
        0.0, "probability with which a channel is left out of the scores of heads without ALiBi, per sample in training"
    )
    head_drop: float = flag(
        0.0, "probability with which a head without ALiBi is left out, per sample and layer in training, all but one"
    )
    alibi_window: int = flag(
        0, "in half of the training batches, heads with ALiBi see only so many tokens, the last ones; 0: all, always"
    )
    key_noise: float = flag(
        0.0, "normal noise on keys in training, as a share of their root mean square; where: --key-noise-heads"
    )
    key_noise_heads: str = flag("nope", "heads with key noise: nope (those without ALiBi) or all")
    key_noise_loss: float = flag(
        0.0, "once the plateau is left, key noise grows while the loss is below this and shrinks while it is above"
    )
    ease_in: int = flag(
        0,
        "updates over which jitter, drops, key noise, ALiBi's window and corrupted questions come in once the plateau "
        "is left; 0: on from the start",
    )
    replay: float = flag(
        0.0, "share of a batch, once the plateau is left, of samples seen before: the hardest kept, by their last loss"
    )
    hard_candidates: int = flag(1, "train on the hardest `batch` of this many times as many samples, by their loss")
    hard_from: float = flag(0.5, "part of the run after which the hardest are chosen")
    hard_weight: float = flag(
        0.0,
        "share of a batch's weight, once the plateau is left, that answer tokens have by their loss, judged as for "
        "--replay; the rest is even",
    )
    alpha: float | None = flag(None, "entmax's alpha, in place of the method's")
    alpha_start: float | None = flag(None, "entmax's alpha at the start, from which it climbs to its value in stairs")
    alpha_stairs: int = flag(4, "how many stairs; each compiles the model and the kernels once more")
    alpha_until: float = flag(0.3, "part of the run over which alpha climbs")
    top_k: int | None = flag(None, "keys that topk keeps, in place of 16")
    gamma_range: float | None = flag(None, "range of ASEntmax's gamma, in place of 2")
    delta: float | None = flag(None, "ASEntmax's constant, in place of 1")
    alibi_slopes: str | None = flag(None, "harmonic (default) or geometric")
    projection_std: float = flag(0.0, "standard deviation at the start of the weights that give beta and gamma")
    gamma_start: float = flag(0.0, "bias of gamma's projection at the start (gamma = range tanh(bias))")
    bf16_weights: bool = flag(False, "weights in bfloat16, as the paper's authors train, in place of float32")
    compile: bool = flag(False, "torch.compile, with every batch padded to one shape")
    average: float = flag(
        0.0, "decay of a moving average of the weights, which is validated and kept in their place; 0 for none"
    )
    validations: int = flag(0, "how often to validate over the run and keep the best model; 0 keeps the last")
    validate_multiple: int = flag(64, "length of the validation samples, in multiples of the longest in training")
    validate_samples: int = flag(512, "how many, apart from the test samples")
    plateau: float = flag(0.3, "a mean loss below this counts as having left the plateau")
    give_up: int = flag(0, "end a run that has not left the plateau after so many samples; 0: never")
    log_every: int = flag(100, "updates between two lines of the log")
    save_every: float = flag(60.0, "seconds between two checkpoints")

    def __post_init__(self) -> None:
        if self.steps <= 0 and self.minutes <= 0:
            raise ValueError("a run needs an end: give --steps or --minutes")
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(f"schedule must be linear or cosine, got {self.schedule!r}")
        if self.jitter_law not in ("uniform", "log"):
            raise ValueError(f"jitter-law must be uniform or log, got {self.jitter_law!r}")
        if self.qk_norm and (self.jitter < 1 or self.channel_drop > 0):
            raise ValueError(
                "jitter and channel-drop change queries before qk-norm undoes it: leave them out, or qk-norm"
            )
        for_heads_without_alibi = {
            "jitter": self.jitter < 1,
            "channel-drop": self.channel_drop > 0,
            "head-drop": self.head_drop > 0,
            "key-noise": self.key_noise > 0 and self.key_noise_heads != "all",
        }
        without_effect = [name for name, given in for_heads_without_alibi.items() if given]
        if self.positions == "alibi" and without_effect:
            raise ValueError(
                f"{' and '.join(without_effect)} change heads without ALiBi, and positions alibi leave none: "
                "leave them out, or take nape or nope"
            )
        if self.alibi_window < 0:
            raise ValueError(f"alibi-window must be at least 1, or 0 for none, got {self.alibi_window}")
        if self.alibi_window > 0 and self.positions not in ("alibi", "nape"):
            raise ValueError(
                f"alibi-window is for heads with ALiBi, and positions {self.positions} have none: leave it out, or "
                "take nape or alibi"
            )
        if self.start_from and (self.projection_std or self.gamma_start):
            raise ValueError("projection-std and gamma-start set the weights at the start, which start-from gives")
        for name, share in (
            ("corrupt", self.corrupt),
            ("corrupt-start", self.corrupt_start),
            ("corrupt-questions", self.corrupt_questions),
        ):
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} is a probability, from 0 to 1, got {share}")
        if self.corrupt_start is not None and self.ease_in <= 0:
            raise ValueError("from corrupt-start to corrupt it takes as many updates as ease-in: give --ease-in")
        if self.tries < 1:
            raise ValueError(f"tries counts the run that was chosen: at least 1, got {self.tries}")
        if self.tries > 1 and not self.start_from:
            raise ValueError(
                "tries says what the run of start-from was chosen from: give --start-from, or leave it out"
            )
        if not 0 <= self.hard_weight <= 1:
            raise ValueError(f"hard-weight must be from 0 to 1, got {self.hard_weight}")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 must be at least 0 and below 1, got {self.beta2}")
        if not self.qk_lr > 0:
            raise ValueError(f"qk-lr must be above 0, got {self.qk_lr}")
        if not 0 <= self.average < 1:
            raise ValueError(f"average must be at least 0 and below 1, got {self.average}")
        if self.key_noise_heads not in ("nope", "all"):
            raise ValueError(f"key-noise-heads must be nope or all, got {self.key_noise_heads!r}")
        if self.key_noise_loss > 0 and self.key_noise <= 0:
            raise ValueError("key-noise-loss changes the key noise: give --key-noise, the size it begins with")
        if self.alpha_start is not None and self.method not in ("entmax", "asentmax"):
            raise ValueError(f"alpha-start is for entmax and asentmax, got method {self.method!r}")
        if self.alpha_stairs < 1:
            raise ValueError(f"alpha-stairs must be at least 1, got {self.alpha_stairs}")

    def alpha_at(self, progress: float, last: float) -> float:
        """alpha at a part of the run, on its way to `last`."""
        if self.alpha_start is None or progress >= self.alpha_until:
            return last
        stair = int(progress / self.alpha_until * self.alpha_stairs + 1e-9)
        return self.alpha_start + (last - self.alpha_start) * stair / self.alpha_stairs

    def corrupt_at(self, eased_in: float) -> float:
        """The probability of a corrupted answer token, when so much of --ease-in lies behind (0 to 1)."""
        start = self.corrupt if self.corrupt_start is None else self.corrupt_start
        return start + (self.corrupt - start) * eased_in

    @property
    def attention_flags(self) -> dict[str, Any]:
        """The flags of ASEntmaxConfig that were given."""
        names = ("alpha", "top_k", "gamma_range", "delta", "alibi_slopes")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def add_flags(parser: argparse.ArgumentParser, settings_class: type, title: str) -> None:
    """One flag for each field of a dataclass made with `flag`."""
    group = parser.add_argument_group(title)
    hints = get_type_hints(settings_class)
    for item in fields(settings_class):
        name, help_text = f"--{item.name.replace('_', '-')}", f"{item.metadata['help']} (default: {item.default})"
        kind = next((kind for kind in get_args(hints[item.name]) if kind is not type(None)), hints[item.name])
        if kind is bool:
            group.add_argument(
                name, action=argparse.BooleanOptionalAction, default=item.default, help=item.metadata["help"]
            )
        else:
            group.add_argument(name, type=kind, default=item.default, help=help_text)


def from_flags(settings_class: type[T], parsed: argparse.Namespace) -> T:
    """The dataclass from parsed flags."""
    return settings_class(**{item.name: getattr(parsed, item.name) for item in fields(settings_class)})  # type: ignore[arg-type]
