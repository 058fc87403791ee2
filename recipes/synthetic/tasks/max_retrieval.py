"""Max retrieval: the class of the item with the largest priority in a set (Velickovic et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Batch, Task, flag

__all__ = ["MaxRetrieval"]


@dataclass(frozen=True)
class MaxRetrieval(Task):
    """A set of items, each with a priority in [0, 1) and a one-hot class; then an item of zeros, which is the query.

    The output at the query has to be the class of the item with the largest priority. Among 4,096 items the two
    largest are 1/4,096 apart, and bfloat16 rounds numbers near 1 to multiples of 1/256: the model computes in float32.
    """

    name: ClassVar[str] = "max_retrieval"
    test_multiples: ClassVar[tuple[int, ...]] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    float32: ClassVar[bool] = True

    min_length: int = flag(16, "fewest items in training")
    max_length: int = flag(16, "most items in training; 1x in evaluation")
    layers: int = flag(1, "decoder layers")
    hidden: int = flag(128, "width of the model")
    heads: int = flag(1, "attention heads")
    head_dim: int = flag(128, "width of a head")
    ffn: int = flag(256, "width inside of the feed-forward layers")
    lr: float = flag(1e-3, "learning rate after warm-up")
    classes: int = flag(10, "classes of items")

    @property
    def data_tokens(self) -> int:
        return 0

    @property
    def label_tokens(self) -> int:
        return self.classes

    @property
    def features(self) -> int:
        """The number of values that describe an item."""
        return 1 + self.classes

    def padded_shape(self) -> tuple[int, int]:
        return self.max_length + 1, 1

    def test_batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        device = generator.device
        priority = torch.rand((size, length), generator=generator, device=device)
        kind = torch.randint(self.classes, (size, length), generator=generator, device=device)
        items = torch.cat([priority[..., None], torch.nn.functional.one_hot(kind, self.classes)], dim=2)
        inputs = torch.nn.functional.pad(items, (0, 0, 0, 1))
        labels = kind.gather(1, priority.argmax(dim=1, keepdim=True))
        nowhere = torch.empty(0, dtype=torch.int64, device=device)
        return Batch(inputs, torch.full((1,), length, device=device), labels, nowhere)
