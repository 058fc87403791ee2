"""Counts whose value a model of MQMTAR gives where it is wrong, by how alike the two keys are.

    python -m recipes.synthetic.analysis.mistakes runs/synthetic/mqmtar-asentmax-nape/seed0 --multiple 64 --samples 1000

A wrong answer is assigned to the key in the context whose value has its wrong letters. Of several such keys the most
alike one counts: the same letters in the other order, the same first or second letter, a letter in the other place, or
none in common. (Where only one letter is wrong, one key in 256 has it by chance.) If there is no such key, it counts as
none. Second letters from a value whose first letter is the right one are counted apart: such a model looks the second
letter up by the first. Lengths beyond 16x need a GPU.
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

from recipes.common import default_device, markdown_table, results_header, write_json
from recipes.synthetic.analysis import SAMPLES_SEED, mqmtar_of
from recipes.synthetic.measuring import predictions
from recipes.synthetic.models import load_model
from recipes.synthetic.tasks import Batch, Mqmtar

__all__ = ["KINDS", "WRONG", "counted", "likenesses", "main", "mistakes"]

KINDS = ("swapped", "first", "second", "crossed", "far", "none")
WRONG = ("both letters", "first letter", "second letter", "second letter, after the right first")


def likenesses(queries: torch.Tensor, keys: torch.Tensor) -> dict[str, torch.Tensor]:
    """By name of the likeness, (queries, keys) bool: which words of two letters are alike. Equal words are in none."""
    first = queries[:, None, 0] == keys[None, :, 0]
    second = queries[:, None, 1] == keys[None, :, 1]
    to_second = queries[:, None, 0] == keys[None, :, 1]
    to_first = queries[:, None, 1] == keys[None, :, 0]
    equal = first & second
    swapped = to_second & to_first & ~equal
    same = (first | second) & ~equal & ~swapped
    crossed = (to_second | to_first) & ~(equal | swapped | same)
    far = ~(equal | swapped | same | crossed)
    return {"swapped": swapped, "first": same & first, "second": same & second, "crossed": crossed, "far": far}


def mistakes(task: Mqmtar, predicted: torch.Tensor, batch: Batch) -> Counter[tuple[str, str]]:
    """The number of wrong answers, by which letters are wrong and by the likeness of the key whose value was given.

    Args:
        task: of the batch.
        predicted: (batch, targets) tokens.
        batch: test samples.
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
    """The mistakes in samples of a length, for a results file."""
    counts: Counter[tuple[str, str]] = Counter()
    with tqdm(total=samples, unit="sample", leave=False) as bar:
        for batch, predicted in predictions(model, task, length, samples, SAMPLES_SEED):
            counts += mistakes(task, predicted, batch)
            bar.update(len(batch))
    rows = {wrong: {kind: counts[wrong, kind] for kind in KINDS} for wrong in WRONG}
    return {"queries": samples * task.QUERIES, "pairs": task.pairs(length), "wrong": counts.total(), "mistakes": rows}


def table(rows: dict[str, dict[str, int]]) -> str:
    """Markdown: wrong letters in rows, kinds of keys in columns."""
    lines = [[wrong, *(str(row[kind]) for kind in KINDS)] for wrong, row in rows.items()]
    return markdown_table(["wrong", *KINDS], lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished seeds, with run.json and model/")
    parser.add_argument(
        "--multiple", type=int, nargs="+", default=[64], help="lengths, in multiples of the training length"
    )
    parser.add_argument("--samples", type=int, default=1000, help="of each length (default: 1000)")
    parser.add_argument("--device", type=torch.device, default=default_device(), help="default: a GPU if there is one")
    parser.add_argument("--output", type=Path, default=Path("runs/mistakes.json"), help="the results file to write")
    parsed = parser.parse_args(arguments)
    results = []
    for folder in parsed.runs:
        task = mqmtar_of(folder, parser)
        model = load_model(folder / "model").to(parsed.device)
        for multiple in parsed.multiple:
            row = counted(model, task, multiple * task.max_length, parsed.samples)
            results.append({"run": f"{folder.parent.name} {folder.name}", "multiple": multiple, **row})
            tqdm.write(f"\n{results[-1]['run']} at {multiple}x: {row['wrong']} of {row['queries']:,} queries wrong")
            tqdm.write(table(row["mistakes"]))
    write_json(parsed.output, {**results_header(parsed.device, [SAMPLES_SEED]), "results": results})


if __name__ == "__main__":
    main(sys.argv[1:])
