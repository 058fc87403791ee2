"""Measures how far back a model of MQMTAR needs its heads with ALiBi: its loss when they see only the last tokens.

    python -m recipes.synthetic.analysis.reach runs/synthetic/mqmtar-asentmax-nape-paper/seed0

Among the 64 tokens of a training sample, a head with ALiBi (slopes of 1 to 1/8) can still find a query's key. Among
thousands it cannot, and it votes for keys nearby instead. So a model whose loss at 64 tokens grows when these heads see
no further than a pair depends on them, and will err in long contexts, however small its loss is. The measurement takes
a minute or two a model on a CPU, on samples of the training length.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from recipes.common import default_device, markdown_table, results_header, write_json
from recipes.synthetic.analysis import SAMPLES_SEED, mqmtar_of
from recipes.synthetic.measuring import fixed_batches
from recipes.synthetic.models import alibi_heads, load_model, outputs_at
from recipes.synthetic.regularise import AlibiWindow
from recipes.synthetic.tasks import Mqmtar

__all__ = ["main", "reach"]

WINDOWS = (0, 48, 32, 24, 16, 12)  # 0 for all tokens; a pair with the spaces around it has 6 to 8 tokens
_BATCH = 64


@torch.inference_mode()
def reach(model: PreTrainedModel, task: Mqmtar, alibi_heads: int, samples: int, window: int) -> dict[str, Any]:
    """The number of wrong answers and the mean loss of an answer letter, in samples of the longest training length.

    Args:
        model: in eval mode.
        task: what it was trained on.
        alibi_heads: how many heads, from the first, have ALiBi.
        samples: number of samples.
        window: number of the last tokens that heads with ALiBi see; 0 for all.
    """
    view = AlibiWindow(window, task.heads, alibi_heads, model.device)
    view.narrow = True
    wrong, loss = 0, 0.0
    for batch in fixed_batches(task, task.max_length, samples, _BATCH, SAMPLES_SEED):
        batch = batch.to(model.device)
        logits = outputs_at(model, batch, view.mask(batch.inputs.shape[1])).float()
        right = task.queries_right(logits.argmax(dim=-1) == batch.labels)
        wrong += int((~right).sum())
        letters = nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
        loss += float(letters[:, :-1].unflatten(1, (-1, 3))[..., 1:].mean()) * len(batch)
    return {"window": window, "queries": samples * task.QUERIES, "queries_wrong": wrong, "loss": loss / samples}


def table(models: dict[str, Any]) -> str:
    """Markdown: the mean loss of an answer letter and the number of wrong queries, for each model and window."""
    names = ["all tokens" if window == 0 else f"the last {window}" for window in WINDOWS]
    rows = [
        [name, *(f"{row['loss']:.1e}, {row['queries_wrong']}" for row in model["windows"])]
        for name, model in models.items()
    ]
    return markdown_table(["heads with ALiBi see", *names], rows)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished seeds, with run.json and model/")
    parser.add_argument("--samples", type=int, default=512, help="of 64 tokens, 4 queries each (default: 512)")
    parser.add_argument("--device", type=torch.device, default=default_device(), help="default: a GPU if there is one")
    parser.add_argument("--output", type=Path, default=Path("runs/reach.json"), help="the results file to add to")
    parsed = parser.parse_args(arguments)
    asked: list[tuple[Path, Mqmtar, int]] = []
    for folder in parsed.runs:  # refuses models before anything is measured
        task = mqmtar_of(folder, parser)
        positions = json.loads((folder / "run.json").read_text())["settings"]["positions"]
        with_alibi = alibi_heads(positions, task.heads)
        if with_alibi == 0:
            parser.error(f"{folder} has positions {positions}, without heads that have ALiBi")
        asked.append((folder, task, with_alibi))
    models: dict[str, Any] = json.loads(parsed.output.read_text())["models"] if parsed.output.exists() else {}
    header = {**results_header(parsed.device, [SAMPLES_SEED]), "samples": parsed.samples}
    for folder, task, with_alibi in asked:
        model = load_model(folder / "model").to(parsed.device)
        name = f"{folder.parent.name} {folder.name}"
        windows = [reach(model, task, with_alibi, parsed.samples, window) for window in tqdm(WINDOWS, desc=name)]
        models[name] = {"header": header, "windows": windows}
        write_json(parsed.output, {"models": models})
    print(table(models))


if __name__ == "__main__":
    main(sys.argv[1:])
