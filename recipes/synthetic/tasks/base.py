"""The base class of all tasks: the settings of data, model and learning rate, and the drawing of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch

__all__ = ["IGNORED", "Batch", "Task", "flag", "integer_between"]

# The label of a place that does not count (the default of cross_entropy).
IGNORED = -100
# The settings of a task that do not describe its data.
_MODEL_FLAGS = frozenset({"layers", "hidden", "heads", "head_dim", "ffn", "lr"})


def flag(default: Any, help: str) -> Any:
    """A dataclass field that becomes a command line flag."""
    return field(default=default, metadata={"help": help})


def integer_between(low: int, high: int, generator: torch.Generator) -> int:
    """A uniform integer, both ends included, from a generator on the CPU."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))


@dataclass(frozen=True)
class Batch:
    """Samples of one task, with their answers as inputs (teacher forcing).

    Sequences are padded on the right. Attention is causal, so no scored place sees padding, and no attention mask is
    needed.

    Attributes:
        inputs: (batch, length) int64 tokens; (batch, length, features) float for sets of items.
        scored_at: (targets,) int64, the positions whose outputs are scored, the same in every sample.
        labels: (batch, targets) int64, the right output at each of these positions, or IGNORED.
        answer_letters: (letters,) int64, the positions of answer tokens that training may corrupt as inputs.
    """

    inputs: torch.Tensor
    scored_at: torch.Tensor
    labels: torch.Tensor
    answer_letters: torch.Tensor

    def __len__(self) -> int:
        return self.inputs.shape[0]

    @property
    def prompt(self) -> torch.Tensor:
        """(batch, prompt length): the tokens before the answer, for ``generate``."""
        return self.inputs[:, : int(self.scored_at[0]) + 1]

    def select(self, rows: torch.Tensor | slice) -> Batch:
        """Some of the samples."""
        return replace(self, inputs=self.inputs[rows], labels=self.labels[rows])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def padded(self, length: int, targets: int) -> Batch:
        """The same samples with `length` positions and `targets` scored ones, where the added ones are ignored.

        Padding has token 0, and added targets score position 0 with the label IGNORED.
        """
        sides = [0, 0] * (self.inputs.ndim - 2)
        inputs = torch.nn.functional.pad(self.inputs, (*sides, 0, length - self.inputs.shape[1]))
        more = targets - self.scored_at.shape[0]
        scored_at = torch.nn.functional.pad(self.scored_at, (0, more))
        labels = torch.nn.functional.pad(self.labels, (0, more), value=IGNORED)
        return replace(self, inputs=inputs, scored_at=scored_at, labels=labels)

    @staticmethod
    def concatenated(batches: Sequence[Batch]) -> Batch:
        """Batches as one. They have one length, or all of their positions are scored."""
        longest = max(batches, key=lambda batch: batch.inputs.shape[1])
        length, targets = longest.inputs.shape[1], longest.scored_at.shape[0]
        padded = [batch.padded(length, targets) for batch in batches]
        inputs = torch.cat([batch.inputs for batch in padded])
        labels = torch.cat([batch.labels for batch in padded])
        return replace(longest, inputs=inputs, labels=labels)


@dataclass(frozen=True)
class Task:
    """The data of a task, and the paper's model and learning rate for it. Subclasses draw the samples.

    ``length`` is always the length of the source, without markers, queries and answer. The vocabulary has the data
    tokens first, then <bos>, <sep> and <eos>.
    """

    name: ClassVar[str]
    # Multiples of max_length at which the task is tested.
    test_multiples: ClassVar[tuple[int, ...]] = (1, 2, 4, 8, 16, 32, 64)
    # The first letter of the alphabet among the data tokens.
    FIRST_LETTER: ClassVar[int] = 0
    # Whether a GPU has to compute in float32, because bfloat16 cannot tell numbers of a sample apart.
    float32: ClassVar[bool] = False

    min_length: int = flag(32, "shortest source in training")
    max_length: int = flag(64, "longest source in training; 1x in evaluation")
    layers: int = flag(4, "decoder layers")
    hidden: int = flag(256, "width of the model")
    heads: int = flag(8, "attention heads")
    head_dim: int = flag(32, "width of a head")
    ffn: int = flag(1024, "width inside of the feed-forward layers")
    lr: float = flag(4e-4, "learning rate after warm-up")

    @property
    def data_tokens(self) -> int:
        """The number of different tokens in a source."""
        raise NotImplementedError

    @property
    def label_tokens(self) -> int:
        """The number of different outputs besides <bos>, <sep> and <eos>."""
        return self.data_tokens

    @property
    def vocabulary(self) -> int:
        return max(self.data_tokens, self.label_tokens) + 3

    @property
    def bos(self) -> int:
        return self.vocabulary - 3

    @property
    def sep(self) -> int:
        return self.vocabulary - 2

    @property
    def eos(self) -> int:
        return self.vocabulary - 1

    @property
    def track(self) -> str:
        """The training distribution, which tables keep apart: "paper", or "own" if a setting of the data differs."""
        data = (item for item in fields(self) if item.name not in _MODEL_FLAGS)
        return "paper" if all(getattr(self, item.name) == item.default for item in data) else "own"

    def padded_shape(self) -> tuple[int, int]:
        """The (length, targets) that every training batch fits into, for runs that need one shape."""
        raise NotImplementedError

    def training_batch(self, size: int, generator: torch.Generator, shapes: torch.Generator, progress: float) -> Batch:
        """Fresh training samples of one length, drawn between min_length and max_length.

        Args:
            size: number of samples.
            generator: of the data, on the device of the samples.
            shapes: of the lengths, on the CPU, so that nothing waits for the device.
            progress: part of the run that is over, from 0 to 1, for distributions that change.
        """
        del progress
        return self.test_batch(size, integer_between(self.min_length, self.max_length, shapes), generator)

    def test_batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        """Samples of the paper's distribution with a source of any length, on the generator's device."""
        raise NotImplementedError

    def distractors(self, length: int) -> int | None:
        """The number of pairs that a query chooses from (n of the query-error law), or None without queries."""
        del length
        return None

    def queries_right(self, right: torch.Tensor) -> torch.Tensor | None:
        """(batch, queries) bool: which queries have right answers, given (batch, targets) which targets are right."""
        del right
        return None

    def _marker(self, token: int, like: torch.Tensor) -> torch.Tensor:
        return torch.full((like.shape[0], 1), token, dtype=torch.int64, device=like.device)

    def _answered(self, prompt: torch.Tensor, answer: torch.Tensor, corruptible: torch.Tensor | None = None) -> Batch:
        """A prompt and its answer, with <eos> after it. `corruptible` are places in the answer (default: all)."""
        labels = torch.cat([answer, self._marker(self.eos, answer)], dim=1)
        inputs = torch.cat([prompt, labels], dim=1)
        start = prompt.shape[1]
        device = prompt.device
        if corruptible is None:
            corruptible = torch.arange(answer.shape[1], device=device)
        return Batch(inputs, torch.arange(labels.shape[1], device=device) + start - 1, labels, corruptible + start)

    def _labelled(self, source: torch.Tensor, labels: torch.Tensor) -> Batch:
        """A source between <bos> and <eos>, with a label for each of its tokens."""
        inputs = torch.cat([self._marker(self.bos, source), source, self._marker(self.eos, source)], dim=1)
        nowhere = torch.empty(0, dtype=torch.int64, device=source.device)
        return Batch(inputs, torch.arange(1, source.shape[1] + 1, device=source.device), labels, nowhere)
