"""Accuracy by length, one figure for each task and training distribution."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.common import OTHERS, OURS, length_axes, save_figure
from recipes.synthetic.groups import TASK_NAMES, TRACKS, Group, compared, ours

__all__ = ["COLORS", "Line", "differ", "figure", "lines"]

MOST_LINES = 6
APART = 5.0  # percentage points between two lines below which a figure shows nothing that a table does not
# The order in which methods get one of the lines.
_ORDER = ("asentmax", "softmax", "entmax", "ssmax", "adaptive_temperature", "stick_breaking", "topk")
COLORS = dict(zip(_ORDER, (OURS[0], *(color for color, _ in OTHERS[1:5]), "#8c510a", "#e69f00"), strict=True))
PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Line:
    """One line of a figure.

    Attributes:
        label: for the legend.
        values: for each length, in multiples of the training length: exact match, and a range around it, in percent.
        color, style: for matplotlib; `style` is a line style.
        wide: whether the line is wide, so that it is seen beneath others.
    """

    label: str
    values: dict[int, tuple[float, float, float]]
    color: str
    style: str = "-"
    wide: bool = False


def lines(groups: list[Group], fresh: list[dict[str, Any]]) -> list[Line]:
    """The lines of a figure: ASEntmax, fresh seeds, the published ASEntmax, then the other methods, six at most.

    Args:
        groups: of one task and training distribution.
        fresh: results of seeds that no group pools, of the same.
    """
    main = ours(groups)
    drawn = [_of_group(group, main) for group in sorted(compared(groups), key=lambda g: _ORDER.index(g.method))]
    first = drawn[:1] if main else []
    extra = [_of_fresh(result) for result in fresh]
    theirs = PUBLISHED["exact_match"].get(groups[0].task, {}).get("asentmax", {}).get("paper")
    if theirs and groups[0].track == "paper":
        values = {int(multiple): (value, value, value) for multiple, value in theirs.items()}
        extra.append(Line("ASEntmax, published", values, "#333333", ":"))
    return [*first, *extra, *drawn[len(first) :]][:MOST_LINES]


def _of_group(group: Group, main: Group | None) -> Line:
    """A group's line, with the range of its seeds, or the 95% interval of a single seed.

    A baseline with less than nine tenths of ASEntmax's training, by minutes and by samples, is dashed and says so.
    """
    values, name = {}, group.name
    for multiple in sorted(group.multiples()):
        pooled = group.pooled(multiple)
        assert pooled is not None
        shares = [100 * entry["exact_match"] for entry in group.entries(multiple)]
        values[multiple] = (pooled[0], min(shares), max(shares)) if len(group.results) > 1 else pooled
    if len(group.results) > 1:
        name += f"\n({len(group.results)} seeds: mean, range)"
    less = main and group.minutes < 0.9 * main.minutes and group.millions < 0.9 * main.millions
    if less and main:
        name += f"\n({group.minutes:.1f} minutes, not {main.minutes:.1f})"
    return Line(name, values, COLORS[group.method], "--" if less else "-", group is main)


def _of_fresh(result: dict[str, Any]) -> Line:
    values = {e["multiple"]: (100 * e["exact_match"], *(100 * x for x in e["interval"])) for e in result["lengths"]}
    label = f"ASEntmax + NAPE,\na fresh seed ({result['run']['seed']})"
    return Line(label, values, COLORS["asentmax"], "--")


def differ(drawn: list[Line]) -> bool:
    """Whether two lines are at least APART points apart at some length, so that a figure is worth looking at."""
    multiples = set().union(*(line.values for line in drawn))
    at = ([line.values[multiple][0] for line in drawn if multiple in line.values] for multiple in multiples)
    return any(max(values) - min(values) >= APART for values in at)


def figure(groups: list[Group], drawn: list[Line], file: Path) -> None:
    """Draws the lines of one task and training distribution, as the paper's Figure 1.

    Args:
        groups: of the table that the figure belongs to.
        drawn: from `lines`.
        file: the PNG to write.
    """
    import matplotlib

    trained = groups[0].runs[0]["task_settings"]["max_length"]
    multiples = sorted(set().union(*(line.values for line in drawn)))
    with matplotlib.rc_context({"font.size": 15}):
        drawing, (axes,) = length_axes(trained, [trained * multiple for multiple in multiples])
        for line in drawn:
            at = [trained * multiple for multiple in line.values]
            accuracy, low, high = zip(*line.values.values(), strict=True)
            width, size, order = (5.0, 10.0, 1.9) if line.wide else (2.4, 6.5, 2.0)
            axes.plot(
                at, accuracy, line.style, marker="o", label=line.label, color=line.color, linewidth=width,
                markersize=size, zorder=order,
            )  # fmt: skip
            axes.fill_between(at, low, high, color=line.color, alpha=0.15, linewidth=0)
        axes.set_xticks([trained * multiple for multiple in multiples], [f"{multiple}x" for multiple in multiples])
        axes.set_title(f"{TASK_NAMES[groups[0].task]}, trained on {TRACKS[groups[0].track]}", fontsize=15)
        lowest = min(low for line in drawn for _, low, _ in line.values.values())
        bottom = 50 if lowest >= 50 else -3
        axes.set(
            ylabel="exact match, %" + " (from 50)" * (bottom > 0),
            ylim=(bottom, 102),
            xlabel=f"length in multiples of {trained} tokens",
        )
        axes.legend(frameon=False, fontsize=13, loc="center left", bbox_to_anchor=(1.0, 0.5))
        drawing.set_size_inches(11.0, 5.0)
        save_figure(drawing, file)
