"""Results files grouped by setting: one group for each setting, with one result for each seed."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from recipes.synthetic.measuring import wilson_interval
from recipes.synthetic.settings import RunSettings
from recipes.synthetic.tasks import TASKS

__all__ = [
    "METHOD_NAMES",
    "TASK_NAMES",
    "TRACKS",
    "Group",
    "best",
    "caveats",
    "chain",
    "compared",
    "current_command",
    "differing",
    "fresh_seed_sentence",
    "grouped",
    "in_vain",
    "ours",
    "read_results",
    "tables",
    "trained_alike",
]

# Settings that do not describe how a model came to be, or that have a column of their own.
_UNNAMED = {"method", "positions", "steps", "minutes", "log_every", "plateau", "compile"}
_UNNAMED |= {"validations", "validate_multiple", "validate_samples", "start_from", "tries", "give_up"}
TRACKS = {"paper": "the paper's distribution", "own": "a distribution of our own"}
METHOD_NAMES = {
    "asentmax": "ASEntmax",
    "softmax": "softmax",
    "entmax": "entmax",
    "ssmax": "SSMax",
    "adaptive_temperature": "adaptive temperature",
    "topk": "top-k",
    "stick_breaking": "stick-breaking",
}
TASK_NAMES = {
    "mqmtar": "MQMTAR",
    "copy": "Copy",
    "reverse": "Reverse",
    "sort": "Sort",
    "two_back": "2Back",
    "local_count": "Local count",
    "flip_flop": "Flip-flop",
    "max_retrieval": "Max retrieval",
    "parity": "Parity",
}
_POSITION_NAMES = {"nape": "NAPE", "nope": "NoPE", "rope": "RoPE", "alibi": "ALiBi"}
# Remarks on runs that stay in the tables as they were measured: "caveat" in their results files.
_CAVEATS = {
    "deleted option": "trained with an option that was deleted because it did not help; its code is in the history, "
    "at the tag `lab-notebook` ([findings]({findings}))"
}


@dataclass(frozen=True)
class Group:
    """The results of one setting, one for each seed.

    Attributes:
        task, track, method, positions: of all its runs.
        changed: the settings that differ from their defaults, in words.
        results: the contents of the results files, by seed.
    """

    task: str
    track: str
    method: str
    positions: str
    changed: str
    results: tuple[dict[str, Any], ...]

    @property
    def name(self) -> str:
        """Method and positions, as people write them: ASEntmax + NAPE."""
        return f"{METHOD_NAMES[self.method]} + {_POSITION_NAMES[self.positions]}"

    @property
    def runs(self) -> list[dict[str, Any]]:
        """The runs of the results."""
        return [result["run"] for result in self.results]

    @property
    def caveat(self) -> str:
        """The key of a remark on its runs, for `caveats`; usually empty."""
        return str(self.results[0]["run"].get("caveat", ""))

    @property
    def minutes(self) -> float:
        """Minutes of training, averaged over seeds, in all runs of a chain."""
        return fmean(_in_all(run, "seconds") for run in self.runs) / 60

    @property
    def millions(self) -> float:
        """Training samples in millions, averaged over seeds, in all runs of a chain."""
        return fmean(_in_all(run, "samples") for run in self.runs) / 1e6

    def entries(self, multiple: int) -> list[dict[str, Any]]:
        """The test of each seed at a length."""
        return [entry for result in self.results for entry in result["lengths"] if entry["multiple"] == multiple]

    def multiples(self) -> set[int]:
        """The lengths at which any seed was tested."""
        return {entry["multiple"] for result in self.results for entry in result["lengths"]}

    def pooled(self, multiple: int) -> tuple[float, float, float] | None:
        """Exact match over the samples of all seeds with its 95% interval, in percent; None without a test."""
        entries = self.entries(multiple)
        if not entries:
            return None
        samples = sum(entry["samples"] for entry in entries)
        exact = sum(round(entry["exact_match"] * entry["samples"]) for entry in entries)
        low, high = wilson_interval(exact, samples)
        return 100 * exact / samples, 100 * low, 100 * high


def read_results(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The results files in a folder: those of the tables, and those of seeds that no table pools ("fresh_seed")."""
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    return [one for one in contents if not one.get("fresh_seed")], [one for one in contents if one.get("fresh_seed")]


def _in_all(run: dict[str, Any], what: str) -> float:
    """A run's samples or seconds, with those of the runs whose weights it began with."""
    return float(run[what] + (run.get("started_from") or {what: 0})[what])


