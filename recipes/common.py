"""What all recipes share: the default device, the header of a results file, tables and figures of one style."""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
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
    "OTHERS",
    "OURS",
    "REPOSITORY",
    "cpu_name",
    "default_device",
    "format_table",
    "launch_command",
    "length_axes",
    "markdown_table",
    "plot_lengths",
    "read_json",
    "results_header",
    "save_figure",
    "short_commit",
    "write_json",
]

REPOSITORY = Path(__file__).resolve().parents[1]

# (color, marker) of ASEntmax and of the other methods, from Okabe and Ito's palette, which color-blind readers can tell
# apart. ASEntmax has the strongest color.
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


def launch_command() -> str:
    """The command line of this process, to be run from the repository's root: `python -m MODULE ARGUMENTS`."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None and spec.origin == sys.argv[0]:  # started with python -m
        return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]])
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def results_header(device: torch.device, seeds: Sequence[int]) -> dict[str, Any]:
    """What a reader needs to reproduce the numbers. Call it before the work starts, since the files may change later.

    Args:
        device: where the work runs.
        seeds: of all runs in the file.

    Returns:
        `command`, `date`, `seeds`, `device`, `versions`, `commit`, and `uncommitted`: the files of the library and the
        recipes that differed from the commit. An empty list means that the commit is what ran.
    """
    changed = _git("status", "--porcelain", "--untracked-files=all", "--", "hf_asentmax", "recipes")
    return {
        "command": launch_command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
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
    """The first ten characters of a full commit hash; any other text is returned as it is."""
    return commit[:10] if commit and re.fullmatch("[0-9a-f]{40}", commit) else str(commit)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a results file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path`. The folder is created if it does not exist."""
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
    """A figure with one or more panels over the sequence length, on a logarithmic axis.

    The lengths that training covers are shaded. Font sizes follow matplotlib's `font.size`.

    Args:
        train_length: the longest sequence in training, in tokens.
        lengths: the ticks of the axis, ascending.
        panels: how many panels stand side by side.
    """
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
            left * 1.06,
            0.5,
            "trained",
            transform=axes.get_xaxis_transform(),
            va="center",
            rotation=90,
            fontsize="small",
            color="#666666",
        )
        axes.set_xlabel("length in tokens (times the training length)")
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid[0])


def plot_lengths(axes: Axes, curves: Mapping[str, Sequence[Sequence[float]]], lengths: Sequence[int]) -> None:
    """Draws one line for each method: the mean over its seeds, with a dot for every seed where there are several.

    Args:
        axes: from `length_axes`.
        curves: for each method, one sequence of values (one for each length) for each seed.
        lengths: the x values, in tokens.
    """
    others = cycle(OTHERS)
    for name, runs in curves.items():
        color, marker = OURS if name == "ASEntmax + NAPE" else next(others)
        mean = [sum(values) / len(runs) for values in zip(*runs, strict=True)]
        axes.plot(lengths, mean, color=color, marker=marker, markersize=6.5, linewidth=2.4, label=name)
        if len(runs) > 1:
            for run in runs:
                axes.plot(lengths, run, color=color, marker=marker, markersize=3.5, linewidth=0, alpha=0.5)


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG file. The folder is created if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path)
