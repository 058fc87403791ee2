"""What every recipe needs: the device, the header of a results file, tables and plots that look alike."""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

import hf_asentmax

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "REPOSITORY",
    "cpu_name",
    "default_device",
    "format_table",
    "length_axes",
    "plot_lengths",
    "results_header",
    "save_figure",
    "short_commit",
    "write_json",
]

REPOSITORY = Path(__file__).resolve().parents[1]

# Okabe and Ito's palette, which colour-blind readers tell apart; the method that the package is about is the strong one
OURS = ("#d55e00", "o")
OTHERS = (("#8c8c8c", "s"), ("#0072b2", "^"), ("#009e73", "D"), ("#cc79a7", "v"), ("#56b4e9", "P"), ("#000000", "X"))


def default_device() -> torch.device:
    """A CUDA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_name() -> str:
    """The processor's model name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.rstrip()


def results_header(device: torch.device, seeds: Sequence[int]) -> dict[str, Any]:
    """What a reader needs to get the same numbers: command, seeds, device, versions, commit. Call it at the start.

    `uncommitted` lists changed files of the library and the recipes; empty means that the commit is what ran.
    """
    changed = _git("status", "--porcelain", "--untracked-files=all", "--", "hf_asentmax", "recipes")
    script = Path(sys.argv[0])
    if script.is_absolute() and script.is_relative_to(REPOSITORY):
        script = script.relative_to(REPOSITORY)
    return {
        "command": shlex.join(["python", str(script), *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seeds": list(seeds),
        "device": {
            "type": device.type,
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "hf_asentmax": hf_asentmax.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": [] if not changed else [line[3:] for line in changed.splitlines()],
    }


def short_commit(commit: str | None) -> str:
    """A commit's first characters, for tables; what says more than one commit is left as it is."""
    return commit[:10] if commit and re.fullmatch("[0-9a-f]{40}", commit) else str(commit)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text: the first column left-aligned, the others right-aligned."""
    widths = [max(len(line[column]) for line in [columns, *rows]) for column in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *rest])

    return "\n".join([line(columns), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def length_axes(train_length: int, lengths: Sequence[int], panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of panels whose x axis is the length in tokens, doubling; the lengths seen in training are shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    width = 7.2 if panels == 1 else 5.6 * panels
    figure, grid = pyplot.subplots(1, panels, figsize=(width, 4.2), dpi=160, squeeze=False)
    for axes in grid[0]:
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}\n{length // train_length}x" for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        left, right = lengths[0] / 2**0.35, lengths[-1] * 2**0.35
        axes.set_xlim(left, right)
        axes.axvspan(left, train_length, color="#000000", alpha=0.05, linewidth=0)
        axes.text(
            left * 1.06, 0.5, "trained", transform=axes.get_xaxis_transform(), va="center", rotation=90, fontsize=8,
            color="#666666",
        )  # fmt: skip
        axes.set_xlabel("length in tokens (times the training length)")
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid[0])


def plot_lengths(axes: Axes, curves: Mapping[str, Sequence[Sequence[float]]], lengths: Sequence[int]) -> None:
    """One line per method through the mean over its seeds, with a dot for every seed where there are several.

    Args:
        axes: from `length_axes`.
        curves: method -> one sequence of values (one per length) for each seed.
        lengths: the x values.
    """
    others = cycle(OTHERS)
    for name, runs in curves.items():
        colour, marker = OURS if name == "ASEntmax + NAPE" else next(others)
        mean = [sum(values) / len(runs) for values in zip(*runs, strict=True)]
        axes.plot(lengths, mean, color=colour, marker=marker, markersize=5.5, linewidth=2.0, label=name)
        if len(runs) > 1:
            for run in runs:
                axes.plot(lengths, run, color=colour, marker=marker, markersize=3, linewidth=0, alpha=0.5)
    axes.legend(frameon=False, fontsize=9)


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path)
