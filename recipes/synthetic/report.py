"""Remake the tables and the accuracy-by-length figure from results files.

    python recipes/synthetic/report.py

writes report.md and a figure for each table beside the results. Each training distribution has its own table, and each
row's letter says which of the training's settings differ from their defaults. Rows pool the seeds of one setting; each
seed's row follows. Figures name one setting of each method (`compared`); the others are thin lines of its color.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from string import ascii_lowercase
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.common import OTHERS, OURS, length_axes, markdown_table, save_figure
from recipes.synthetic.evaluate import RESULTS
from recipes.synthetic.measuring import wilson_interval
from recipes.synthetic.settings import RunSettings
from recipes.synthetic.tasks import TASKS

__all__ = [
    "COLORS",
    "TRACKS",
    "Group",
    "best",
    "caveats",
    "compared",
    "first_run",
    "grouped",
    "in_vain",
    "main",
    "markdown",
    "names",
    "tables",
    "times_million",
    "trained_alike",
]

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "published.json").read_text())
# Settings that say nothing about how a model came to be, or have a column of their own.
_UNNAMED = {"method", "positions", "steps", "minutes", "log_every", "save_every", "plateau", "compile"}
_UNNAMED |= {"validations", "validate_multiple", "validate_samples", "start_from", "tries", "give_up"}
# One color a method in every figure; published rows are gray.
_COLORED = ("asentmax", "softmax", "entmax", "ssmax", "adaptive_temperature", "topk", "stick_breaking")
COLORS = dict(zip(_COLORED, (OURS[0], *(color for color, _ in OTHERS[1:5]), "#e69f00", "#8c510a"), strict=True))
TRACKS = {"paper": "the paper's distribution", "own": "a distribution of our own"}
# What is wrong with a run that stays in the tables as it was measured: "caveat" in its results file.
_CAVEATS = {
    "wrong gradients": "trained with gradients that torch.compile got wrong (before commit 838291d; SSMax's were not "
    "looked at; [what is known of it]({findings}#jumps)): what was tested is right, what the settings do is not known "
    "from it"
}


@dataclass(frozen=True)
class Group:
    """The results of one setting, one for each seed."""

    task: str
    track: str
    method: str
    positions: str
    changed: str
    results: tuple[dict[str, Any], ...]

    @property
    def caveat(self) -> str:
        """What is wrong with its runs, for `caveats`; mostly nothing: an empty string."""
        return self.results[0]["run"].get("caveat", "")

    @property
    def minutes(self) -> float:
        """Of training, on average, in all runs of a chain."""
        return fmean(_in_all(result["run"], "seconds") for result in self.results) / 60

    @property
    def millions(self) -> float:
        """Training samples in millions, on average, in all runs of a chain."""
        return fmean(_in_all(result["run"], "samples") for result in self.results) / 1e6

    def entries(self, multiple: int) -> list[dict[str, Any]]:
        """What each seed has at a length."""
        return [entry for result in self.results for entry in result["lengths"] if entry["multiple"] == multiple]

    def multiples(self) -> set[int]:
        """The lengths that any seed was tested at."""
        return {entry["multiple"] for result in self.results for entry in result["lengths"]}

    def pooled(self, multiple: int) -> tuple[float, float, float] | None:
        """Exact match over all seeds' samples with its 95% interval, in percent."""
        entries = self.entries(multiple)
        if not entries:
            return None
        samples = sum(entry["samples"] for entry in entries)
        exact = sum(round(entry["exact_match"] * entry["samples"]) for entry in entries)
        low, high = wilson_interval(exact, samples)
        return 100 * exact / samples, 100 * low, 100 * high


def _in_all(run: dict[str, Any], what: str) -> float:
    """A run's samples or seconds, with those of the runs whose weights it began with."""
    return run[what] + (run.get("started_from") or {what: 0})[what]


