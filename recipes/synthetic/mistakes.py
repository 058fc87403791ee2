"""Whose value a model trained on MQMTAR gives where it is wrong: each wrong answer by how alike the keys are.

    python recipes/synthetic/mistakes.py runs/synthetic/mqmtar-asentmax-nape/seed0 --multiple 64 --samples 1000

A wrong answer is given to the key in the context whose value has its wrong letters, the most alike one if there are
several: the same letters in the other order, the same first or second letter, a letter in the other place, none in
common (where only one letter is wrong, one key in 256 has it by chance); or to none. Second letters that come from a
value whose first letter is the right one are counted apart: such a model still looks the second letter up by the first.
Needs a GPU beyond 16x.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.common import markdown_table, results_header, write_json
from recipes.synthetic.evaluate import mqmtar_of
from recipes.synthetic.margins import SEED, likenesses
from recipes.synthetic.measuring import predictions
from recipes.synthetic.models import load_model
from recipes.synthetic.tasks import Batch, Mqmtar

__all__ = ["KINDS", "WRONG", "counted", "main", "mistakes"]

KINDS = ("swapped", "first", "second", "crossed", "far", "none")
WRONG = ("both letters", "first letter", "second letter", "second letter, after the right first")


def mistakes(task: Mqmtar, predicted: torch.Tensor, batch: Batch) -> Counter[tuple[str, str]]:
    """How many answers are wrong, by the letters that are and by how alike the key is whose value was given.

    Args:
        predicted: (batch, targets) tokens.
        batch: of the task.
    """
    inputs, counts = batch.inputs, Counter[tuple[str, str]]()
    answers, labels = (tokens[:, :-1].unflatten(1, (-1, 3))[..., 1:] for tokens in (predicted, batch.labels))
    starts, (markers, _) = task.key_starts(inputs), task.query_markers(inputs)
    for sample, number in (answers != labels).any(dim=-1).nonzero().tolist():
        keys, values = (inputs[sample][starts[sample, :, None] + starts.new_tensor(two)] for two in ([0, 1], [3, 4]))
        marker = markers[sample, number]
        asked = inputs[sample][marker + 1 : marker + 3]
        wrong = answers[sample, number] != labels[sample, number]
        given = ((values == answers[sample, number]) | ~wrong).all(dim=-1)
        alike = {name: found[0] & given for name, found in likenesses(asked[None], keys).items()}
        kind = next((name for name in KINDS[:-1] if bool(alike[name].any())), "none")
        which = 0 if bool(wrong.all()) else 1 if bool(wrong[0]) else 2
        if which == 2 and kind != "none" and bool((values[alike[kind], 0] == labels[sample, number, 0]).any()):
            which = 3
        counts[WRONG[which], kind] += 1
    return counts


@torch.inference_mode()
def counted(model: PreTrainedModel, task: Mqmtar, length: int, samples: int) -> dict[str, Any]:
    """The mistakes in samples of a length, as a results file has them."""
    counts: Counter[tuple[str, str]] = Counter()
    with tqdm(total=samples, unit="sample", leave=False) as bar:
        for batch, predicted in predictions(model, task, length, samples, SEED):
            counts += mistakes(task, predicted, batch)
            bar.update(len(batch))
    rows = {wrong: {kind: counts[wrong, kind] for kind in KINDS} for wrong in WRONG}
    return {"queries": samples * task.QUERIES, "pairs": task.pairs(length), "wrong": counts.total(), "mistakes": rows}


def table(rows: dict[str, dict[str, int]]) -> str:
    """Markdown: wrong letters down, kinds of keys across."""
    lines = [[wrong, *(str(row[kind]) for kind in KINDS)] for wrong, row in rows.items()]
    return markdown_table(["wrong", *KINDS], lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished seeds, with run.json and model/")
    parser.add_argument("--multiple", type=int, nargs="+", default=[64], help="lengths, in the longest trained on")
    parser.add_argument("--samples", type=int, default=1000, help="of each length (default: 1000)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parsed = parser.parse_args(arguments)
    results = []
    for folder in parsed.runs:
        task = mqmtar_of(folder, parser, "these are mistakes in MQMTAR")
        model = load_model(folder / "model").to(parsed.device)
        for multiple in parsed.multiple:
            row = counted(model, task, multiple * task.max_length, parsed.samples)
            results.append({"run": f"{folder.parent.name} {folder.name}", "multiple": multiple, **row})
            tqdm.write(f"\n{results[-1]['run']} at {multiple}x: {row['wrong']} of {row['queries']:,} queries wrong")
            tqdm.write(table(row["mistakes"]))
    write_json(parsed.output, {**results_header(torch.device(parsed.device), [SEED]), "results": results})


if __name__ == "__main__":
    main(sys.argv[1:])
