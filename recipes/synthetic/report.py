"""Writes the tables and figures of the results files.

    python -m recipes.synthetic.report

writes report.md, and a figure for each table whose methods differ, beside the results. Each training distribution has a
table of its own. A row pools the seeds of one setting; the row of each seed follows. A method's best setting is in the
main table (`groups.compared`); its other settings are in a second table below.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from recipes.common import markdown_table
from recipes.synthetic.evaluate import RESULTS
from recipes.synthetic.figures import PUBLISHED, differ, figure, lines
from recipes.synthetic.groups import (
    METHOD_NAMES,
    TASK_NAMES,
    TRACKS,
    Group,
    caveats,
    chain,
    compared,
    differing,
    fresh_seed_sentence,
    grouped,
    in_vain,
    ours,
    read_results,
    tables,
    trained_alike,
)
from recipes.synthetic.measuring import wilson_interval

__all__ = ["main", "markdown", "times_million"]

# What each table shows, and what it does not.
_NOTES = {
    "mqmtar-paper": "Shows how exact retrieval holds up to 1,024 times the training length when every attention has "
    "the same training on the paper's data. It does not show how reliable that training is: the baselines have one "
    "seed each. {fresh} Adaptive temperature is softmax's model with another scaling in the test, on fewer samples.",
    "mqmtar-own": "Shows what near misses among the training keys add. The training data are not the paper's, so the "
    "table is no comparison with published rows. The baselines have one seed each, and entmax had less training.",
    "copy-paper": "Shows how far a copy of the whole input stays exact. It does not favor sparse attention: softmax "
    "copies best after the same training. The baselines have one seed each.",
    "reverse-paper": "Shows how far the reversed input stays exact. It does not show how much seeds differ: there is "
    "one for each method.",
    "sort-paper": "Shows how far sorting stays exact without positions. It is no comparison of positions with the "
    "published rows, which have NAPE, and it does not show how much seeds differ: there is one for each method.",
    "two_back-paper": "Shows that every attention learns the task at all lengths. It does not tell them apart.",
    "local_count-paper": "Shows that both attentions learn the task at all lengths if most heads are left out in "
    "training. It does not tell them apart.",
    "flip_flop-paper": "Shows that every attention recalls the last written bit at all lengths, without any of the "
    "training changes. It does not rank them: there is one seed for each method, and they differ by a few samples.",
    "max_retrieval-paper": "Shows that a length scaling, sparse or not, helps to find the largest of 4,096 items. It "
    "does not rank the methods that have one: there are at most 200 samples beyond 64x, and one seed for each method.",
}


def markdown(groups: list[Group], fresh: list[dict[str, Any]]) -> str:
    """The report: for each task and training distribution, what its table shows, the table, and the settings.

    Args:
        groups: of all results.
        fresh: results of seeds that no group pools.
    """
    parts = []
    for (task, track), members in tables(groups):
        main = sorted(compared(members), key=lambda group: list(METHOD_NAMES).index(group.method))
        others = [group for group in members if group not in main]
        extra = _fresh_of(fresh, task, track)
        parts.append(f"## {TASK_NAMES[task]}, trained on {TRACKS[track]}\n")
        if note := _NOTES.get(f"{task}-{track}"):
            parts.append(note.format(fresh=fresh_seed_sentence(extra)) + "\n")
        parts.append(_accuracy_table(task, main, extra))
        if task == "mqmtar":
            parts.append("The query-error law: e = wrong queries / queries / pairs, times a million, over all seeds.\n")
            parts.append(_law_table(main, extra))
        parts.append(_training(main))
        if others:
            parts.append("Other settings, and how their training differs from that of the first row:\n")
            parts.append(_other_settings(others, main[0]))
        parts.extend(f"† {text}\n" for text in caveats(members, "../findings.md"))
    sources = "\n".join(f"- {name}: {text}" for name, text in PUBLISHED["sources"].items())
    low_1000, low_200 = (100 * wilson_interval(n, n)[0] for n in (1000, 200))
    head = (
        "Exact match of whole answers in percent, with 95% intervals. Lengths are multiples of the training length. "
        f"100 without an interval means that no answer was wrong: the interval then begins at {low_1000:.1f} with "
        f"1,000 samples, the number of each seed up to 64x, and at {low_200:.1f} with 200, the number beyond.\n"
    )
    return f"# Synthetic tasks\n\n{head}\n" + "\n".join(parts) + f"\nSources of the published rows:\n\n{sources}\n"


def _fresh_of(fresh: list[dict[str, Any]], task: str, track: str) -> list[dict[str, Any]]:
    return [one for one in fresh if (one["run"]["task"], one["run"]["track"]) == (task, track)]


def _accuracy_table(task: str, main: list[Group], fresh: list[dict[str, Any]]) -> str:
    """Exact match of each method, pooled over seeds with its interval; then of each seed, and as published."""
    track = main[0].track
    published = PUBLISHED["exact_match"].get(task, {}) if track == "paper" else {}
    theirs = {int(key) for rows in published.values() for row in rows.values() for key in row}
    multiples = sorted(theirs.union(*(group.multiples() for group in main)))
    rows = []
    for group in main:
        numbers = [str(len(group.runs)), f"{group.millions:.1f}", f"{group.minutes:.1f}"]
        rows.append([f"**{_name(group, main)}**", *numbers, *(_with_interval(group.pooled(m)) for m in multiples)])
        if len(group.runs) > 1:
            rows += [_one_seed(_seed(result["run"]), result, multiples) for result in group.results]
        if group is main[0]:
            rows += [_one_seed(f"fresh {_seed(result['run'])}, not pooled", result, multiples) for result in fresh]
    for method, sources in published.items():
        for source, values in sources.items():
            cells = [f"{METHOD_NAMES[method]} + NAPE, {source}", "", "", ""]
            rows.append([*cells, *(str(values.get(str(multiple), "")) for multiple in multiples)])
    header = ["exact match, %", "seeds", "samples, M", "minutes", *(f"{multiple}x" for multiple in multiples)]
    return markdown_table(header, rows) + "\n"


def _one_seed(name: str, result: dict[str, Any], multiples: list[int]) -> list[str]:
    at = {entry["multiple"]: f"{100 * entry['exact_match']:.1f}" for entry in result["lengths"]}
    return [name, "", "", "", *(at.get(multiple, "") for multiple in multiples)]


def _name(group: Group, main: list[Group]) -> str:
    """A row's name. A double dagger marks baselines that were trained otherwise than ASEntmax's row."""
    first = ours(main)
    otherwise = first is not None and group is not first and not trained_alike(group, first)
    return group.name + "†" * bool(group.caveat) + "‡" * otherwise


def _seed(run: dict[str, Any]) -> str:
    """A run's seed, and that of the first run of its chain where it differs (mqmtar.sh)."""
    own, first = run["seed"], chain(run)[0]["seed"]
    return f"seed {own}" if own == first else f"seed {own} (first run: seed {first})"


