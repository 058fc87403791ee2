"""Measures the perplexity of checkpoints of pretrain.py on held-out text, against the length of the context.

    python -m recipes.pretrain.perplexity runs/pretrain/softmax runs/pretrain/asentmax
    python -m recipes.pretrain.perplexity CHECKPOINT ... --text FILE ...      on another text

There are two numbers for each length:

    perplexity        over all tokens of windows of this length, which do not overlap
    last_perplexity   over the same tokens for every length, those at the end of the longest windows; they see as much
                      text before them as the length allows

Writes results.json and results.png.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_asentmax  # noqa: F401  (registers the attention)
from recipes import common, metrics
from recipes.pretrain.data import packed, tokenize

TIMES = (1, 2, 4, 8)  # tested lengths over the training length
HELD_OUT_FILE = "held_out.txt"


@torch.no_grad()
def token_losses(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """The loss in nats of every token of a window but its first: -log p(token | tokens before it in the window).

    Args:
        model: a causal language model.
        windows: (windows, length) tokens.

    Returns:
        (windows, length - 1) float32, on the CPU.
    """
    model.eval()
    losses = []
    batch_tokens = 1024 if model.device.type == "cpu" else 16384  # small parts fit in a CPU's cache
    for part in windows.split(max(1, batch_tokens // windows.shape[1])):
        part = part.to(model.device)
        logits = model(part, use_cache=False).logits[:, :-1].float()
        losses.append(cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none").view(len(part), -1))
    return torch.cat(losses).cpu()


def perplexity_by_length(
    model: PreTrainedModel, tokens: torch.Tensor, lengths: Sequence[int], last: int, progress: bool = True
) -> dict[str, Any]:
    """Perplexity on the same text in windows of each length.

    Args:
        model: a causal language model.
        tokens: (tokens,) of held-out text, at least as many as the largest length.
        lengths: tokens in a window, ascending. Each divides the largest.
        last: how many tokens at the end of each longest window `last_perplexity` is over. Less than any length.
        progress: shows a progress bar.

    Returns:
        `by_length`: for each length (a string) `windows`, `perplexity` and `last_perplexity`. `tokens` and
        `last_tokens`: how many there are.
    """
    metric = metrics.load("token_perplexity")

    def perplexity(losses: torch.Tensor) -> float:
        return float(metric.compute(losses=losses.double().flatten().tolist())["perplexity"])

    longest = packed(tokens, lengths[-1])
    results: dict[str, Any] = {"tokens": longest.numel(), "last_tokens": last * len(longest), "by_length": {}}
    for length in tqdm(lengths, desc="perplexity", unit="length", leave=False, disable=not progress):
        windows = longest.reshape(-1, length)
        losses = token_losses(model, windows)
        # of each longest window the last window of this length
        ends = losses.view(len(longest), -1, length - 1)[:, -1, -last:]
        results["by_length"][str(length)] = {
            "windows": len(windows),
            "perplexity": perplexity(losses),
            "last_perplexity": perplexity(ends),
        }
    return results


def read_held_out(checkpoint: Path, texts: Sequence[Path] | None) -> list[str]:
    """The texts of the given files, or the text that pretrain.py held out."""
    if texts:
        return [path.read_text(encoding="utf-8", errors="replace") for path in texts]
    path = checkpoint / HELD_OUT_FILE
    if not path.exists():
        raise SystemExit(f"{checkpoint} has no {HELD_OUT_FILE}, which pretrain.py writes: give a text with --text")
    return [path.read_text(encoding="utf-8")]


def report(results: dict[str, dict[str, Any]], train_length: int) -> str:
    """Both tables as plain text."""
    first = next(iter(results.values()))
    lengths = [int(length) for length in first["by_length"]]
    columns = [f"{length:,} ({length // train_length}x)" for length in lengths]
    parts = []
    for key, title in (
        ("perplexity", f"perplexity over {first['tokens']:,} held-out tokens, in windows of"),
        ("last_perplexity", f"perplexity over the same {first['last_tokens']:,} tokens, at the end of windows of"),
    ):
        rows = [
            [name, *(f"{one['by_length'][str(length)][key]:.2f}" for length in lengths)]
            for name, one in results.items()
        ]
        parts.append(f"{title}\n\n{common.format_table(['tokens', *columns], rows)}")
    return "\n\n".join(parts)


def plot(results: dict[str, dict[str, Any]], train_length: int, path: Path) -> None:
    """Perplexity against length. The axis is logarithmic if the values differ by more than a factor of 4."""
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
    axes.legend(frameon=False, fontsize="small")
    axes.set_ylabel("perplexity (lower is better)")
    axes.set_title(f"Held-out text; training had {train_length} tokens", loc="left", fontsize=11, pad=14)
    common.save_figure(figure, path)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="default: the text that training held out")
    parser.add_argument("--max-tokens", type=int, default=32768, help="from the start of the text (default 32768)")
    parser.add_argument("--device", type=torch.device, default=common.default_device(), help="default: a GPU if any")
    parser.add_argument("--out", type=Path, default=common.REPOSITORY / "runs" / "pretrain", help="where to write")
    return parser.parse_args(arguments)


def main(command: list[str] | None = None) -> None:
    """Runs the measurement; see the module's description."""
    arguments = parse_arguments(command)
    records = [common.read_json(checkpoint / "training.json") for checkpoint in arguments.checkpoints]
    train_length, *others = sorted({record["settings"]["length"] for record in records})
    if others:
        raise SystemExit(f"expected checkpoints of one training length, these have {[train_length, *others]}")
    seeds = sorted({record["settings"]["seed"] for record in records})
    header = common.results_header(arguments.device, seeds)
    methods = Counter(record["method"] for record in records)
    results: dict[str, dict[str, Any]] = {}
    training: dict[str, Any] = {}
    for checkpoint, record in zip(arguments.checkpoints, records, strict=True):
        name = record["method"] if methods[record["method"]] == 1 else f"{record['method']} ({checkpoint})"
        model = AutoModelForCausalLM.from_pretrained(checkpoint).to(arguments.device)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        tokens = tokenize(read_held_out(checkpoint, arguments.text), tokenizer)[: arguments.max_tokens]
        lengths = [train_length * times for times in TIMES]
        results[name] = perplexity_by_length(model, tokens, lengths, last=train_length // 2)
        training[name] = record
    print("\n" + report(results, train_length))
    content = {**header, "train_length": train_length, "results": results, "training": training}
    common.write_json(arguments.out / "results.json", content)
    plot(results, train_length, arguments.out / "results.png")
    print(f"\nWrote results.json and results.png in {arguments.out}")


if __name__ == "__main__":
    main()
