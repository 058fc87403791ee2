"""A run whose loss jumps goes back to before the jump, with a smaller learning rate."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any

import torch

__all__ = ["Rewind"]

SNAPSHOTS = 3  # one a line of the log; a run goes back to the oldest, as a jump may begin before it shows
LINES = 10  # of the log, whose median loss is what a jump is measured by
SMALLEST = 0.02  # losses count as no less: nearly nothing, a mean over 100 updates changes tenfold by chance


class Rewind:
    """Snapshots of weights and optimizer, and when to go back to one.

    Scores that are multiplied with the logarithm of the length make a sharp loss: for hundreds of updates it falls, and
    then a few throw the model out, to a loss above chance or into rows whose weight lies on one wrong key, from where
    no gradient leads back. The same update on other data, with smaller steps, mostly does not.

    Args:
        times: a mean loss of more than so many times the median of the last lines is a jump; 0: never go back.
        smaller: factor on the learning rate after each jump.
    """

    def __init__(self, times: float, smaller: float) -> None:
        if times != 0 and times <= 1:
            raise ValueError(f"rewind must be 0 (never) or above 1, got {times}")
        if not 0 < smaller <= 1:
            raise ValueError(f"rewind-lr must lie above 0 and be at most 1, got {smaller}")
        self.times, self.smaller = times, smaller
        self.lr_factor = 1.0
        self.jumps: list[dict[str, Any]] = []
        self._losses: deque[float] = deque(maxlen=LINES)
        self._snapshots: deque[tuple[int, list[torch.Tensor]]] = deque(maxlen=SNAPSHOTS)

    @torch.no_grad()
    def look(self, step: int, loss: float, usual: float | None, tensors: list[torch.Tensor]) -> bool:
        """After a line of the log: keep a snapshot, or go back to one.

        Args:
            step: updates made.
            loss: the line's mean.
            usual: what to measure by where there is no median yet; None where the median of earlier lines is to count,
                and this line for later ones.
            tensors: the run's: weights and the optimizer's. Changed in place.

        Returns:
            Whether it went back.
        """
        if self.times == 0:
            return False
        reference = usual if usual is not None or not self._losses else statistics.median(self._losses)
        limit = self.times * max(SMALLEST, loss if reference is None else reference)
        if self._snapshots and not loss <= limit:  # also where it is no number
            to_step, kept = self._snapshots[0]
            torch._foreach_copy_(tensors, kept)
            while len(self._snapshots) > 1:
                self._snapshots.pop()
            self.lr_factor *= self.smaller
            self.jumps.append({"step": step, "loss": loss, "to_step": to_step})
            return True
        if usual is None:
            self._losses.append(loss)
        self._snapshots.append((step, [tensor.detach().clone() for tensor in tensors]))
        return False

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "lr_factor": self.lr_factor,
            "jumps": self.jumps,
            "losses": list(self._losses),
            "snapshots": list(self._snapshots),
        }

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over a `state`."""
        self.lr_factor, self.jumps = state["lr_factor"], state["jumps"]
        self._losses.extend(state["losses"])
        for step, tensors in state["snapshots"]:
            self._snapshots.append((step, [tensor.to(device) for tensor in tensors]))
