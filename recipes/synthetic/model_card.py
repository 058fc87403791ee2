"""Writes a model card for the best model of each table, ASEntmax's where there is one, from the results files.

    python -m recipes.synthetic.model_card            # writes model_cards/TASK-TRACK.md

A table whose best model has not learned its task at the training length gets no card. Max retrieval gets none either,
because its model is not a language model.

The card is what `push_to_hub` uploads beside the weights: metadata with the results, what the model is for, how it was
trained and tested, and what it cannot do. The commands that the card names make the weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from recipes.synthetic.evaluate import RESULTS
from recipes.synthetic.groups import (
    TASK_NAMES,
    TRACKS,
    Group,
    best,
    caveats,
    chain,
    current_command,
    fresh_seed_sentence,
    grouped,
    in_vain,
    read_results,
    tables,
)
from recipes.synthetic.tasks import TASKS, MaxRetrieval

__all__ = ["card", "main"]

TEMPLATE = Path(__file__).with_name("model_card_template.md")
CARDS = Path(__file__).resolve().parents[2] / "model_cards"
LEARNED = 95  # % exact match at the training length, below which a model has not learned its task

_LIMITS = {
    "own": "The training data are not the paper's: they have more keys that are easily confused. The test data have "
    "such keys by chance only. So the results are no comparison with work on the paper's data.",
    "paper": "The training data are the paper's. The commands above list what training changes in inputs and model.",
}


def card(group: Group, fresh: list[dict[str, Any]]) -> str:
    """The card of a group's seeds: YAML metadata and Markdown.

    Args:
        group: the results of one setting.
        fresh: results of the same setting with seeds that the group does not pool.
    """
    run = group.runs[0]
    many = len(group.runs) > 1
    made = ModelCard.from_template(
        _metadata(group),
        template_path=str(TEMPLATE),
        name=_name(group),
        method=group.name,
        task=TASK_NAMES[group.task],
        sizes=run["task_settings"],
        parameters=f"{run['parameters'] / 1e6:.1f}",
        seeds=f"seed{'s' if many else ''} {', '.join(str(one['seed']) for one in group.runs)}",
        rows=_rows(group),
        track=TRACKS[group.track],
        on_average=" on average" if many else "",
        without=in_vain(group.runs),
        samples=f"{group.millions:.1f}",
        minutes=f"{group.minutes:.1f}",
        device=run["header"]["device"]["name"],
        versions=run["header"]["versions"],
        commits=", ".join(dict.fromkeys(one["header"]["commit"] for one in group.runs)),
        seed=run["seed"],
        commands="\n".join(_commands(run)),
        limits=" ".join(
            [
                _each_seed(group) if many else "The results are those of one seed.",
                *filter(None, [fresh_seed_sentence(fresh)]),
                _LIMITS[group.track],
                *caveats([group], "../recipes/synthetic/findings.md"),
            ]
        ),
    )
    return str(made).rstrip() + "\n"


def _name(group: Group) -> str:
    return f"{group.task}-{group.method}-{group.positions}"


def _metadata(group: Group) -> ModelCardData:
    results = []
    for multiple in sorted(group.multiples()):
        pooled = group.pooled(multiple)
        assert pooled is not None
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=group.task,
                dataset_config=f"{multiple}x",
                dataset_name=f"{group.task} at {multiple}x the training length",
                metric_type="exact_match",
                metric_value=round(pooled[0] / 100, 4),
            )
        )
    return ModelCardData(
        model_name=_name(group),
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["asentmax", "entmax", "sparse-attention", "long-context", "length-generalization"],
        eval_results=results,
    )


def _rows(group: Group) -> str:
    trained, rows = group.runs[0]["task_settings"]["max_length"], []
    for multiple in sorted(group.multiples()):
        pooled = group.pooled(multiple)
        assert pooled is not None
        samples = sum(entry["samples"] for entry in group.entries(multiple))
        low, high = f"{pooled[1]:.1f}", f"{pooled[2]:.1f}"
        rows.append(f"| {trained * multiple:,} ({multiple}x) | {pooled[0]:.1f} | {low} to {high} | {samples} |")
    return "\n".join(rows)


def _commands(run: dict[str, Any]) -> list[str]:
    """The commands that trained the model, the first run of its chain first."""
    recorded = (one["header"]["command"] if "header" in one else one["command"] for one in chain(run))
    return [current_command(command) for command in recorded]


def _each_seed(group: Group) -> str:
    """The result of each seed at the longest length at which all were tested."""
    last = max(m for m in group.multiples() if len(group.entries(m)) == len(group.results))
    seeds = ", ".join(str(run["seed"]) for run in group.runs)
    shares = ", ".join(f"{100 * entry['exact_match']:.1f}" for entry in group.entries(last))
    return f"The results are those of all seeds together; seeds {seeds} have {shares}% at {last}x."


def _kind(run: dict[str, Any]) -> tuple[str, str, str]:
    return run["task"], run["track"], run["settings"]["method"]


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    parser.add_argument("--out", type=Path, default=CARDS, help="folder for the cards")
    parsed = parser.parse_args(arguments)
    results, fresh = read_results(parsed.results)
    if not results:
        parser.error(f"there are no results files in {parsed.results}; recipes.synthetic.evaluate writes them")
    parsed.out.mkdir(parents=True, exist_ok=True)
    for (task, track), members in tables(grouped(results)):
        group = best([member for member in members if member.method == "asentmax"] or members)
        if issubclass(TASKS[task], MaxRetrieval):
            print(f"no card for {task}-{track}: AutoModel does not load its model, which belongs to this recipe")
            continue
        at_training_length = group.pooled(1)
        if at_training_length is not None and at_training_length[0] < LEARNED:
            print(f"no card for {task}-{track}: {at_training_length[0]:.1f}% at the training length, below {LEARNED}%")
            continue
        file = parsed.out / f"{task}-{track}.md"
        kind = (task, track, group.method)
        same = [one for one in fresh if _kind(one["run"]) == kind]
        file.write_text(card(group, same), encoding="utf-8")
        print(f"wrote {file}")


if __name__ == "__main__":
    main(sys.argv[1:])