def _chain(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs, each from the weights of the one before, that a model comes from."""
    return [*(_chain(run["started_from"]) if run.get("started_from") else []), run]


def first_run(run: dict[str, Any]) -> dict[str, Any]:
    """The first of the runs, each from the weights of the one before, that a model comes from."""
    return _chain(run)[0]


def in_vain(runs: list[dict[str, Any]]) -> str:
    """In words, the time that `_in_all` lacks: the first runs that mqmtar.sh made and did not go on from."""
    vain = [_tries(run) - 1 for run in runs]
    minutes = sum(number * first_run(run)["settings"]["minutes"] for number, run in zip(vain, runs, strict=True))
    count = f"{sum(vain)} first run{'s' if sum(vain) > 1 else ''}"
    return f" (without {count}, {minutes:.1f} minutes, whose validation was worse)" if sum(vain) else ""


def _tries(run: dict[str, Any]) -> int:
    """How many first runs there were to go on from. Before `--tries`, those up to the one taken, 100 seeds apart."""
    first, *further = _chain(run)
    if not further:
        return 1
    return further[0]["settings"].get("tries") or 1 + max(0, first["seed"] - run["seed"]) // 100


def _stages(run: dict[str, Any]) -> list[dict[str, Any]]:
    """A run's settings that differ from their defaults, and its minutes, after those of the runs that it began with."""
    stages = []
    for one in _chain(run):
        stage = {"minutes": one["settings"]["minutes"]}
        for settings_class, values in ((RunSettings, one["settings"]), (TASKS[run["task"]], one["task_settings"])):
            for item in fields(settings_class):
                value = values.get(item.name, item.default)
                if item.name not in _UNNAMED and value != item.default:
                    stage[item.name.replace("_", " ")] = value
        stages.append(stage)
    return stages


def _changed(run: dict[str, Any]) -> str:
    """The settings that differ from their defaults, in words."""
    text = ""
    for stage in _stages(run):
        parts = [f"{name} {value}" for name, value in stage.items() if name != "minutes"]  # the tables have them
        text = ", ".join(([f"[{text}], then"] if text else []) + parts)
    return text


def _differing(group: Group, base: Group) -> str:
    """What differs in a group's settings from another's, run by run; all of them where these are fewer or more runs."""
    mine, its = (_stages(g.results[0]["run"]) for g in (group, base))
    if len(mine) != len(its):
        return group.changed
    items = (*fields(RunSettings), *fields(TASKS[group.task]))
    defaults = {item.name.replace("_", " "): item.default for item in items}
    runs = []
    for number, (one, other) in enumerate(zip(mine, its, strict=True)):
        parts = [f"{name} {value}" for name, value in one.items() if other.get(name) != value]
        parts += [f"{name} {defaults[name]}" for name in other if name not in one]
        which = f"run {number + 1}: " if len(mine) > 1 else ""
        runs += [which + ", ".join(parts)] if parts else []
    return "; ".join(runs)


def trained_alike(group: Group, other: Group) -> bool:
    """Whether two groups had the same runs, learning rates aside, which are each method's own."""
    mine, its = (
        [{name: value for name, value in stage.items() if name != "lr"} for stage in _stages(g.results[0]["run"])]
        for g in (group, other)
    )
    return mine == its


def grouped(results: list[dict[str, Any]]) -> list[Group]:
    """Results of one setting together, tasks in their order and methods by name."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        run = result["run"]
        budget = " ".join(f"{one['settings']['steps']} {one['settings']['minutes']}" for one in _chain(run))
        settings = (run["settings"]["method"], run["settings"]["positions"], _changed(run), budget)
        groups[(run["task"], run["track"], *settings, run.get("caveat", ""))].append(result)
    made = []
    for (task, track, method, positions, changed, *_), members in groups.items():
        seeds = sorted(members, key=lambda result: result["run"]["seed"])
        made.append(Group(task, track, method, positions, changed, tuple(seeds)))
    order, tracks = list(TASKS), list(TRACKS)

    def place(group: Group) -> tuple[int, int, str, str, str]:
        track = tracks.index(group.track)
        return order.index(group.task), track, group.method, group.positions, group.changed

    return sorted(made, key=place)


def best(groups: list[Group]) -> Group:
    """The group of most seeds, and of those the one that holds furthest, with most of the samples right there.

    Of two with as many right there, the one that has more at the next shorter length; where none holds, the one with
    more right.
    Seeds come first: the best of many settings with one seed each is mostly luck. Before them comes having no caveat.
    """

    def rank(group: Group) -> tuple[bool, int, list[tuple[int, float]], list[tuple[int, float]]]:
        pooled = {multiple: group.pooled(multiple) for multiple in group.multiples()}
        all_found = sorted(((multiple, found[0]) for multiple, found in pooled.items() if found), reverse=True)
        held = [(multiple, right) for multiple, right in all_found if right >= 50]
        return not group.caveat, len(group.results), held, all_found

    return max(groups, key=rank)


def _ours(groups: list[Group]) -> Group | None:
    """ASEntmax's best group, which those of other methods are compared with; None without one of ASEntmax."""
    return best(found) if (found := [group for group in groups if group.method == "asentmax"]) else None


def compared(groups: list[Group]) -> list[Group]:
    """Each method's best group; where some were trained as ASEntmax's best one was, the best of these."""
    methods: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for group in groups:
        methods[group.method, group.positions].append(group)
    ours = _ours(groups)
    return [best([g for g in its if ours and trained_alike(g, ours)] or its) for its in methods.values()]


def caveats(groups: list[Group], findings: str) -> list[str]:
    """What is wrong with any of the groups, a sentence each; `findings` is the path of findings.md, for a link."""
    texts = (_CAVEATS[key].format(findings=findings) for key in dict.fromkeys(group.caveat for group in groups) if key)
    return [f"{text[0].upper()}{text[1:]}." for text in texts]


def tables(groups: list[Group]) -> list[tuple[tuple[str, str], list[Group]]]:
    """The groups of each task and training distribution."""
    members: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for group in groups:
        members[(group.task, group.track)].append(group)
    return list(members.items())


def names(members: list[Group]) -> list[str]:
    """What a table's groups are called: method, positions, a letter where settings are listed, a dagger for caveats."""
    letters = (first + last for first in ("", *ascii_lowercase) for last in ascii_lowercase)
    changed = (f" ({next(letters)})" if group.changed else "" for group in members)
    return [
        f"{group.method} + {group.positions}{letter}{'†' * bool(group.caveat)}"
        for group, letter in zip(members, changed, strict=True)
    ]


def markdown(groups: list[Group]) -> str:
    """Every table, by task and training distribution."""
    parts = []
    for (task, track), members in tables(groups):
        parts.append(f"## {task}, trained on {TRACKS[track]}\n")
        parts.append(_accuracy_table(task, members))
        if task == "mqmtar":
            parts.append("The query-error law: e = wrong queries / queries / pairs, over all seeds, x 1e-6.\n")
            parts.append(_law_table(members))
        parts.extend(f"† {text}\n" for text in caveats(members, "../findings.md"))
        parts.append(_settings(members))
    sources = "\n".join(f"- {name}: {text}" for name, text in PUBLISHED["sources"].items())
    return "# Synthetic tasks\n\n" + "\n".join(parts) + f"\nPublished rows:\n{sources}\n"


def _settings(members: list[Group]) -> str:
    """What the groups of a table were trained with: the best of the main method in full, the others next to it."""
    named = list(zip(names(members), members, strict=True))
    base = best([group for group in members if group.method == "asentmax"] or members)
    base_name = next(name for name, group in named if group is base)
    without = {name: in_vain([result["run"] for result in group.results]) for name, group in named}
    lines = [f"- {base_name}: {base.changed}{without[base_name]}"] if base.changed else []
    for name, group in named:
        if group is not base and group.changed:
            parts = [f"as {base_name}"] if base.changed else []
            parts += [differing] if (differing := _differing(group, base)) else []
            lines.append(f"- {name}: {', but '.join(parts)}{without[name]}")
    return "Settings that are not the defaults:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _accuracy_table(task: str, members: list[Group]) -> str:
    """Exact match in percent. Pooled over seeds with the 95% interval; then each seed."""
    published = PUBLISHED["exact_match"].get(task, {})
    theirs = {int(key) for rows in published.values() for row in rows.values() for key in row}
    multiples = sorted(theirs.union(*(group.multiples() for group in members)))
    header = ["exact match, %", "seeds", "samples, M", "minutes", "device", *(f"{multiple}x" for multiple in multiples)]
    rows = []
    for name, group in zip(names(members), members, strict=True):
        runs = [result["run"] for result in group.results]
        cells = [
            f"**{name}**",
            str(len(runs)),
            f"{group.millions:.1f}",
            f"{group.minutes:.1f}",
            runs[0]["header"]["device"]["name"],
        ]
        rows.append([*cells, *(_with_interval(group.pooled(multiple)) for multiple in multiples)])
        if len(runs) > 1:
            for result in group.results:
                at = {entry["multiple"]: f"{100 * entry['exact_match']:.1f}" for entry in result["lengths"]}
                rows.append([_seed(result["run"]), "", "", "", "", *(at.get(m, "") for m in multiples)])
    for method, sources in published.items():
        for source, values in sources.items():
            cells = [f"{method}, {source}", "", "", "", ""]
            rows.append([*cells, *(str(values.get(str(multiple), "")) for multiple in multiples)])
    return markdown_table(header, rows) + "\n"


def _seed(run: dict[str, Any]) -> str:
    """A run's seed, and that of the run whose weights it began with where that is another (see mqmtar.sh)."""
    own, first = run["seed"], first_run(run)["seed"]
    return f"seed {own}" if own == first else f"seed {own} (first run: seed {first})"


def _with_interval(pooled: tuple[float, float, float] | None) -> str:
    return "" if pooled is None else f"{pooled[0]:.1f} [{pooled[1]:.1f}, {pooled[2]:.1f}]"


def times_million(e: float, low: float, high: float) -> str:
    """A cell of a table of the query-error law: e and its interval, x 1e6."""
    return f"{1e6 * e:.2g} [{1e6 * low:.2g}, {1e6 * high:.2g}]"


def _law_table(members: list[Group]) -> str:
    multiples = sorted(set().union(*(group.multiples() for group in members)))
    rows = []
    for name, group in zip(names(members), members, strict=True):
        cells = []
        for multiple in multiples:
            entries = group.entries(multiple)
            if not entries:
                cells.append("")
                continue
            wrong, queries = (sum(entry[name] for entry in entries) for name in ("queries_wrong", "queries"))
            low, high = wilson_interval(wrong, queries)
            cells.append(times_million(*(share / entries[0]["pairs"] for share in (wrong / queries, low, high))))
        rows.append([name, *cells])
    return markdown_table(["e x 1e6", *(f"{multiple}x" for multiple in multiples)], rows) + "\n"


def figure(groups: list[Group], file: Path) -> None:
    """Accuracy by length, as the paper's Figure 1, for groups of one task and training distribution.

    One group of each method (`compared`) has a band: the range of its seeds, or the 95% interval of a single one.
    ASEntmax's line is wide, so that it is seen beneath others; that of a baseline with less than nine tenths of its
    training, by minutes and by samples, is dashed, and its label says so.
    """
    task = groups[0].task
    trained = groups[0].results[0]["run"]["task_settings"]["max_length"]
    published = PUBLISHED["exact_match"].get(task, {})
    lengths = [trained * multiple for multiple in sorted(set().union(*(group.multiples() for group in groups)))]
    drawing, (axes,) = length_axes(trained, lengths)
    finest, ours = compared(groups), _ours(groups)
    for name, group in zip(names(groups), groups, strict=True):
        color = COLORS[group.method]
        values = [(trained * multiple, group.pooled(multiple)) for multiple in sorted(group.multiples())]
        shown = [(length, *pooled) for length, pooled in values if pooled is not None]
        at, accuracy, low, high = zip(*shown, strict=True)
        if group in finest:
            if len(group.results) > 1:  # how far seeds lie apart says more than how many samples there are
                shares = [[100 * e["exact_match"] for e in group.entries(m)] for m in sorted(group.multiples())]
                low, high = tuple(map(min, shares)), tuple(map(max, shares))
                name += f": mean and range of {len(group.results)} seeds"
            style = "o-"
            if ours and group.minutes < 0.9 * ours.minutes and group.millions < 0.9 * ours.millions:
                name += f": {group.minutes:.1f} minutes, not {ours.minutes:.1f}"
                style = "o--"
            width, size, order = (4.5, 9.0, 1.9) if group.method == "asentmax" else (2.0, 6.0, 2.0)
            axes.plot(at, accuracy, style, label=name, color=color, linewidth=width, markersize=size, zorder=order)
            axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
        else:
            axes.plot(at, accuracy, marker=".", linewidth=0.8, color=color, alpha=0.5)
    for shade, (method, sources) in zip(("#333333", "#777777", "#aaaaaa"), published.items(), strict=False):
        for style, (source, row) in zip(("--", ":"), sources.items(), strict=False):
            theirs = [trained * int(multiple) for multiple in row]
            label = f"{method}, {source}"
            axes.plot(theirs, row.values(), linestyle=style, color=shade, linewidth=1.2, marker=".", label=label)
    if len(finest) < len(groups):
        axes.plot([], [], linewidth=0.8, color="#555555", alpha=0.5, label="thin: other settings")
    if any(group.caveat for group in finest):
        axes.plot([], [], linestyle="", label="†: see report.md")
    axes.set(title=f"{task}, trained on {TRACKS[groups[0].track]}", ylabel="exact match, %", ylim=(-3, 103))
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    drawing.set_figwidth(10.5)
    save_figure(drawing, file)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    folder = parser.parse_args(arguments).results
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    if not results:
        parser.error(f"no results files in {folder}; evaluate.py writes them")
    groups = grouped(results)
    (folder / "report.md").write_text(markdown(groups))
    for (task, track), members in tables(groups):
        figure(members, folder / f"{task}-{track}.png")
    print(f"wrote {folder / 'report.md'} and its figures")


if __name__ == "__main__":
    main(sys.argv[1:])
