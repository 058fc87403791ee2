"""Pools of two-letter words, and drawing distinct ones, alike ones or random ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["WordPool", "distinct_integers", "has_repeats"]


def _random_below(upper: int | torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Uniform integers in [0, upper), with `upper` broadcast to the shape."""
    return torch.randint(1 << 62, shape, generator=generator, device=generator.device) % upper


def distinct_integers(size: int, count: int, upper: int | torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(size, count) integers in [0, upper), drawn without replacement in each row.

    Args:
        size, count: rows, and integers in each.
        upper: a number, or (size, 1) numbers, of which a row may be too small: it then has repeats.
        generator: the source of randomness, on whose device the result is.
    """
    if isinstance(upper, int) and count * count > upper:
        if count > upper:
            raise ValueError(f"can't draw {count} distinct integers below {upper}")
        return torch.rand((size, upper), generator=generator, device=generator.device).argsort(dim=1)[:, :count]
    # Draw more than enough and leave out repeats: where count^2 <= upper, fewer than one row in 10^15 has more than
    # count + 16 repeats among 2 count + 16 draws.
    drawn = _random_below(upper, (size, 2 * count + 16), generator)
    # tril would start all threads of a CPU, however small the tensor is.
    place = torch.arange(drawn.shape[1], device=drawn.device)
    earlier = ((drawn[:, :, None] == drawn[:, None, :]) & (place[:, None] > place)).any(dim=2)
    first_ones = earlier.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    return drawn.gather(1, first_ones)


def has_repeats(rows: torch.Tensor) -> torch.Tensor:
    """(size,) bool: whether a row of (size, count) holds a number twice."""
    ordered = rows.sort(dim=1).values
    return (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)


@dataclass(frozen=True)
class WordPool:
    """Distinct words of two letters, and which of them have a given first or second letter.

    Attributes:
        words: (pool, 2) int64 tokens.
        first_letter: the token of the alphabet's first letter.
        by_letter: (2, pool) int64, the words in the order of their first (second) letters.
        start, count: (2, letters) int64, where in that order the words with a letter start, and how many there are.
    """

    words: torch.Tensor
    first_letter: int
    by_letter: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor

    @classmethod
    def drawn(cls, size: int, first_letter: int, letters: int, generator: torch.Generator) -> WordPool:
        """`size` of the letters^2 words, on the CPU."""
        if not 1 <= size <= letters**2:
            raise ValueError(f"a pool of two-letter words has 1 to {letters**2} words, got {size}")
        chosen = torch.randperm(letters**2, generator=generator)[:size]
        places = torch.stack([chosen // letters, chosen % letters])
        count = torch.stack([torch.bincount(place, minlength=letters) for place in places])
        return cls(places.T + first_letter, first_letter, places.argsort(dim=1), count.cumsum(dim=1) - count, count)

    def to(self, device: torch.device) -> WordPool:
        """The same pool on another device."""
        tensors = (tensor.to(device) for tensor in (self.by_letter, self.start, self.count))
        return WordPool(self.words.to(device), self.first_letter, *tensors)

    def sharing_a_letter(
        self, indices: torch.Tensor, places: int, generator: torch.Generator, crossed: float = 0.0
    ) -> torch.Tensor:
        """For each word another one (rarely the same) with one of its letters, in the same place or in the other.

        Args:
            indices: of words, of any shape.
            places: which letter may be shared: 1 for the first only, 2 for either, drawn for each word.
            generator: the source of randomness, on the device of the result.
            crossed: share of the words whose letter is in the other place of the other word.
        """
        place = _random_below(places, tuple(indices.shape), generator)
        letter = self.words[indices].gather(-1, place[..., None])[..., 0] - self.first_letter
        if crossed > 0:
            crosses = torch.rand(indices.shape, generator=generator, device=generator.device) < crossed
            place = torch.where(crosses, 1 - place, place)
        nth = _random_below(self.count[place, letter].clamp_min(1), tuple(indices.shape), generator)
        return self.by_letter[place, self.start[place, letter] + nth]

    def all_sharing_a_letter(self, size: int, count: int, places: int, generator: torch.Generator) -> torch.Tensor:
        """(size, count) words that share one letter in each row. A letter that is too rare gives repeats."""
        place = _random_below(places, (size, 1), generator)
        letter = _random_below(self.count.shape[1], (size, 1), generator)
        nth = distinct_integers(size, count, self.count[place, letter].clamp_min(1), generator)
        return self.by_letter[place, (self.start[place, letter] + nth).clamp_max(len(self.words) - 1)]
