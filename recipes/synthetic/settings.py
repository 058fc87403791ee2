"""The settings of a training run as one dataclass, and dataclasses as command line flags."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_args, get_type_hints

from recipes.synthetic.tasks.base import flag

__all__ = ["PARTS", "RunSettings", "add_flags", "from_flags"]

T = TypeVar("T")


@dataclass(frozen=True)
class ModelSettings:
    """The model, and the weights that it begins with."""

    method: str = flag(
        "asentmax", "attention: softmax, ssmax, adaptive_temperature, topk, entmax, asentmax or stick_breaking"
    )
    positions: str = flag("nape", "rope, nope, alibi or nape (stick_breaking: rope or nope)")
    attention: str = flag(
        "", "further fields of ASEntmaxConfig as NAME=VALUE, separated by commas: delta=0,alibi_slopes=geometric"
    )
    start_from: str = flag("", "folder of a finished seed (run.json, model/) whose weights this run begins with")
    tries: int = flag(
        1,
        "how many finished runs the one of --start-from was chosen from; only recorded, for the time in tables",
    )

    def __post_init__(self) -> None:
        _ = self.attention_flags
        if self.tries < 1:
            raise ValueError(f"tries counts the run that was chosen, so it must be at least 1; got {self.tries}")
        if self.tries > 1 and not self.start_from:
            raise ValueError("tries describes the run of start-from: give --start-from too, or leave tries out")

    @property
    def attention_flags(self) -> dict[str, Any]:
        """The fields of ASEntmaxConfig that `attention` names. Values are JSON; what is not JSON is a string."""
        flags: dict[str, Any] = {}
        for item in filter(None, self.attention.split(",")):
            name, equals, value = item.partition("=")
            if not equals or not name:
                raise ValueError(f"attention must be NAME=VALUE, separated by commas; got {item!r}")
            try:
                flags[name.strip()] = json.loads(value)
            except json.JSONDecodeError:
                flags[name.strip()] = value.strip()
        return flags


@dataclass(frozen=True)
class ScheduleSettings:
    """The length of the run and its learning rate."""

    steps: int = flag(20_000, "updates, or 0 for no limit")
    minutes: float = flag(
        0.0, "training time of each seed, or 0 for no limit; compilation and validation are not counted"
    )
    batch: int = flag(1024, "samples in an update")
    warmup: int = flag(500, "updates over which the learning rate rises")
    schedule: str = flag("linear", "linear (constant, then linear to 0) or cosine")
    decay: float = flag(0.5, "part of the run over which a linear schedule falls to 0")
    compile: bool = flag(False, "use torch.compile, with every batch padded to one shape")

    def __post_init__(self) -> None:
        if self.steps <= 0 and self.minutes <= 0:
            raise ValueError("a run needs an end: give --steps or --minutes")
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(f"schedule must be linear or cosine, got {self.schedule!r}")


@dataclass(frozen=True)
class AugmentationSettings:
    """Changes of the inputs and of the model that are made in training only."""

    corrupt: float = flag(
        0.0, "probability with which an answer token, as an input in training, is replaced by a random letter"
    )
    jitter: float = flag(
        1.0, "the scores of heads without ALiBi are multiplied by a factor in [jitter, 1] for each sample in training"
    )
    jitter_law: str = flag("uniform", "law of jitter's factor: uniform, or log (its logarithm is uniform)")
    key_noise: float = flag(
        0.0, "normal noise on the keys of heads without ALiBi in training, relative to their root mean square"
    )
    head_drop: float = flag(
        0.0,
        "probability with which a head without ALiBi is left out, for each sample and layer in training; one head "
        "always stays",
    )
    alibi_window: int = flag(
        0, "in half of the training batches, heads with ALiBi see only this many of the last tokens; 0 for all tokens"
    )
    ease_in: int = flag(
        0,
        "updates over which jitter, key noise, head drop and ALiBi's window are introduced once the plateau is left; "
        "0: they are on from the start",
    )

    def __post_init__(self) -> None:
        if self.jitter_law not in ("uniform", "log"):
            raise ValueError(f"jitter-law must be uniform or log, got {self.jitter_law!r}")
        if self.alibi_window < 0:
            raise ValueError(f"alibi-window must be at least 1, or 0 for none, got {self.alibi_window}")
        if not 0 <= self.corrupt <= 1:
            raise ValueError(f"corrupt is a probability, from 0 to 1, got {self.corrupt}")


@dataclass(frozen=True)
class HardSampleSettings:
    """Samples with a large loss are chosen, weighted and trained on again."""

    replay: float = flag(
        0.0, "share of a batch, once the plateau is left, that are earlier samples: those with the largest last loss"
    )
    hard_candidates: int = flag(
        1, "draw this many times the batch, and train on the samples with the largest loss; 1 to train on all"
    )
    hard_from: float = flag(0.5, "part of the run after which samples are chosen by --hard-candidates")
    hard_weight: float = flag(
        0.0, "share of a batch's weight, once the plateau is left, that is spread over answer tokens by their loss"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.hard_weight <= 1:
            raise ValueError(f"hard-weight must be from 0 to 1, got {self.hard_weight}")


@dataclass(frozen=True)
class MonitoringSettings:
    """Validation, the log, and runs that are given up."""

    validations: int = flag(
        0, "how often to validate over the run, keeping the best model; 0: no validation, the last model is kept"
    )
    validate_multiple: int = flag(64, "length of validation samples, in multiples of the longest in training")
    validate_samples: int = flag(512, "number of validation samples, which are not those of the tests")
    plateau: float = flag(0.3, "mean loss of the log below which the plateau counts as left")
    give_up: int = flag(0, "end a run that has not left the plateau after this many samples; 0: never")
    log_every: int = flag(100, "updates between two entries of the log")


PARTS = (ModelSettings, ScheduleSettings, AugmentationSettings, HardSampleSettings, MonitoringSettings)


@dataclass(frozen=True)
class RunSettings(MonitoringSettings, HardSampleSettings, AugmentationSettings, ScheduleSettings, ModelSettings):
    """All settings of a run except its task and seed. A run ends when its steps or its minutes are over.

    Raises:
        ValueError: a setting is outside its range, or has no effect together with another.
    """

    def __post_init__(self) -> None:
        ModelSettings.__post_init__(self)
        ScheduleSettings.__post_init__(self)
        AugmentationSettings.__post_init__(self)
        HardSampleSettings.__post_init__(self)
        needs_heads_without_alibi = {
            "jitter": self.jitter < 1,
            "head-drop": self.head_drop > 0,
            "key-noise": self.key_noise > 0,
        }
        without_effect = [name for name, given in needs_heads_without_alibi.items() if given]
        if self.positions == "alibi" and without_effect:
            raise ValueError(
                f"{' and '.join(without_effect)} change heads without ALiBi, and positions alibi leave none: "
                "leave them out, or choose nape or nope"
            )
        if self.alibi_window > 0 and self.positions not in ("alibi", "nape"):
            raise ValueError(
                f"alibi-window is for heads with ALiBi, and positions {self.positions} have none: leave it out, or "
                "choose nape or alibi"
            )


def add_flags(parser: argparse.ArgumentParser, settings_class: type, title: str) -> None:
    """Adds one flag for each field of a dataclass made with `flag`, as a group of the help with this title."""
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
    """The dataclass with the values of the parsed flags."""
    return settings_class(**{item.name: getattr(parsed, item.name) for item in fields(settings_class)})  # type: ignore[arg-type]