def _with_interval(pooled: tuple[float, float, float] | None) -> str:
    if pooled is None or pooled[0] == 100:
        return "" if pooled is None else "100"
    return f"{pooled[0]:.1f} [{pooled[1]:.1f}, {pooled[2]:.1f}]"


def times_million(e: float, low: float, high: float) -> str:
    """A cell with e of the query-error law and its interval, times a million."""
    return f"{1e6 * e:.2g} [{1e6 * low if e > 0 else 0:.2g}, {1e6 * high:.2g}]"


def _law_table(main: list[Group], fresh: list[dict[str, Any]]) -> str:
    multiples = [m for m in sorted(set().union(*(group.multiples() for group in main))) if m >= 16]
    named = [(_name(group, main), list(group.results)) for group in main]
    named[1:1] = [(f"{main[0].name}, fresh seed {one['run']['seed']}", [one]) for one in fresh]
    rows = []
    for name, results in named:
        cells = []
        for multiple in multiples:
            entries = [entry for one in results for entry in one["lengths"] if entry["multiple"] == multiple]
            if not entries:
                cells.append("")
                continue
            wrong, queries = (sum(entry[key] for entry in entries) for key in ("queries_wrong", "queries"))
            low, high = wilson_interval(wrong, queries)
            cells.append(times_million(*(share / entries[0]["pairs"] for share in (wrong / queries, low, high))))
        rows.append([name, *cells])
    return markdown_table(["e x 1e6", *(f"{multiple}x" for multiple in multiples)], rows) + "\n"


def _training(main: list[Group]) -> str:
    """How the groups of a main table were trained: the first in full, the others by what differs."""
    first = main[0]
    devices = dict.fromkeys(run["header"]["device"]["name"] for group in main for run in group.runs)
    texts = [f"Training, on one {' or '.join(devices)}, with settings that are not the defaults:\n"]
    texts.append(f"- {first.name}: {first.changed or 'none'}{in_vain(first.runs)}")
    alike = [group.name for group in main[1:] if not differing(group, first)]
    if alike:
        texts.append(f"- {', '.join(alike)}: the same")
    for group in main[1:]:
        if text := differing(group, first):
            mark = "‡" * (not trained_alike(group, first))
            begin = "the same, except " if len(chain(group.runs[0])) == len(chain(first.runs[0])) else ""
            texts.append(f"- {group.name}{mark}: {begin}{text}{in_vain(group.runs)}")
    return "\n".join(texts) + "\n"


def _other_settings(others: list[Group], first: Group) -> str:
    """A row for each setting that is not in the main table, at the longest three lengths.

    A setting with fewer or more runs than the first row's is given in full once, and the base of later ones.
    """
    multiples = sorted(set().union(*(group.multiples() for group in others)))[-3:]
    bases = {len(chain(first.runs[0])): ("", first)}
    rows = []
    for number, group in enumerate(sorted(others, key=lambda group: len(group.changed)), start=1):
        name, base = bases.setdefault(len(chain(group.runs[0])), (f"as row {number}: ", group))
        text = group.changed if base is group else name + (differing(group, base) or "minutes of training")
        cells = [str(number), f"{group.name}{'†' * bool(group.caveat)}", text, f"{group.minutes:.1f}"]
        cells.append(", ".join(str(run["seed"]) for run in group.runs))
        for multiple in multiples:
            cells.append(", ".join(f"{100 * entry['exact_match']:.1f}" for entry in group.entries(multiple)))
        rows.append(cells)
    header = ["row", "", "differs in", "minutes", "seeds", *(f"{multiple}x, each seed" for multiple in multiples)]
    return markdown_table(header, rows) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    folder = parser.parse_args(arguments).results
    results, fresh = read_results(folder)
    if not results:
        parser.error(f"there are no results files in {folder}; recipes.synthetic.evaluate writes them")
    groups = grouped(results)
    (folder / "report.md").write_text(markdown(groups, fresh), encoding="utf-8")
    for (task, track), members in tables(groups):
        drawn = lines(members, _fresh_of(fresh, task, track))
        if differ(drawn):
            figure(members, drawn, folder / f"{task}-{track}.png")
    print(f"wrote {folder / 'report.md'} and its figures")


if __name__ == "__main__":
    main(sys.argv[1:])
