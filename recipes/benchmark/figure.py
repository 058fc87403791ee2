"""Draws attention.png from attention.json: the time of attention against the length of the sequence.

python -m recipes.benchmark.figure
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from recipes.benchmark.results import ATTENTION_CASE, PEERS, by_case
from recipes.common import OTHERS, OURS, read_json, save_figure

PANELS = {"topical": "keys in runs of one direction", "nape": "NAPE positions"}
METHODS = {
    "ours": "entmax, this package",
    **{name: PEERS[name] for name in ("sdpa cuDNN", "sdpa flash-2", "flex alibi")},
}


def curves(results: list[dict[str, Any]], head_dim: int) -> dict[str, dict[str, dict[int, float]]]:
    """Milliseconds of forward and backward for one sequence and head: kind -> method -> length -> time."""
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for (kind, length, dim, batch, heads, _), rows in by_case(results, ATTENTION_CASE).items():
        if dim == head_dim and kind in PANELS:
            for method, row in rows.items():
                if method in METHODS:
                    found[kind][method][length] = row["forward_backward_ms"] / (batch * heads)
    return found


def draw(content: dict[str, Any], path: Path, head_dim: int = 64) -> None:
    """One panel for each kind of input. Methods measured at fewer than three lengths are drawn as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    styles = dict(zip(METHODS, (OURS, *OTHERS), strict=False))
    ticks = [2**power for power in range(10, 18)]
    with matplotlib.rc_context({"font.size": 14}):
        figure, grid = pyplot.subplots(1, len(PANELS), figsize=(13.0, 5.6), dpi=160, sharey=True, squeeze=False)
        lines: dict[str, Any] = {}
        by_kind = curves(content["results"], head_dim)
        for panel, (kind, title) in zip(grid[0], PANELS.items(), strict=True):
            for method, points in sorted(by_kind[kind].items(), key=lambda item: list(METHODS).index(item[0])):
                color, marker = styles[method]
                lengths, times = zip(*sorted(points.items()), strict=True)
                (line,) = panel.plot(lengths, times, color=color, marker=marker, markersize=7, linewidth=2.4)
                line.set_linestyle("-" if len(points) > 2 else "none")
                lines[METHODS[method]] = line
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(ticks, [f"{tick // 1024}K" for tick in ticks])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.set_title(title, loc="left", fontsize="medium")
            panel.set_xlabel("length in tokens")
            panel.grid(color="#e5e5e5", linewidth=0.8)
            panel.spines[["top", "right"]].set_visible(False)
        grid[0][0].set_ylabel("ms, forward and backward, one head")
        grid[0][0].legend(list(lines.values()), list(lines), frameon=False)
        save_figure(figure, path)


def main(command: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path(__file__).with_name("attention.json"))
    path = parser.parse_args(command).results
    draw(read_json(path), path.with_suffix(".png"))
    print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
