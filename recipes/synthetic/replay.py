"""Keeps the samples that a run still gets wrong, and trains on them again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from recipes.synthetic.tasks import Batch

__all__ = ["HardReplay"]

CAPACITY = 512  # samples kept for each length
TAKEN = 32  # the hardest samples of each batch that may be kept


class HardReplay:
    """Keeps the samples with the largest loss, and puts them into later batches of the same length.

    When eight keys are drawn from 65,536, the keys that a model confuses (two letters swapped, say) meet in one sample
    of thousands. Its loss is large, and the sample is gone after the update. Kept, it comes back until its loss is no
    longer among the largest. This changes how often a drawn sample is seen, not how samples are drawn. Samples are
    judged by their last loss, which must not be random: with heads left out, any sample may be hard.

    Args:
        share: of a batch that is replaced by earlier samples.
        batch: samples in a batch.

    Raises:
        ValueError: the share is outside [0, 1), or it amounts to no sample or to more samples than are kept.
    """

    def __init__(self, share: float, batch: int) -> None:
        if not 0 <= share < 1:
            raise ValueError(f"replay is a share of a batch: at least 0 and below 1, got {share}")
        self.count = int(share * batch)
        if share > 0 and not 1 <= self.count <= CAPACITY:
            raise ValueError(
                f"a replay of {share} of {batch} samples is {self.count} samples; expected 1 to {CAPACITY}, the number "
                "that is kept"
            )
        self._kept: dict[str, dict[str, torch.Tensor]] = {}
        self._key = ""
        self._mixed: Batch | None = None
        self._chosen = torch.empty(0, dtype=torch.int64)

    def mix(self, batch: Batch, key: str) -> Batch:
        """The batch with its last samples replaced by the hardest kept ones. Batches of equal lengths share a key."""
        self._key, self._mixed = key, batch
        self._chosen = torch.empty(0, dtype=torch.int64, device=batch.labels.device)
        if key not in self._kept or self.count == 0:
            return batch
        kept = self._kept[key]
        self._chosen = kept["losses"].topk(self.count).indices
        there = kept["losses"][self._chosen] >= 0
        fresh = slice(len(batch) - self.count, None)
        inputs, labels = batch.inputs.clone(), batch.labels.clone()
        for whole, name in ((inputs, "inputs"), (labels, "labels")):
            old = kept[name][self._chosen].to(whole.dtype)
            whole[fresh] = torch.where(there.view(-1, *[1] * (whole.ndim - 1)), old, whole[fresh])
        self._mixed = replace(batch, inputs=inputs, labels=labels)
        return self._mixed

    @torch.no_grad()
    def update(self, losses: torch.Tensor) -> None:
        """Takes the (batch,) losses of the batch that `mix` returned last."""
        batch = self._mixed
        if batch is None or self.count == 0:
            return
        kept = self._kept.get(self._key)
        if kept is None:
            kept = {
                "inputs": batch.inputs.new_zeros((CAPACITY, *batch.inputs.shape[1:])),
                "labels": batch.labels.new_zeros((CAPACITY, *batch.labels.shape[1:])),
                "losses": losses.new_full((CAPACITY,), -1.0),
            }
        again = len(self._chosen)
        fresh = len(batch) - again
        known = kept["losses"].clone()
        if again:
            known[self._chosen] = torch.where(known[self._chosen] >= 0, losses[fresh:], known[self._chosen])
        hardest = losses[:fresh].topk(min(TAKEN, fresh))
        best = torch.cat([known, hardest.values]).topk(CAPACITY)
        self._kept[self._key] = {
            "inputs": torch.cat([kept["inputs"], batch.inputs[hardest.indices]])[best.indices],
            "labels": torch.cat([kept["labels"], batch.labels[hardest.indices]])[best.indices],
            "losses": best.values,
        }

    def state(self) -> dict[str, Any]:
        """The kept samples, for a checkpoint: tensors `inputs`, `labels` and `losses` under each key."""
        return self._kept

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Restores what `state` returned."""
        self._kept = {key: {name: value.to(device) for name, value in kept.items()} for key, kept in state.items()}
