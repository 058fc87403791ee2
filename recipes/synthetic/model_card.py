"""A model card for the best model of each table, ASEntmax's where there is one, from the results files.

    python recipes/synthetic/model_card.py            # writes model_cards/TASK-TRACK.md

Tables whose best model has not learnt its task at the training length get none, nor does Max retrieval, whose model is
no language model.

The card is what `push_to_hub` wants beside the weights: metadata with the results, what the model is for, how it was
trained and tested, and what it can't do. The weights themselves are made by the command that the card names.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.synthetic.evaluate import RESULTS
from recipes.synthetic.report import TRACKS, Group, best, caveats, grouped, in_vain, tables
from recipes.synthetic.tasks import TASKS, MaxRetrieval

__all__ = ["card", "main"]

TEMPLATE = Path(__file__).with_name("model_card_template.md")
CARDS = Path(__file__).resolve().parents[2] / "model_cards"
LEARNT = 95  # % exact match at the training length, below which a model has not learnt its task


def _commands(run: dict[str, Any]) -> list[str]:
    """What trained the model, the run whose weights it began with first."""
    earlier = run.get("started_from")
    command = run["header"]["command"] if "header" in run else run["command"]
    return [*(_commands(earlier) if earlier else []), command]


def card(group: Group) -> str:
    """The card of a group's seeds: YAML metadata and markdown."""
    runs = [result["run"] for result in group.results]
    run = runs[0]
    trained = run["task_settings"]["max_length"]
    name = f"{group.task}-{group.method}-{group.positions}"
    rows, results = [], []
    for multiple in sorted(group.multiples()):
        pooled = group.pooled(multiple)
        assert pooled is not None
        accuracy, low, high = pooled
        samples = sum(entry["samples"] for entry in group.entries(multiple))
        rows.append(f"| {trained * multiple:,} ({multiple}x) | {accuracy:.1f} | {low:.1f} to {high:.1f} | {samples} |")
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=group.task,
                dataset_config=f"{multiple}x",
                dataset_name=f"{group.task} at {multiple}x the training length",
                metric_type="exact_match",
                metric_value=round(accuracy / 100, 4),
            )
        )
    data = ModelCardData(
        model_name=name,
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["asentmax", "entmax", "sparse-attention", "long-context", "length-generalization"],
        eval_results=results,
    )
    many = len(runs) > 1
    seeds = f"seed{'s' if many else ''} {', '.join(str(one['seed']) for one in runs)}"
    made = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        task=group.task,
        sizes=run["task_settings"],
        settings=run["settings"],
        parameters=f"{run['parameters'] / 1e6:.1f}",
        seeds=seeds,
        rows="\n".join(rows),
        track=TRACKS[group.track],
        on_average=" on average" if many else "",
        without=in_vain(runs),
        samples=f"{group.millions:.1f}",
        minutes=f"{group.minutes:.1f}",
        device=run["header"]["device"]["name"],
        versions=run["header"]["versions"],
        commits=", ".join(dict.fromkeys(one["header"]["commit"] for one in runs)),
        seed=run["seed"],
        commands="\n".join(_commands(run)),
        limits=f"{_each_seed(group) if many else 'One seed.'} {_LIMITS[group.track]}"
        + "".join(f" {text}" for text in caveats([group], "../recipes/synthetic/findings.md")),
    )
    return str(made).rstrip() + "\n"


def _each_seed(group: Group) -> str:
    """What the seeds have at the longest length that all were tested at."""
    last = max(m for m in group.multiples() if len(group.entries(m)) == len(group.results))
    seeds = ", ".join(str(result["run"]["seed"]) for result in group.results)
    shares = ", ".join(f"{100 * entry['exact_match']:.1f}" for entry in group.entries(last))
    return f"Numbers are over all seeds that were tested at a length; seeds {seeds} alone have {shares}% at {last}x."


_LIMITS = {
    "own": "The training data are not the paper's: more of their keys are easily confused, which those of tests are by "
    "chance only, so this is no comparison with work on the paper's data.",
    "paper": "The training data are the paper's; what training does to inputs and model beside, the commands say.",
}


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    parser.add_argument("--out", type=Path, default=CARDS, help="folder for the cards")
    parsed = parser.parse_args(arguments)
    results = [json.loads(file.read_text()) for file in sorted(parsed.results.glob("*.json"))]
    if not results:
        parser.error(f"no results files in {parsed.results}; evaluate.py writes them")
    parsed.out.mkdir(parents=True, exist_ok=True)
    for (task, track), members in tables(grouped(results)):
        group = best([member for member in members if member.method == "asentmax"] or members)
        if issubclass(TASKS[task], MaxRetrieval):
            print(f"no card for {task}-{track}: AutoModel does not load its model, which is this recipe's own")
            continue
        learnt = group.pooled(1)
        if learnt is not None and learnt[0] < LEARNT:
            print(f"no card for {task}-{track}: {learnt[0]:.1f}% at the training length, {LEARNT}% are asked for")
            continue
        file = parsed.out / f"{task}-{track}.md"
        file.write_text(card(group))
        print(f"wrote {file}")


if __name__ == "__main__":
    main(sys.argv[1:])
