"""The synthetic tasks of the paper, generated on the fly."""

from .base import IGNORED, Batch, Task
from .max_retrieval import MaxRetrieval
from .mqmtar import Mqmtar
from .sequences import Copy, FlipFlop, LocalCount, Parity, Reverse, Sort, TwoBack

__all__ = ["IGNORED", "TASKS", "Batch", "MaxRetrieval", "Mqmtar", "Task"]

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Mqmtar, Copy, Reverse, Sort, TwoBack, LocalCount, FlipFlop, MaxRetrieval, Parity)
}
