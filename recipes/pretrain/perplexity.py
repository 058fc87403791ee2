"""Perplexity on held-out text against length, of one or more checkpoints of pretrain.py.

    python -m recipes.pretrain.perplexity runs/pretrain/softmax runs/pretrain/asentmax --out runs/pretrain
    python -m recipes.pretrain.perplexity CHECKPOINT ... --text FILE ...      on another text

Two numbers for each length: over all tokens of non-overlapping windows of that length; and over the same tokens for
every length, the last ones of the longest windows, which see as much text before them as the length allows.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_asentmax  # noqa: F401  (registers the attention)
from recipes import common
from recipes.pretrain.data import packed, tokenize

TIMES = (1, 2, 4, 8)
HELD_OUT_FILE = "held_out.txt"


@torch.no_grad()
def token_losses(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """The loss in nats of every token but a window's first, given those before it: (windows, length - 1) float32."""
    model.eval()
    losses = []
    batch_tokens = 1024 if model.device.type == "cpu" else 16384  # small parts stay in a CPU's cache
    for part in windows.split(max(1, batch_tokens // windows.shape[1])):
        part = part.to(model.device)
        logits = model(part, use_cache=False).logits[:, :-1].float()
        losses.append(cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none").view(len(part), -1))
    return torch.cat(losses).cpu()


def perplexity_by_length(
    model: PreTrainedModel, tokens: torch.Tensor, lengths: Sequence[int], last: int, progress: bool = True
) -> dict[str, Any]:
    """Perplexity on the same text for windows of each length.

    Args:
        model: a causal language model.
        tokens: (tokens,) of held-out text, at least as many as the largest length.
        lengths: tokens in a window, ascending, each dividing the largest.
        last: how many tokens at the end of each longest window the second number is over, less than any length.

    Returns:
        For each length (as a string) `windows`, `perplexity` and `last_perplexity`; and the number of `tokens`.
    """
    longest = packed(tokens, lengths[-1])
    results: dict[str, Any] = {"tokens": longest.numel(), "last_tokens": last * len(longest), "by_length": {}}
    for length in tqdm(lengths, desc="perplexity", unit="length", leave=False, disable=not progress):
        windows = longest.reshape(-1, length)
        losses = token_losses(model, windows)
        # the window that ends with each longest window
        ends = losses.view(len(longest), -1, length - 1)[:, -1, -last:]
        results["by_length"][str(length)] = {
            "windows": len(windows),
            "perplexity": math.exp(losses.double().mean().item()),
            "last_perplexity": math.exp(ends.double().mean().item()),
        }
    return results


def read_held_out(checkpoint: Path, texts: Sequence[Path] | None) -> list[str]:
    """The given files' texts, or what pretrain.py kept from training."""
    if texts:
        return [path.read_text(encoding="utf-8", errors="replace") for path in texts]
    path = checkpoint / HELD_OUT_FILE
    if not path.exists():
        raise SystemExit(f"{checkpoint} has no {HELD_OUT_FILE} from pretrain.py; give a text with --text")
    return [path.read_text(encoding="utf-8")]


def report(results: dict[str, dict[str, Any]], train_length: int) -> str:
    """Both tables as text."""
    first = next(iter(results.values()))
    lengths = [int(length) for length in first["by_length"]]
    columns = [f"{length} ({length // train_length}x)" for length in lengths]
    parts = []
    for key, title in (
        ("perplexity", f"perplexity over {first['tokens']:,} held-out tokens, in windows of"),
        ("last_perplexity", f"the same {first['last_tokens']:,} tokens every time, at the end of windows of"),
    ):
        rows = [
            [name, *(f"{one['by_length'][str(length)][key]:.2f}" for length in lengths)]
            for name, one in results.items()
        ]
        parts.append(f"{title}\n\n{common.format_table(['tokens', *columns], rows)}")
    return "\n\n".join(parts)


def plot(results: dict[str, dict[str, Any]], train_length: int, path: Path) -> None:
    """Perplexity against length; on a logarithmic axis where a model is off by a factor of more than 4."""
    first = next(iter(results.values()))
    lengths = [int(length) for length in first["by_length"]]
    figure, (axes,) = common.length_axes(train_length, lengths)
    curves = {
        name: [[one["by_length"][str(length)]["perplexity"] for length in lengths]] for name, one in results.items()
    }
    common.plot_lengths(axes, curves, lengths)
    values = [value for runs in curves.values() for value in runs[0]]
    if max(values) > 4 * min(values):
        axes.set_yscale("log")
    else:
        margin = 0.15 * (max(values) - min(values)) + 0.02 * min(values)
        axes.set_ylim(min(values) - margin, max(values) + margin)
    axes.set_ylabel("perplexity (lower is better)")
    axes.set_title(f"Held-out text, trained on {train_length} tokens", loc="left", fontsize=11, pad=14)
    common.save_figure(figure, path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="default: what training held out")
    parser.add_argument("--max-tokens", type=int, default=32768, help="of the text, from its start (default 32768)")
    parser.add_argument("--device", type=torch.device, default=common.default_device(), help="default: a GPU if any")
    parser.add_argument("--out", type=Path, default=common.REPOSITORY / "runs" / "pretrain", help="where to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    results: dict[str, dict[str, Any]] = {}
    training: dict[str, Any] = {}
    train_lengths = set()
    for checkpoint in arguments.checkpoints:
        record = json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))
        name, train_length = record["method"], record["settings"]["length"]
        if name in results:
            name = f"{name} ({checkpoint.name})"
        train_lengths.add(train_length)
        model = AutoModelForCausalLM.from_pretrained(checkpoint).to(arguments.device)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        tokens = tokenize(read_held_out(checkpoint, arguments.text), tokenizer)[: arguments.max_tokens]
        lengths = [train_length * times for times in TIMES]
        results[name] = perplexity_by_length(model, tokens, lengths, last=train_length // 2)
        training[name] = record
    if len(train_lengths) != 1:
        raise SystemExit(f"checkpoints of one training length can be compared, these have {sorted(train_lengths)}")
    train_length = train_lengths.pop()
    print("\n" + report(results, train_length))
    seeds = sorted({record["settings"]["seed"] for record in training.values()})
    common.write_json(
        arguments.out / "results.json",
        {
            **common.results_header(arguments.device, seeds),
            "train_length": train_length,
            "results": results,
            "training": training,
        },
    )
    plot(results, train_length, arguments.out / "results.png")
    print(f"\nSaved results.json and results.png in {arguments.out}")


if __name__ == "__main__":
    main()