def chain(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that a model comes from, in order, each begun with the weights of the one before."""
    return [*(chain(run["started_from"]) if run.get("started_from") else []), run]


def current_command(command: str) -> str:
    """A recorded command as it is typed today: scripts of the recipe were run by path, and are modules now."""
    for module in ("train", "evaluate"):
        command = command.replace(f"python recipes/synthetic/{module}.py", f"python -m recipes.synthetic.{module}")
    return command


def in_vain(runs: list[dict[str, Any]]) -> str:
    """A remark on the time that `minutes` leaves out: first runs of mqmtar.sh that were not continued."""
    vain = [_tries(run) - 1 for run in runs]
    minutes = sum(number * chain(run)[0]["settings"]["minutes"] for number, run in zip(vain, runs, strict=True))
    count = f"{sum(vain)} first run{'s' if sum(vain) > 1 else ''}"
    return f" (without {count}, {minutes:.1f} minutes, whose validation was worse)" if sum(vain) else ""


def _tries(run: dict[str, Any]) -> int:
    """The number of first runs to choose from. Runs without `tries` had those up to the one taken, 100 seeds apart."""
    first, *further = chain(run)
    if not further:
        return 1
    return int(further[0]["settings"].get("tries") or 1 + max(0, first["seed"] - run["seed"]) // 100)


def _stages(run: dict[str, Any]) -> list[dict[str, Any]]:
    """For each run of the chain, its minutes and the settings that differ from their defaults.

    Settings that the code no longer has are recorded only where they differed from their defaults.
    """
    stages = []
    for one in chain(run):
        stage = {"minutes": one["settings"]["minutes"]}
        for settings_class, values in ((RunSettings, one["settings"]), (TASKS[run["task"]], one["task_settings"])):
            defaults = {item.name: item.default for item in fields(settings_class)}
            for name, value in {**defaults, **values}.items():
                if name not in _UNNAMED and (name not in defaults or value != defaults[name]):
                    stage[name.replace("_", " ")] = value
        stages.append(stage)
    return stages


def _changed(run: dict[str, Any]) -> str:
    """The settings that differ from their defaults, in words, the first run of a chain in brackets."""
    text = ""
    for stage in _stages(run):
        parts = [f"{name} {value}" for name, value in stage.items() if name != "minutes"]  # the tables have minutes
        text = ", ".join(([f"[{text}], then"] if text else []) + parts)
    return text


def differing(group: Group, base: Group) -> str:
    """What differs in a group's settings from another's, run by run; all settings if one has more runs."""
    mine, its = (_stages(g.runs[0]) for g in (group, base))
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
    """Whether two groups had the same runs. Learning rates may differ, since each method has its own."""
    mine, its = (
        [{name: value for name, value in stage.items() if name != "lr"} for stage in _stages(g.runs[0])]
        for g in (group, other)
    )
    return mine == its


def grouped(results: list[dict[str, Any]]) -> list[Group]:
    """Groups the results by setting. Tasks are in their order, methods by name."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        run = result["run"]
        budget = " ".join(f"{one['settings']['steps']} {one['settings']['minutes']}" for one in chain(run))
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
    """The group with the most seeds; among those the one that is right at the longest length.

    Groups without a caveat come first. Seeds come next, because the best of many settings with one seed each is mostly
    luck. Of two groups with as many right answers at the longest length, the next shorter length decides. Lengths with
    fewer than half of the answers right count only if no group has more anywhere.
    """

    def rank(group: Group) -> tuple[bool, int, list[tuple[int, float]], list[tuple[int, float]]]:
        pooled = {multiple: group.pooled(multiple) for multiple in group.multiples()}
        all_found = sorted(((multiple, found[0]) for multiple, found in pooled.items() if found), reverse=True)
        held = [(multiple, right) for multiple, right in all_found if right >= 50]
        return not group.caveat, len(group.results), held, all_found

    return max(groups, key=rank)


def ours(groups: list[Group]) -> Group | None:
    """ASEntmax's best group, with which those of other methods are compared; None if ASEntmax has none."""
    return best(found) if (found := [group for group in groups if group.method == "asentmax"]) else None


def compared(groups: list[Group]) -> list[Group]:
    """The best group of each method, chosen among those trained like ASEntmax's best group where there are some."""
    methods: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for group in groups:
        methods[group.method, group.positions].append(group)
    main = ours(groups)
    return [best([g for g in its if main and trained_alike(g, main)] or its) for its in methods.values()]


def caveats(groups: list[Group], findings: str) -> list[str]:
    """The remarks on any of the groups, a sentence each; `findings` is the path of findings.md, for a link."""
    texts = (_CAVEATS[key].format(findings=findings) for key in dict.fromkeys(group.caveat for group in groups) if key)
    return [f"{text[0].upper()}{text[1:]}." for text in texts]


def tables(groups: list[Group]) -> list[tuple[tuple[str, str], list[Group]]]:
    """The groups of each (task, training distribution)."""
    members: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for group in groups:
        members[(group.task, group.track)].append(group)
    return list(members.items())


def fresh_seed_sentence(fresh: list[dict[str, Any]]) -> str:
    """What a seed that no run had used before reached on MQMTAR, in one sentence; empty without such a result."""
    sentences = []
    for result in fresh:
        at = {entry["multiple"]: 100 * entry["exact_match"] for entry in result["lengths"]}
        parts = [f"{at[multiple]:.1f}% at {multiple}x" for multiple in (64, 256, 1024)]
        sentences.append(
            f"A seed that no run had used before (seed {result['run']['seed']}), trained with the same flags and as "
            f"many samples, reached only {parts[0]}, {parts[1]} and {parts[2]}, so three seeds are not enough to call "
            "the result reliable."
        )
    return " ".join(sentences)
