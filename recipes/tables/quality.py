"""The sections on what models can do: recall, the synthetic tasks, language."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.common import REPOSITORY, markdown_table, read_json
from recipes.quickstart.report import lengths_of, values_by_method
from recipes.synthetic.groups import (
    METHOD_NAMES,
    TASK_NAMES,
    TRACKS,
    Group,
    compared,
    fresh_seed_sentence,
    grouped,
    read_results,
    tables,
    trained_alike,
)
from recipes.tables.origins import origin, origin_of_several

__all__ = ["language_results", "quickstart_results", "results", "synthetic_results"]

RECIPES = REPOSITORY / "recipes"
PUBLISHED = {"paper": "the paper", "indep.": "an independent group"}
OVERVIEW = (1, 4, 16, 64, 256, 1024)  # multiples of the training length in the README
OTHERWISE = "trained otherwise than ASEntmax in this table"


def _length_columns(lengths: Sequence[int]) -> list[str]:
    return [f"{length:,} ({length // lengths[0]}x)" for length in lengths]


def _mean_and_range(values: Sequence[float]) -> str:
    """The mean of the seeds, and the least and the largest where they differ."""
    mean, least, most = (f"{value:.1f}" for value in (sum(values) / len(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def quickstart_results(path: Path = RECIPES / "quickstart" / "results.json") -> str:
    """Right answers, and keys with any weight, of the quickstart's models."""
    content = read_json(path)
    columns = ["", *_length_columns(lengths_of(content))]
    queries, seeds = content["streams_per_length"] * content["queries_per_stream"], len(content["seeds"])

    def table(entry: str, scale: float) -> str:
        values = values_by_method(content, entry, scale)
        rows = [[name, *map(_mean_and_range, zip(*runs, strict=True))] for name, runs in values.items()]
        return markdown_table(columns, rows)

    return "\n\n".join(
        [
            f"Right answers in %, {queries} queries at each length, mean of {seeds} seeds (and their range):",
            table("accuracy", 100.0),
            "Keys to which a query of the last layer gives any weight, in the head that has most of them:",
            table("keys_in_use", 1.0),
            origin(content),
        ]
    )


def language_results(path: Path = RECIPES / "pretrain" / "results.json") -> str:
    """Perplexity of small language models against length."""
    content = read_json(path)
    by_method, shortest = content["results"], content["train_length"]
    first = next(iter(by_method.values()))
    lengths = [int(length) for length in first["by_length"]]
    rows = [
        [name, *(f"{one['by_length'][str(length)]['perplexity']:.2f}" for length in lengths)]
        for name, one in by_method.items()
    ]
    run = next(iter(content["training"].values()))
    return "\n\n".join(
        [
            f"This is a small experiment: models of {run['parameters'] / 1e6:.1f} million parameters, trained for "
            f"{run['settings']['steps']:,} steps on {run['tokens_seen']:,} tokens from a text of 4 MB (the King James "
            f"Bible), {shortest} tokens at a time. Perplexity over the same {first['tokens']:,} held-out tokens, in "
            "windows of each length:",
            markdown_table(["", *_length_columns(lengths)], rows),
            origin(content),
        ]
    )


def _synthetic_tables(folder: Path) -> tuple[dict[tuple[str, str], list[Group]], list[dict[str, Any]]]:
    """For each task and training distribution one group of each method, ASEntmax first; and seeds that none pools."""
    pooled, fresh = read_results(folder)
    order = list(METHOD_NAMES)
    by_case = {
        case: sorted(compared(members), key=lambda group: (order.index(group.method), group.positions))
        for case, members in tables(grouped(pooled))
    }
    return by_case, fresh


def _published(folder: Path) -> dict[str, Any]:
    rows: dict[str, Any] = read_json(folder.parent / "published.json")["exact_match"]
    return rows


def results(folder: Path = RECIPES / "synthetic" / "results") -> str:
    """Exact match on MQMTAR of the methods that were trained as ASEntmax was, beside the paper's rows."""
    by_case, fresh = _synthetic_tables(folder)
    ours, *others = by_case["mqmtar", "paper"]
    alike = [group for group in others if group.method in ("softmax", "entmax", "ssmax") and trained_alike(group, ours)]

    def row(group: Group) -> list[str]:
        seeds = len(group.results)
        name = f"{group.name}{f', mean of {seeds} seeds' if seeds > 1 else ''}"
        return [name, *(f"{found[0]:.1f}" if (found := group.pooled(m)) else "" for m in OVERVIEW)]

    published = _published(folder)["mqmtar"]
    rows = [row(group) for group in (ours, *alike)]
    for method in ("asentmax", "softmax"):
        values = published[method]["paper"]
        rows.append([f"{METHOD_NAMES[method]} + NAPE, in the paper", *(f"{values[str(m)]:.1f}" for m in OVERVIEW)])
    train_length = ours.results[0]["run"]["task_settings"]["max_length"]
    headers = [result["evaluation"] for group in (ours, *alike) for result in group.results]
    return "\n\n".join(
        [
            markdown_table(["", *_length_columns([train_length * multiple for multiple in OVERVIEW])], rows),
            fresh_seed_sentence(fresh),
            f"Our rows had the same training. {origin_of_several(headers, 'recipes/synthetic/results')}",
        ]
    )


def _task_table(groups: list[Group], published: dict[str, Any]) -> str:
    """Exact match at every length: our rows with the range of their seeds, then the published rows."""
    known = {int(multiple) for rows in published.values() for row in rows.values() for multiple in row}
    multiples = sorted(known.union(*(group.multiples() for group in groups)))
    ours = next((group for group in groups if group.method == "asentmax"), None)
    rows = []
    for group in groups:
        mark = " †" if ours and not trained_alike(group, ours) else ""
        values = {m: [100 * entry["exact_match"] for entry in group.entries(m)] for m in multiples}
        cells = [_mean_and_range(values[m]) if values[m] else "" for m in multiples]
        rows.append([f"{group.name}{mark}", str(len(group.results)), f"{group.minutes:.1f}", *cells])
    for method in [name for name in METHOD_NAMES if name in published]:
        for source, found in published[method].items():
            cells = [f"{found[str(m)]:.1f}" if str(m) in found else "" for m in multiples]
            rows.append([f"{METHOD_NAMES[method]}, {PUBLISHED[source]}", "", "", *cells])
    first = groups[0].results[0]["run"]["task_settings"]["max_length"]
    return markdown_table(["", "seeds", "minutes", *_length_columns([first * m for m in multiples])], rows)


def synthetic_results(folder: Path = RECIPES / "synthetic" / "results") -> str:
    """Exact match on every synthetic task, one group of runs for each method."""
    by_case, fresh = _synthetic_tables(folder)
    published = _published(folder)
    parts = [
        "Exact match in %. Where there are several seeds, the mean and the range. Minutes are those of training on one "
        f"GPU. A row with † was {OTHERWISE}. Adaptive temperature works at inference only, so it has softmax's "
        "weights. Rows trained on a distribution of our own are not comparable with published ones."
    ]
    for (task, track), groups in by_case.items():
        rows = published.get(task, {}) if track == "paper" else {}
        parts += [f"**{TASK_NAMES[task]}**, trained on {TRACKS[track]}", _task_table(groups, rows)]
        parts += [fresh_seed_sentence(fresh)] if (task, track) == ("mqmtar", "paper") else []
    headers = [result["evaluation"] for groups in by_case.values() for group in groups for result in group.results]
    return "\n\n".join([*parts, origin_of_several(headers, "recipes/synthetic/results")])
