"""Which keys win in the lookups of models trained on MQMTAR: the errors of each head by how alike the wrong key is.

    python recipes/synthetic/margins.py runs/synthetic/mqmtar-asentmax-nape/seed0

A head without ALiBi that finds a query's pair among the 8 of a sample is confronted with the pairs of all samples: as
many keys as a context a thousand times as long has, at the cost of short ones. Its errors are counted by how the wrong
key is like the query's: the same letters in the other order, the same first or second letter, a letter in the other
place, or none. Runs on a CPU in a minute a model. It looks at single heads; where they agree, so does the model.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.common import markdown_table, results_header, write_json
from recipes.recording import recorded_attention
from recipes.synthetic.evaluate import mqmtar_of
from recipes.synthetic.measuring import fixed_batches
from recipes.synthetic.models import load_model, outputs_at
from recipes.synthetic.tasks import Mqmtar

__all__ = ["likenesses", "lookups", "main"]

SEED = 7  # of the samples, which are neither the tests' nor the validations'
TEST_PAIRS = 8738  # at 1024x
LOOKS_UP = 0.5  # a head whose largest score lies in more than this share of the rows at the right pair looks it up


def likenesses(queries: torch.Tensor, keys: torch.Tensor) -> dict[str, torch.Tensor]:
    """(queries, keys) bool by name: which words of two letters are alike in what way; equal ones are in none."""
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


@torch.inference_mode()
def lookups(model: PreTrainedModel, task: Mqmtar, samples: int) -> Iterator[dict[str, Any]]:
    """A row for each place, layer and head that looks up: how often a key of each kind beats the right one.

    Args:
        model: in eval mode.
        task: MQMTAR, as it was trained.
        samples: of 64 tokens.

    Raises:
        ValueError: the model's attention is not the plugin's.
    """
    (batch,) = fixed_batches(task, task.max_length, samples, samples, SEED)
    inputs = batch.inputs
    starts = task.key_starts(inputs)
    keys = torch.stack([inputs.gather(1, starts), inputs.gather(1, starts + 1)], dim=-1)
    asked, answered = task.query_markers(inputs)
    queries = torch.stack([inputs.gather(1, asked + 1), inputs.gather(1, asked + 2)], dim=-1)
    all_right = (keys[:, None] == queries[:, :, None]).all(dim=-1).float().argmax(dim=-1)
    all_kinds = {
        name: alike.unflatten(0, asked.shape)
        for name, alike in likenesses(queries.flatten(0, 1), keys.flatten(0, 1)).items()
    }
    places = {
        "query's second letter": asked + 2,
        "next query's marker": asked[:, 1:],  # of each query but the last
        "answer's marker": answered,
        "value's first letter": answered + 1,
    }
    with recorded_attention() as calls:
        outputs_at(model, batch)
    if not calls:
        raise ValueError("the model's attention is not the plugin's (stick-breaking): its scores are not seen")
    for layer, call in enumerate(calls):
        query, key = call.query * call.options["scale"], call.key
        free = (call.slopes == 0).nonzero()[:, 0].tolist()  # heads without ALiBi
        for (place, rows), head in itertools.product(places.items(), free):
            right = all_right[:, : rows.shape[1]]
            q = query[:, head].gather(1, rows[..., None].expand(-1, -1, query.shape[-1]))
            scores = q @ key[:, head].transpose(1, 2)
            unseen = torch.arange(inputs.shape[1]) > rows[..., None]
            offsets = scores.masked_fill(unseen, -torch.inf).argmax(dim=-1) - starts.gather(1, right)
            values, counts = offsets.unique(return_counts=True)
            share = float(counts.max()) / offsets.numel()
            if share <= LOOKS_UP:
                continue
            offset = int(values[counts.argmax()])
            found = key[:, head].gather(1, (starts + offset)[..., None].expand(-1, -1, key.shape[-1])).flatten(0, 1)
            own = (right + torch.arange(samples)[:, None] * keys.shape[1]).flatten()
            kinds = {name: alike[:, : rows.shape[1]].flatten(0, 1) for name, alike in all_kinds.items()}
            against = q.flatten(0, 1) @ found.T
            mine = against.gather(1, own[:, None])
            beaten = against > mine
            row: dict[str, Any] = {"place": place, "layer": layer, "head": head, "offset": offset, "share": share}
            row |= {"score": float(mine.mean()), "margin": float((mine - against)[kinds["far"]].median())}
            for name, alike in kinds.items():
                row[name] = float(beaten[alike].float().mean())
                row[f"{name}_keys"] = float(alike.float().sum(dim=1).mean()) * TEST_PAIRS / alike.shape[1]
            yield row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: each place's lookup heads of a layer in one line, medians; errors a query at 1024x by kind of key."""
    names = ("swapped", "first", "second", "crossed", "far")
    lines = []
    for place, layer in dict.fromkeys((row["place"], row["layer"]) for row in rows):
        members = [row for row in rows if (row["place"], row["layer"]) == (place, layer)]
        cells = [place, str(layer + 1), str(len(members))]
        cells.append(f"{torch.tensor([row['score'] for row in members]).median():.0f}")
        for name in names:
            errors = torch.tensor([row[name] * row[f"{name}_keys"] for row in members]).median()
            cells.append(f"{errors:.4f}")
        lines.append(cells)
    return markdown_table(["place", "layer", "heads", "score", *(f"{name}, errors a query" for name in names)], lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished seeds, with run.json and model/")
    parser.add_argument("--samples", type=int, default=600, help="of 64 tokens, 8 pairs each (default: 600)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parsed = parser.parse_args(arguments)
    results = []
    for folder in tqdm(parsed.runs, unit="model"):
        task = mqmtar_of(folder, parser, "lookups are MQMTAR's")
        rows = list(lookups(load_model(folder / "model"), task, parsed.samples))
        results.append({"run": f"{folder.parent.name} {folder.name}", "heads": rows})
        tqdm.write(f"\n{results[-1]['run']}\n{table(rows)}")
    header = results_header(torch.device("cpu"), [SEED])
    write_json(parsed.output, {**header, "samples": parsed.samples, "models": results})


if __name__ == "__main__":
    main(sys.argv[1:])
