"""Draws the quickstart's figure and prints its tables, from a results file.

    python -m recipes.quickstart.report                                   the results in this folder
    python -m recipes.quickstart.report runs/quickstart/results.json      those of your own run

The figure, results.png, is written beside the results file.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from recipes import common

__all__ = ["figure", "lengths_of", "summary", "values_by_method"]


def lengths_of(content: dict[str, Any]) -> list[int]:
    """The lengths, in tokens, that every model was tested at."""
    return [int(length) for length in content["runs"][0]["accuracy"]]


def values_by_method(content: dict[str, Any], entry: str, scale: float = 1.0) -> dict[str, list[list[float]]]:
    """For each method, one list of values (one for each length) for each seed.

    Args:
        content: of a results file.
        entry: `accuracy` or `keys_in_use`.
        scale: a factor on all values.
    """
    rates: dict[str, set[float]] = defaultdict(set)
    for run in content["runs"]:
        rates[run["method"]].add(run["learning_rate"])
    values: dict[str, list[list[float]]] = defaultdict(list)
    for run in content["runs"]:
        several = len(rates[run["method"]]) > 1
        name = f"{run['method']}, learning rate {run['learning_rate']:g}" if several else run["method"]
        values[name].append([scale * run[entry][str(length)] for length in lengths_of(content)])
    return dict(values)


def summary(content: dict[str, Any]) -> str:
    """Both tables as plain text: right answers, and keys with any weight."""
    answers = content["streams_per_length"] * content["queries_per_stream"]
    seeds = len(content["seeds"])
    titles = {
        "accuracy": f"Right answers in %, {answers} queries at each length",
        "keys_in_use": "Keys to which a query of the last layer gives any weight, in the head that has most of them",
    }
    lengths = lengths_of(content)
    columns = ["tokens", *(f"{length:,} ({length // lengths[0]}x)" for length in lengths)]
    parts = []
    for entry, title in titles.items():
        rows = [
            [name, *(f"{sum(column) / len(column):.1f}" for column in zip(*runs, strict=True))]
            for name, runs in values_by_method(content, entry, 100.0 if entry == "accuracy" else 1.0).items()
        ]
        of_seeds = "one seed" if seeds == 1 else f"mean of {seeds} seeds"
        parts.append(f"{title} ({of_seeds})\n\n{common.format_table(columns, rows)}")
    return "\n\n".join(parts)


def figure(content: dict[str, Any], path: Path) -> None:
    """Right answers, and keys with any weight, against length."""
    import matplotlib

    with matplotlib.rc_context({"font.size": 15}):
        lengths = lengths_of(content)
        drawing, (answers, keys) = common.length_axes(lengths[0], lengths, panels=2)
        drawing.set_size_inches(13.0, 5.4)
        common.plot_lengths(answers, values_by_method(content, "accuracy", 100.0), lengths)
        answers.set_title("right answers, %", loc="left", fontsize="medium")
        answers.set_ylim(-3, 103)
        answers.legend(frameon=False, loc="center right")
        common.plot_lengths(keys, values_by_method(content, "keys_in_use"), lengths)
        for line in keys.lines:
            if line.get_label() == "softmax + RoPE":  # both softmax models use all keys: let it show below the other
                line.set(linewidth=6.0, markersize=12.0)
        keys.set_yscale("log")
        keys.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
        keys.set_title("keys that get any weight, last layer", loc="left", fontsize="medium")
        common.save_figure(drawing, path)


def main(command: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path(__file__).with_name("results.json"))
    path = parser.parse_args(command).results
    content = common.read_json(path)
    print(summary(content))
    figure(content, path.with_suffix(".png"))
    print(f"\nWrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
