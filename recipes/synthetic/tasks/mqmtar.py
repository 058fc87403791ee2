"""MQMTAR: multi-query multi-token associative recall.

A source is a row of slots of equal length, one key/value pair in each::

    k k KVSEP v v _        spaces (_) before and after the pair fill the slot
    QSEP k k               one for each query, after the last slot

and the answer is ``QSEP v v`` for each query. Keys and values are words of two letters from a pool. The default is the
paper's distribution. All other settings here (near misses, shared and swapped letters, a varying number of queries)
change the training data only, never the test data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from .base import Batch, Task, flag, integer_between
from .words import WordPool, distinct_integers, has_repeats

__all__ = ["Mqmtar", "confusable", "swapped"]

# As in the authors' code, each data set has words of its own: training has one pool, tests and validation another.
_TRAINING_POOL, _TEST_POOL = 0, 1


@lru_cache(maxsize=4)
def _pools(size: int, seed: int, device: torch.device) -> tuple[WordPool, WordPool]:
    """The keys and the values."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (WordPool.drawn(size, Mqmtar.FIRST_LETTER, Mqmtar.LETTERS, generator) for _ in range(2))
    return first.to(device), second.to(device)


@dataclass(frozen=True)
class Mqmtar(Task):
    """Multi-query multi-token associative recall. `length` counts the slots' tokens, rounded down to whole slots."""

    name: ClassVar[str] = "mqmtar"
    test_multiples: ClassVar[tuple[int, ...]] = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
    SPACE: ClassVar[int] = 0
    KEY_VALUE: ClassVar[int] = 1
    QUERY: ClassVar[int] = 2
    FIRST_LETTER: ClassVar[int] = 3
    LETTERS: ClassVar[int] = 256
    QUERIES: ClassVar[int] = 4  # of a test sample
    FILLED: ClassVar[float] = 0.8  # share of the length that the pairs fill
    RAMP: ClassVar[float] = 0.6  # part of a run over which the shares of hard samples change

    hidden: int = flag(512, "width of the model")
    heads: int = flag(16, "attention heads")
    lr: float = flag(1e-3, "learning rate after warm-up")
    pool: int = flag(10_000, "keys, and values, that there are (at most 65,536)")
    min_queries: int = flag(4, "fewest queries of a training sample; tests always have 4")
    max_queries: int = flag(4, "most queries of a training sample")
    near_misses: float = flag(
        0.0, "share of training samples, at the start, in which half of the keys (values) share a letter with another"
    )
    near_misses_end: float = flag(0.0, f"the same share once {RAMP} of the run is over")
    one_letter: float = flag(0.0, "share of training samples, at the start, in which all keys (values) share a letter")
    one_letter_end: float = flag(0.0, f"the same share once {RAMP} of the run is over")
    near_crossed: float = flag(0.0, "share of the keys' near misses whose shared letter is in the other place")
    swapped: float = flag(
        0.0, "share of training samples in which half of the keys are other keys with their letters swapped"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.near_crossed <= 1:
            raise ValueError(f"near_crossed must be from 0 to 1, got {self.near_crossed}")
        if not 0 <= self.swapped <= 1:
            raise ValueError(f"swapped must be from 0 to 1, got {self.swapped}")
        if not 1 <= self.min_queries <= self.max_queries:
            raise ValueError(f"expected 1 <= min_queries <= max_queries, got {self.min_queries}, {self.max_queries}")

    @property
    def data_tokens(self) -> int:
        return self.FIRST_LETTER + self.LETTERS

    def fitting(self, length: int) -> int:
        """The number of pairs that a source has room for."""
        return int(length * self.FILLED // 6)

    def pairs(self, length: int) -> int:
        """The number of pairs in a source: no more than the pool has."""
        return min(self.fitting(length), self.pool)

    def distractors(self, length: int) -> int:
        return self.pairs(length)

    def padded_shape(self) -> tuple[int, int]:
        answer = 3 * self.max_queries + 1
        return self.max_length + 3 * self.max_queries + 2 + answer, answer

    def key_starts(self, inputs: torch.Tensor) -> torch.Tensor:
        """(batch, pairs) positions of the keys' first letters. The value's letters are three and four tokens later."""
        return (inputs == self.KEY_VALUE).nonzero()[:, 1].view(len(inputs), -1) - 2

    def query_markers(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, queries) positions of the markers before the letters of each query, and of each answer."""
        asked, answered = (inputs == self.QUERY).nonzero()[:, 1].view(len(inputs), -1).chunk(2, dim=1)
        return asked, answered

    def queries_right(self, right: torch.Tensor) -> torch.Tensor:
        return right[:, :-1].unflatten(1, (-1, 3))[..., 1:].all(dim=2)

    def training_batch(self, size: int, generator: torch.Generator, shapes: torch.Generator, progress: float) -> Batch:
        length = integer_between(self.min_length, self.max_length, shapes)
        queries = integer_between(self.min_queries, self.max_queries, shapes)
        pairs = self.pairs(length)
        key_pool, value_pool = _pools(self.pool, _TRAINING_POOL, generator.device)
        risen = min(1.0, progress / self.RAMP)
        near = self.near_misses + risen * (self.near_misses_end - self.near_misses)
        shared = self.one_letter + risen * (self.one_letter_end - self.one_letter)
        keys = confusable(key_pool, size, pairs, near, shared, 2, generator, self.near_crossed)
        key_words = swapped(key_pool.words[keys], self.swapped, generator)
        values = confusable(value_pool, size, pairs, near, shared, 1, generator)
        return self._assembled(key_words, value_pool.words[values], length, queries, generator)

    def test_batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        key_pool, value_pool = _pools(self.pool, _TEST_POOL, generator.device)
        pairs = self.pairs(length)
        keys, values = (distinct_integers(size, pairs, self.pool, generator) for _ in range(2))
        return self._assembled(key_pool.words[keys], value_pool.words[values], length, self.QUERIES, generator)

    def _assembled(
        self, keys: torch.Tensor, values: torch.Tensor, length: int, queries: int, generator: torch.Generator
    ) -> Batch:
        """Sources, queries and answers from keys and values, each (batch, pairs, 2)."""
        size, pairs, _ = keys.shape
        if pairs == 0:
            raise ValueError(f"a length of {length} holds no pair; it takes at least {int(6 / self.FILLED) + 1}")
        device = keys.device
        slot = length // pairs
        pair = torch.cat([keys, torch.full_like(keys[..., :1], self.KEY_VALUE), values], dim=2)
        # As in the authors' code: the pair and the space after it have slot - 1 spaces before them and slot - 3 after
        # them, of which slot - 6 are kept at random.
        kept = torch.rand((size, pairs, 2 * slot - 4), generator=generator, device=device).argsort(dim=2)
        before = (kept[..., : slot - 6] < slot - 1).sum(dim=2, keepdim=True)
        slots = torch.full((size, pairs, slot), self.SPACE, dtype=torch.int64, device=device)
        slots.scatter_(2, before + torch.arange(5, device=device), pair)
        asked = torch.randint(pairs, (size, queries, 1), generator=generator, device=device).expand(-1, -1, 2)
        marker = torch.full((size, queries, 1), self.QUERY, dtype=torch.int64, device=device)
        query = torch.cat([marker, keys.gather(1, asked)], dim=2).flatten(1)
        answer = torch.cat([marker, values.gather(1, asked)], dim=2).flatten(1)
        source = slots.flatten(1)
        prompt = torch.cat([self._marker(self.bos, source), source, query, self._marker(self.sep, source)], dim=1)
        return self._answered(prompt, answer, corruptible=torch.arange(1, 3 * queries, 3, device=device))


def confusable(
    pool: WordPool,
    size: int,
    pairs: int,
    near: float,
    shared: float,
    places: int,
    generator: torch.Generator,
    crossed: float = 0.0,
) -> torch.Tensor:
    """(size, pairs) indices of distinct words, at random except in the shares of the samples that are made hard.

    Args:
        pool: of the words.
        size, pairs: number of samples, and of words in each.
        near: share of the samples in which half of the words share one letter with another word.
        shared: share of the samples in which all words share one letter.
        places: which letter may be shared: 1 for the first only, 2 for either.
        generator: the source of randomness, on the device of the result.
        crossed: share of the near misses whose shared letter is in the other place.
    """
    words = distinct_integers(size, pairs, len(pool.words), generator)
    if near > 0:
        half = pairs // 2
        base = words[:, :half]
        alternative = torch.cat(
            [base, pool.sharing_a_letter(base, places, generator, crossed), words[:, 2 * half :]], dim=1
        )
        order = torch.rand(words.shape, generator=generator, device=words.device).argsort(dim=1)
        words = _some_rows(words, alternative.gather(1, order), near, generator)
    if shared > 0:
        words = _some_rows(words, pool.all_sharing_a_letter(size, pairs, places, generator), shared, generator)
    return words


def swapped(words: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """(size, pairs, 2) words. In a share of the samples the second half is the first half with its letters swapped.

    Samples in which a word would then occur twice stay as they are. A key with the same two letters in the other order
    is the nearest miss, and one key in 65,536: a model trained on 8 keys seldom meets it, and a model tested on 8,738
    keys meets it in every eighth query.
    """
    if share == 0:
        return words
    half = words.shape[1] // 2
    alternative = torch.cat([words[:, :half], words[:, :half].flip(-1), words[:, 2 * half :]], dim=1)
    codes = alternative[..., 0] * (Mqmtar.FIRST_LETTER + Mqmtar.LETTERS) + alternative[..., 1]
    return _some_rows(words, alternative, share, generator, codes)


def _some_rows(
    words: torch.Tensor,
    alternative: torch.Tensor,
    share: float,
    generator: torch.Generator,
    codes: torch.Tensor | None = None,
) -> torch.Tensor:
    """`alternative` in a share of the rows, but never where it repeats a word. `codes` numbers its words."""
    repeated = has_repeats(alternative if codes is None else codes)
    chosen = (torch.rand(words.shape[0], generator=generator, device=words.device) < share) & ~repeated
    return torch.where(chosen.view(-1, *[1] * (words.ndim - 1)), alternative, words)
