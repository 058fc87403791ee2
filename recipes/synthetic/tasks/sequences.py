"""Copy, Reverse, Sort, Parity, Flip-flop, 2Back and Local count, as the paper's authors generate them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import IGNORED, Batch, Task, flag

__all__ = ["Copy", "FlipFlop", "LocalCount", "Parity", "Reverse", "Sort", "TwoBack"]


def _integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Uniform integers in [low, high) on the generator's device."""
    return torch.randint(low, high, shape, generator=generator, device=generator.device)


@dataclass(frozen=True)
class _Rewrite(Task):
    """<bos> x_1 ... x_L <sep>, then L tokens computed from the x_i, and <eos>."""

    letters: int = flag(32, "size of the alphabet")

    @property
    def data_tokens(self) -> int:
        return self.letters

    def padded_shape(self) -> tuple[int, int]:
        return 2 * self.max_length + 3, self.max_length + 1

    def rewritten(self, source: torch.Tensor) -> torch.Tensor:
        """The answer to a source, both (batch, length)."""
        raise NotImplementedError

    def test_batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        source = _integers(0, self.letters, (size, length), generator)
        prompt = torch.cat([self._marker(self.bos, source), source, self._marker(self.sep, source)], dim=1)
        return self._answered(prompt, self.rewritten(source))


@dataclass(frozen=True)
class Copy(_Rewrite):
    """The answer is the source."""

    name: ClassVar[str] = "copy"
    layers: int = flag(2, "decoder layers")
    heads: int = flag(16, "attention heads")
    head_dim: int = flag(16, "width of a head")
    lr: float = flag(1e-3, "learning rate after warm-up")

    def rewritten(self, source: torch.Tensor) -> torch.Tensor:
        return source


@dataclass(frozen=True)
class Reverse(_Rewrite):
    """The answer is the reversed source."""

    name: ClassVar[str] = "reverse"
    test_multiples: ClassVar[tuple[int, ...]] = (1, 2, 4, 8)
    layers: int = flag(6, "decoder layers")

    def rewritten(self, source: torch.Tensor) -> torch.Tensor:
        return source.flip(1)


@dataclass(frozen=True)
class Sort(_Rewrite):
    """The answer is the source in ascending order."""

    name: ClassVar[str] = "sort"
    test_multiples: ClassVar[tuple[int, ...]] = (1, 2, 4, 8)
    layers: int = flag(2, "decoder layers")

    def rewritten(self, source: torch.Tensor) -> torch.Tensor:
        return source.sort(dim=1).values


@dataclass(frozen=True)
class Parity(Task):
    """<bos> bits <sep>, then 1 if the number of ones is even, else 0."""

    name: ClassVar[str] = "parity"

    @property
    def data_tokens(self) -> int:
        return 2

    def padded_shape(self) -> tuple[int, int]:
        return self.max_length + 4, 2

    def test_batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        source = _integers(0, 2, (size, length), generator)
        prompt = torch.cat([self._marker(self.bos, source), source, self._marker(self.sep, source)], dim=1)
        return self._answered(prompt, 1 - source.sum(dim=1, keepdim=True) % 2)


@dataclass(frozen=True)
class FlipFlop(Task):
    """<bos>, then length // 2 commands with a bit each. The last one is a read; its answer is the bit last written.

    Bits are the tokens 0 and 1. Commands are write (2), ignore (3) and read (4). The first command is a write, and each
    command between the first and the last one is a write with probability `write_probability`.
    """

    name: ClassVar[str] = "flip_flop"
    WRITE: ClassVar[int] = 2
    IGNORE: ClassVar[int] = 3
    READ: ClassVar[int] = 4

    ffn: int = flag(512, "width inside of the feed-forward layers")
    write_probability: float = flag(0.1, "share of writes among the commands")

    @property
    def data_tokens(self) -> int:
        return 5

    def padded_shape(self) -> tuple[int, int]:
        return self.max_length + 2, 2

    def test_batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        commands = length // 2
        if commands < 2:
            raise ValueError(f"flip-flop needs a length of at least 4, got {length}")
        bits = _integers(0, 2, (size, commands), generator)
        chance = torch.rand((size, commands), generator=generator, device=generator.device)
        command = torch.where(chance < self.write_probability, self.WRITE, self.IGNORE)
        command[:, 0], command[:, -1] = self.WRITE, self.READ
        index = torch.arange(commands, device=generator.device)
        last_write = torch.where(command == self.WRITE, index, -1).amax(dim=1, keepdim=True)
        source = torch.stack([command, bits], dim=2).flatten(1)[:, :-1]
        prompt = torch.cat([self._marker(self.bos, source), source], dim=1)
        return self._answered(prompt, bits.gather(1, last_write))


@dataclass(frozen=True)
class TwoBack(Task):
    """The label of each token is the token two places before it (0 for the first two). The source starts with a 0."""

    name: ClassVar[str] = "two_back"

    letters: int = flag(16, "size of the alphabet")

    @property
    def data_tokens(self) -> int:
        return self.letters

    def padded_shape(self) -> tuple[int, int]:
        return self.max_length + 3, self.max_length + 1

    def test_batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        source = torch.nn.functional.pad(_integers(1, self.letters, (size, length), generator), (1, 0))
        return self._labelled(source, torch.nn.functional.pad(source[:, :-2], (2, 0)))


@dataclass(frozen=True)
class LocalCount(Task):
    """Runs of one letter each. The label of each token is its 0-based place in its run.

    There are length // ((max_run + 2) / 2) runs of 2 to `max_run` tokens, so `length` is the average length of a
    sequence. Neighboring runs have different letters.
    """

    name: ClassVar[str] = "local_count"

    min_length: int = flag(64, "shortest source in training, on average")
    max_length: int = flag(128, "longest source in training, on average; 1x in evaluation")
    letters: int = flag(16, "size of the alphabet")
    max_run: int = flag(48, "longest run")

    @property
    def data_tokens(self) -> int:
        return self.letters

    @property
    def label_tokens(self) -> int:
        return self.max_run

    def padded_shape(self) -> tuple[int, int]:
        longest = self.runs(self.max_length) * self.max_run
        return longest + 2, longest

    def runs(self, length: int) -> int:
        """The number of runs in a source of this (average) length."""
        return 2 * length // (self.max_run + 2)

    def test_batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        runs = self.runs(length)
        if runs < 1:
            raise ValueError(f"local count needs a length of at least {(self.max_run + 3) // 2}, got {length}")
        # each letter differs from its neighbor's: a step of 1 to letters - 1 around the alphabet
        steps = _integers(1, self.letters, (size, runs), generator)
        steps[:, 0] = _integers(0, self.letters, (size,), generator)
        letters = steps.cumsum(dim=1) % self.letters
        ends = _integers(2, self.max_run + 1, (size, runs), generator).cumsum(dim=1)
        place = torch.arange(int(ends[:, -1].amax()), device=generator.device).repeat(size, 1)
        run = torch.searchsorted(ends, place, right=True)
        inside = run < runs
        run = run.clamp_max(runs - 1)
        starts = torch.nn.functional.pad(ends[:, :-1], (1, 0))
        source = torch.where(inside, letters.gather(1, run), self.eos)
        return self._labelled(source, torch.where(inside, place - starts.gather(1, run), IGNORED))
