"""The query-error law, 1 - query accuracy = n e with n pairs: e by length, from queries for every key of a context.

    python recipes/synthetic/law.py runs/synthetic/mqmtar-asentmax-nape-paper --multiples 1 16 64 256 1024
    python recipes/synthetic/law.py --report                          # only law.md and law.png again, from law.json

A test sample asks a context four queries. Here a context is read once, and its cached keys and values serve queries for
all of its pairs, four at a time as in a test: at 1024x two thousand times as many answers for the cost of one more
reading. So e has an interval that is worth looking at, and one sees whether it stays the same as contexts grow.
Queries of one context are not independent, and the interval is as much wider as their counts scatter more than chance
would have it (the design effect). Contexts are not those of tests or validations.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path
from statistics import fmean, variance
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.common import length_axes, markdown_table, results_header, save_figure, write_json
from recipes.synthetic.evaluate import add_measuring_flags, fewer_pairs, run_folders, task_of
from recipes.synthetic.measuring import autocast, fixed_batches, set_matmul_precision, wilson_interval
from recipes.synthetic.models import load_model
from recipes.synthetic.report import COLORS, times_million
from recipes.synthetic.tasks import Batch, Mqmtar

__all__ = ["interval", "main", "measure_law", "questions"]

SEED = 4  # of the contexts, which are neither the tests' nor the validations'


def questions(
    task: Mqmtar, contexts: Batch, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contexts without their queries, and queries for all of their pairs in random order, four at a time.

    Returns:
        (batch, tokens) contexts; (batch, groups, 25) what follows them in a test: four queries and their answers; and
        (batch, groups, 4, 2) the values asked for. Pairs that do not fill a group are left out.
    """
    inputs, four = contexts.inputs, task.QUERIES
    starts = task.key_starts(inputs)
    size, pairs = starts.shape
    words = inputs.gather(1, (starts[:, :, None] + starts.new_tensor([0, 1, 3, 4])).flatten(1)).view(size, pairs, 4)
    order = torch.rand((size, pairs), generator=generator, device=generator.device).argsort(dim=1).to(inputs.device)
    order = order[:, : pairs // four * four, None].expand(-1, -1, 4)
    key, value = words.gather(1, order).unflatten(1, (-1, four)).chunk(2, dim=3)
    marker = torch.full_like(key[..., :1], task.QUERY)
    asked, answers = (torch.cat([marker, word], dim=3).flatten(2) for word in (key, value))
    follows = torch.cat([asked, torch.full_like(asked[..., :1], task.sep), answers], dim=2)
    first_query = int(task.query_markers(inputs)[0][0, 0])
    return inputs[:, :first_query], follows, value


def _repeated(cache: Any, times: int) -> DynamicCache:
    """A cache of its own, with each row of a dynamic cache `times` times."""
    repeated = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = (t[:, None].expand(-1, times, *t.shape[1:]).flatten(0, 1) for t in (layer.keys, layer.values))
        repeated.update(keys, values, index)
    return repeated


def interval(wrong: list[int], queries: int) -> tuple[float, float, float]:
    """95% interval of the share of wrong queries, and the design effect that it allows for.

    Args:
        wrong: wrong queries of each context.
        queries: asked of each.

    Returns:
        (low, high, effect): Wilson's interval of 1/effect as many queries, where the effect, at least 1, is the
        variance of `wrong` over the binomial one (Kish, Survey Sampling, 1965).
    """
    share = fmean(wrong) / queries
    effect = 1.0
    if len(wrong) > 1 and 0 < share < 1:
        effect = max(1.0, variance(wrong) / (queries * share * (1 - share)))
    trials = len(wrong) * queries
    low, high = wilson_interval(round(sum(wrong) / effect), max(1, round(trials / effect)))
    return low, high, effect


@torch.inference_mode()
def measure_law(
    model: PreTrainedModel,
    task: Mqmtar,
    length: int,
    queries: int,
    *,
    tokens_at_once: int = 1 << 20,
    minutes: float = math.inf,
) -> dict[str, Any]:
    """e at one length, with its interval and what it comes from.

    Args:
        model: in eval mode, on the device to run on.
        length: of the source, in tokens.
        queries: at least so many; whole contexts are asked.
        tokens_at_once: whose keys and values are in memory at a time.
        minutes: after which no new batch of contexts is begun.
    """
    device, start = next(model.parameters()).device, time.monotonic()
    pairs = task.pairs(length)
    each = pairs // task.QUERIES * task.QUERIES
    if each == 0:
        raise ValueError(f"a length of {length} holds {pairs} pairs; it takes at least {task.QUERIES}")
    contexts = math.ceil(queries / each)
    generator = torch.Generator().manual_seed(SEED)
    answer = 3 * task.QUERIES  # tokens
    at_once = max(1, min(256, tokens_at_once // length))  # rows of cached keys and values
    read_at_once = min(at_once, max(1, (1 << 17) // length))
    wrong: list[int] = []
    with tqdm(total=contexts, unit="context", leave=False) as bar:
        for on_cpu in fixed_batches(task, length, contexts, read_at_once, SEED):
            read, follows, values = questions(task, on_cpu.to(device), generator)
            of_batch = torch.zeros(len(read), dtype=torch.int64, device=device)
            with autocast(task, device):
                cache = model(input_ids=read, use_cache=True, logits_to_keep=1).past_key_values
                groups = max(1, at_once // len(read))
                for some, asked in zip(follows.split(groups, dim=1), values.split(groups, dim=1), strict=True):
                    repeated = _repeated(cache, some.shape[1])
                    logits = model(
                        input_ids=some.flatten(0, 1), past_key_values=repeated, use_cache=True, logits_to_keep=answer
                    ).logits
                    given = logits.argmax(dim=-1).view(*asked.shape[:3], 3)[..., :2]
                    of_batch += (given != asked).any(dim=3).sum(dim=(1, 2))
            wrong.extend(of_batch.tolist())
            bar.update(len(read))
            if time.monotonic() - start > 60 * minutes:
                break
    low, high, effect = interval(wrong, each)
    return {
        "length": length,
        "pairs": pairs,
        "contexts": len(wrong),
        "queries": len(wrong) * each,
        "queries_wrong": sum(wrong),
        "design_effect": effect,
        "e": sum(wrong) / (len(wrong) * each) / pairs,
        "e_interval": (low / pairs, high / pairs),
        "seconds": round(time.monotonic() - start, 2),
    }


def table(runs: dict[str, Any]) -> str:
    """Markdown: e times a million with its interval, models down, lengths across."""
    multiples = sorted({entry["multiple"] for run in runs.values() for entry in run["lengths"]})
    rows = []
    for name, run in runs.items():
        cells = {entry["multiple"]: times_million(entry["e"], *entry["e_interval"]) for entry in run["lengths"]}
        rows.append([name, *(cells.get(multiple, "") for multiple in multiples)])
    return markdown_table(["e x 1e6", *(f"{multiple}x" for multiple in multiples)], rows) + "\n"


def figure(runs: dict[str, Any], file: Path) -> None:
    """e by length with intervals, a color a method; where no query was wrong, the interval's upper end, hollow."""
    lengths = sorted({entry["length"] for run in runs.values() for entry in run["lengths"]})
    drawing, (axes,) = length_axes(next(iter(runs.values()))["train_length"], lengths)
    markers = {method: itertools.cycle("osD^vP*Xhp") for method in COLORS}
    hollow: dict[str, Any] = {"linestyle": "", "markersize": 5, "markerfacecolor": "none"}
    for number, (name, run) in enumerate(runs.items()):
        beside = 2 ** (min(0.08, 0.6 / len(runs)) * (number - (len(runs) - 1) / 2))  # next to each other
        entries = [{**entry, "length": beside * entry["length"]} for entry in run["lengths"]]
        name = name.removeprefix("mqmtar-")
        color, marker = COLORS[run["method"]], next(markers[run["method"]])
        found = [entry for entry in entries if entry["e"] > 0]
        if found:
            spread = [
                [entry["e"] - entry["e_interval"][0] for entry in found],
                [entry["e_interval"][1] - entry["e"] for entry in found],
            ]
            at, e = ([entry[key] for entry in found] for key in ("length", "e"))
            axes.errorbar(at, e, yerr=spread, marker=marker, markersize=5, capsize=3, label=name, color=color)
        none = [entry for entry in entries if entry["e"] == 0]
        above = [entry["e_interval"][1] for entry in none]
        label = None if found else name
        axes.plot([entry["length"] for entry in none], above, marker=marker, color=color, label=label, **hollow)
    axes.plot([], [], marker="o", color="gray", label="hollow: no query wrong, the interval's upper end", **hollow)
    axes.set(yscale="log", ylabel="e = wrong queries / queries / pairs", title="MQMTAR's query-error law")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    drawing.set_figwidth(10.5)
    save_figure(drawing, file)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of runs")
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024], help="lengths to ask at")
    parser.add_argument("--queries", type=int, default=16_000, help="at each length, at least (default: 16,000)")
    add_measuring_flags(parser, 1 << 20, "with keys and values in memory")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"), help="results are added")
    parser.add_argument("--report", action="store_true", help="only remake table and figure")
    parsed = parser.parse_args(arguments)

    runs: dict[str, Any] = json.loads(parsed.output.read_text())["runs"] if parsed.output.exists() else {}
    folders = run_folders(parsed.runs)
    if not folders and not (parsed.report and runs):
        parser.error(f"no finished run below {', '.join(map(str, parsed.runs)) or 'no folder'}")
    models: list[tuple[Path, dict[str, Any], Mqmtar]] = []
    for folder in [] if parsed.report else folders:
        run = json.loads((folder / "run.json").read_text())
        if run["task"] != Mqmtar.name:
            parser.error(f"{folder} was trained on {run['task']}; the law is of MQMTAR's queries")
        task = cast(Mqmtar, task_of(run, parsed.pool))
        models.append((folder, run, task))
    for folder, run, task in tqdm(models, unit="model", disable=not models):
        if run.get("given_up"):
            tqdm.write(f"{folder} was given up before it left the plateau: there is no model to ask")
            continue
        set_matmul_precision(task)
        model = load_model(folder / "model").to(parsed.device)
        name = f"{folder.parent.name} {folder.name}"
        lengths: dict[int, dict[str, Any]] = {}
        header = results_header(parsed.device, [SEED])
        if name in runs and runs[name]["run"] == run["header"]:
            lengths = {entry["multiple"]: entry for entry in runs[name]["lengths"]}
        elif name in runs:
            tqdm.write(f"{parsed.output} has {name} of another run: this one takes its place")
        for multiple in parsed.multiples:
            entry = measure_law(
                model,
                task,
                multiple * task.max_length,
                parsed.queries,
                tokens_at_once=parsed.tokens_at_once,
                minutes=parsed.minutes,
            )
            if parsed.pool is not None:
                entry["pool"] = parsed.pool
            lengths[multiple] = {"multiple": multiple, "header": header, **entry}
            found = [lengths[key] for key in sorted(lengths)]
            runs[name] = {
                "method": run["settings"]["method"],
                "train_length": task.max_length,
                "run": run["header"],
                "lengths": found,
            }
            write_json(parsed.output, {"runs": runs})
            low, high = entry["e_interval"]
            tqdm.write(
                f"{name} at {multiple}x: {entry['queries_wrong']} of {entry['queries']:,} queries wrong, "
                f"e = {entry['e']:.2g} [{low:.2g}, {high:.2g}], {entry['seconds']:.1f} s"
                f"{fewer_pairs(task, multiple * task.max_length)}"
            )
    if not runs:
        parser.error("nothing to report: every run was given up")
    parsed.output.with_suffix(".md").write_text(f"# MQMTAR's query-error law\n\n{table(runs)}")
    figure(runs, parsed.output.with_suffix(".png"))
    print(f"wrote {parsed.output}, its table and its figure")


if __name__ == "__main__":
    main(sys.argv[1:])
