"""The README's section on MQMTAR, from the results files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.common import markdown_table, short_commit
from recipes.synthetic.figures import PUBLISHED
from recipes.synthetic.groups import (
    METHOD_NAMES,
    TRACKS,
    Group,
    caveats,
    compared,
    current_command,
    fresh_seed_sentence,
    grouped,
    in_vain,
    ours,
    tables,
    trained_alike,
)

__all__ = ["readme_section"]

_FOLDER = Path(__file__).parent
_MULTIPLES = (1, 4, 16, 64, 256, 1024)


def readme_section(results: Sequence[dict[str, Any]]) -> str:
    """Exact match on MQMTAR by length, on each training distribution, beside the published rows.

    Args:
        results: the contents of results/mqmtar-*.json. Seeds that no table pools (results/fresh_seed.json) and the
            tests beyond 1024x (beyond/) are read from their files.

    Returns:
        Markdown: a figure, a table, notes, and the commands behind the numbers. Links are relative to the repository's
        root.
    """
    fresh = [json.loads((_FOLDER / "results" / "fresh_seed.json").read_text(encoding="utf-8"))]
    rows: list[list[str]] = []
    notes: list[str] = []
    origins: list[str] = []
    shown: list[Group] = []
    otherwise = False
    for (_, track), members in tables([group for group in grouped(list(results)) if group.positions == "nape"]):
        main = ours(members)
        if main is None:
            raise ValueError(f"there are no results of ASEntmax on MQMTAR, trained on {TRACKS[track]}")
        of_track = sorted(compared(members), key=lambda group: list(METHOD_NAMES).index(group.method))
        for group in of_track:
            differs = group is not main and not trained_alike(group, main)
            otherwise |= differs
            marks = "†" * bool(group.caveat) + "‡" * differs
            count = f"{len(group.runs)} seed{'s' if len(group.runs) > 1 else ''}"
            rows.append([f"{group.name}{marks}", track, count, *(_cell(group, m) for m in _MULTIPLES)])
            if group is main and track == "paper":
                rows.extend(_fresh_row(one) for one in fresh)
        shown += of_track
        notes.append(_note(main, members))
        origins.append(_origin(main))
    for method, sources in PUBLISHED["exact_match"]["mqmtar"].items():
        for source, values in sources.items():
            cells = (str(values.get(str(multiple), "")) for multiple in _MULTIPLES)
            rows.append([f"{METHOD_NAMES[method]} + NAPE, published ({source})", "paper", "", *cells])
    header = ["", "training data", "", *(f"{64 * multiple:,} ({multiple}x)" for multiple in _MULTIPLES)]
    parts = [
        "![Exact match against length](recipes/synthetic/results/mqmtar-paper.png)",
        "Multi-query multi-token associative recall (MQMTAR), trained on at most 64 tokens: exact match in percent. "
        "Training data are the paper's distribution (paper) or one of our own, with near misses among the keys (own).",
        markdown_table(header, rows),
    ]
    parts += [f"† {text}" for text in caveats(shown, "recipes/synthetic/findings.md")]
    if otherwise:
        parts.append(
            "‡ Trained otherwise than ASEntmax's row on these data "
            "([how](recipes/synthetic/results/report.md)), so the rows do not compare the attentions alone."
        )
    limits = [
        f"- {fresh_seed_sentence(fresh)}",
        "- The baselines on the paper's data had the same training as ASEntmax, with one seed each. Adaptive "
        "temperature is softmax's model with another scaling in the test, on fewer samples.",
    ]
    parts.append("\n".join([*notes, *limits, *_beyond(), _LINKS]))
    return "\n\n".join([*parts, *origins])


_LINKS = (
    "- All tables: [report](recipes/synthetic/results/report.md). What was tried: "
    "[findings](recipes/synthetic/findings.md). How to reproduce it: [recipes/synthetic](recipes/synthetic/README.md). "
    "Model cards: [paper](model_cards/mqmtar-paper.md), [own](model_cards/mqmtar-own.md)."
)


def _cell(group: Group, multiple: int) -> str:
    found, tested = group.pooled(multiple), len(group.entries(multiple))
    fewer = f" ({tested} seed{'s' if tested > 1 else ''})" if tested < len(group.results) else ""
    return f"{found[0]:.1f}{fewer}" if found else ""


def _fresh_row(result: dict[str, Any]) -> list[str]:
    at = {entry["multiple"]: f"{100 * entry['exact_match']:.1f}" for entry in result["lengths"]}
    run = result["run"]
    name = f"{METHOD_NAMES[run['settings']['method']]} + NAPE, a fresh seed"
    return [name, run["track"], f"seed {run['seed']}", *(at.get(multiple, "") for multiple in _MULTIPLES)]


def _note(group: Group, members: list[Group]) -> str:
    """ASEntmax's seeds at the longest length, what their training took, and what its other settings reached."""
    last = max(multiple for multiple in _MULTIPLES if group.pooled(multiple))
    each = ", ".join(f"{100 * entry['exact_match']:.1f}" for entry in group.entries(last))
    pooled = group.pooled(last)
    assert pooled is not None
    others = [one for one in members if one.method == group.method and one is not group]
    tried = [100 * entry["exact_match"] for one in others for entry in one.entries(last)]
    range_of_others = (
        f" Earlier settings of this training have {min(tried):.1f} to {max(tried):.1f}% in {len(tried)} results "
        "([all of them](recipes/synthetic/results/report.md))."
        if tried
        else ""
    )
    return (
        f"- ASEntmax on {TRACKS[group.track]}: its seeds have {each}% at {last}x (95% interval of all samples "
        f"{pooled[1]:.1f} to {pooled[2]:.1f}). Training took {group.millions:.1f}M samples and {group.minutes:.1f} "
        f"minutes of one GPU on average{in_vain(group.runs)}.{range_of_others}"
    )


def _beyond() -> list[str]:
    """The tests at more than 1024x, one sentence for each model."""
    texts = []
    for path in sorted((_FOLDER / "beyond").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        run, each = content["run"], []
        for entry in content["lengths"]:
            low, high = (100 * bound for bound in entry["interval"])
            each.append(
                f"{100 * entry['exact_match']:.1f}% at {entry['length']:,} tokens ({entry['samples']} samples, 95% "
                f"interval {low:.0f} to {high:.0f})"
            )
        texts.append(
            f"- Beyond 1024x: seed {run['seed']} of an earlier setting, trained on {TRACKS[run['track']]}, has "
            f"{', '.join(each)}."
        )
    return texts


def _origin(group: Group) -> str:
    """The commands behind ASEntmax's row on one training distribution."""
    headers = [result["evaluation"] for result in group.results]
    commands = dict.fromkeys(re.sub(r"/seed\d+", "", current_command(header["command"])) for header in headers)
    commits = dict.fromkeys(short_commit(header["commit"]) for header in headers)
    device, versions = headers[0]["device"]["name"], headers[0]["versions"]
    seeds = ", ".join(str(seed) for header in headers for seed in header["seeds"])
    return (
        f"`{'; '.join(commands)}`, seeds {seeds}, on {device}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, commit {', '.join(commits)}."
    )
