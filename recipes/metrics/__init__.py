"""Metrics of the `evaluate` library that several recipes share. Each lies in a folder of its own, as `evaluate` wants.

    metric = metrics.load("token_perplexity")

Nothing is downloaded: `evaluate` reads the metric from this folder.
"""

from __future__ import annotations

from pathlib import Path

import evaluate

__all__ = ["load"]


def load(name: str) -> evaluate.EvaluationModule:
    """The metric in the folder `name`, which keeps what it is given in memory.

    Raises:
        ValueError: there is no such metric.
    """
    folder = Path(__file__).parent / name
    if not (folder / f"{name}.py").exists():
        known = sorted(path.parent.name for path in folder.parent.glob("*/*.py"))
        raise ValueError(f"there is no metric {name!r}; the metrics are {', '.join(known)}")
    return evaluate.load(str(folder), keep_in_memory=True)
