"""Measures e of the query-error law, 1 - query accuracy = n e with n pairs, from queries for all keys of a context.

    python -m recipes.synthetic.analysis.law runs/synthetic/mqmtar-asentmax-nape-paper --multiples 1 16 64 256 1024
    python -m recipes.synthetic.analysis.law --report                 # only write law.md again, from law.json

A test sample asks four queries of its context. Here a context is read once, and its cached keys and values serve
queries for all of its pairs, four at a time as in a test. At 1024x this gives two thousand times as many answers for
the cost of one more reading. So the interval of e is narrow, and one sees whether e stays the same as contexts grow.
The queries of one context are not independent; the interval is wider by as much as their counts vary more than by
chance (the design effect). The contexts are not those of tests or validations.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from recipes.common import markdown_table, results_header, write_json
from recipes.synthetic.analysis import mqmtar_of
from recipes.synthetic.evaluate import add_measuring_flags, fewer_pairs, run_folders
from recipes.synthetic.measuring import autocast, fixed_batches, set_matmul_precision, wilson_interval
from recipes.synthetic.models import load_model
from recipes.synthetic.report import times_million
from recipes.synthetic.tasks import Batch, Mqmtar

__all__ = ["interval", "main", "measure_law", "questions"]

SEED = 4  # of the contexts, which are not those of tests and validations


def questions(
    task: Mqmtar, contexts: Batch, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits contexts from their queries, and makes queries for all of their pairs in random order, four at a time.

    Returns:
        (batch, tokens): the contexts.
        (batch, groups, 25): what follows them in a test, four queries and their answers. Pairs that do not fill a group
        are left out.
        (batch, groups, 4, 2): the values asked for.
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
    """A new cache in which each row of a dynamic cache occurs `times` times."""
    repeated = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = (t[:, None].expand(-1, times, *t.shape[1:]).flatten(0, 1) for t in (layer.keys, layer.values))
        repeated.update(keys, values, index)
    return repeated


def interval(wrong: list[int], queries: int) -> tuple[float, float, float]:
    """The 95% interval of the share of wrong queries, and the design effect that it allows for.

    Args:
        wrong: number of wrong queries of each context.
        queries: number of queries of each context.

    Returns:
        (low, high, effect): Wilson's interval for 1/effect as many queries. The effect, at least 1, is the variance of
        `wrong` over the binomial variance (Kish, Survey Sampling, 1965).
    """
    share = fmean(wrong) / queries
    effect = 1.0
    if len(wrong) > 1 and 0 < share < 1:
        effect = max(1.0, variance(wrong) / (queries * share * (1 - share)))
    trials = len(wrong) * queries
    low, high = wilson_interval(round(sum(wrong) / effect), max(1, round(trials / effect)))
    return low, high, effect


def _wrong_of_contexts(
    model: PreTrainedModel, asked: tuple[torch.Tensor, torch.Tensor, torch.Tensor], at_once: int, answer: int
) -> torch.Tensor:
    """(batch,) wrong queries of each context.

    Args:
        model: in eval mode.
        asked: from `questions`.
        at_once: rows of cached keys and values in memory.
        answer: tokens of a group's answers.
    """
    contexts, follows, values = asked
    wrong = torch.zeros(len(contexts), dtype=torch.int64, device=contexts.device)
    cache = model(input_ids=contexts, use_cache=True, logits_to_keep=1).past_key_values
    groups = max(1, at_once // len(contexts))
    for some, of_some in zip(follows.split(groups, dim=1), values.split(groups, dim=1), strict=True):
        repeated = _repeated(cache, some.shape[1])
        logits = model(
            input_ids=some.flatten(0, 1), past_key_values=repeated, use_cache=True, logits_to_keep=answer
        ).logits
        given = logits.argmax(dim=-1).view(*of_some.shape[:3], 3)[..., :2]
        wrong += (given != of_some).any(dim=3).sum(dim=(1, 2))
    return wrong


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
    """e at one length, with its interval and the counts behind it.

    Args:
        model: in eval mode, on the device to run on.
        task: of the contexts.
        length: of the source, in tokens.
        queries: at least this number; whole contexts are asked.
        tokens_at_once: number of tokens whose keys and values are in memory at a time.
        minutes: after which no new batch of contexts is begun.

    Raises:
        ValueError: the length holds fewer pairs than a test asks for.
    """
    device, start = next(model.parameters()).device, time.monotonic()
    pairs = task.pairs(length)
    each = pairs // task.QUERIES * task.QUERIES
    if each == 0:
        raise ValueError(f"a length of {length} holds {pairs} pairs; it takes at least {task.QUERIES}")
    contexts = math.ceil(queries / each)
    generator = torch.Generator().manual_seed(SEED)
    at_once = max(1, min(256, tokens_at_once // length))  # rows of cached keys and values
    read_at_once = min(at_once, max(1, (1 << 17) // length))
    wrong: list[int] = []
    with tqdm(total=contexts, unit="context", leave=False) as bar:
        for on_cpu in fixed_batches(task, length, contexts, read_at_once, SEED):
            asked = questions(task, on_cpu.to(device), generator)
            with autocast(task, device):
                wrong.extend(_wrong_of_contexts(model, asked, at_once, 3 * task.QUERIES).tolist())
            bar.update(len(on_cpu))
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
    """Markdown: e times a million with its interval, models in rows, lengths in columns."""
    multiples = sorted({entry["multiple"] for run in runs.values() for entry in run["lengths"]})
    rows = []
    for name, run in runs.items():
        cells = {entry["multiple"]: times_million(entry["e"], *entry["e_interval"]) for entry in run["lengths"]}
        rows.append([name, *(cells.get(multiple, "") for multiple in multiples)])
    return markdown_table(["e x 1e6", *(f"{multiple}x" for multiple in multiples)], rows) + "\n"


_NOTE = (
    "e = wrong queries / queries / pairs, times a million, with 95% intervals that allow for similar queries in one "
    "context. Rows are named by the folders of their runs. The table shows how rarely each model errs, which exact "
    "match does not once it is near 100%. It does not show how much seeds differ: the baselines have one."
)


def _measured(
    model: PreTrainedModel, folder: Path, task: Mqmtar, multiple: int, parsed: argparse.Namespace
) -> dict[str, Any]:
    """The entry of one model and length, which is printed as well."""
    length = multiple * task.max_length
    entry = measure_law(
        model, task, length, parsed.queries, tokens_at_once=parsed.tokens_at_once, minutes=parsed.minutes
    )
    if parsed.pool is not None:
        entry["pool"] = parsed.pool
    low, high = entry["e_interval"]
    tqdm.write(
        f"{folder.parent.name} {folder.name} at {multiple}x: {entry['queries_wrong']} of {entry['queries']:,} queries "
        f"wrong, e = {entry['e']:.2g} [{low:.2g}, {high:.2g}], {entry['seconds']:.1f} s{fewer_pairs(task, length)}"
    )
    return {"multiple": multiple, "header": results_header(parsed.device, [SEED]), **entry}


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of runs")
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024], help="lengths to ask at")
    parser.add_argument("--queries", type=int, default=16_000, help="at each length, at least (default: 16,000)")
    add_measuring_flags(parser, 1 << 20, "tokens with keys and values in memory")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_suffix(".json"), help="the results file, which is added to"
    )
    parser.add_argument("--report", action="store_true", help="only write the table again")
    parsed = parser.parse_args(arguments)

    runs: dict[str, Any] = json.loads(parsed.output.read_text())["runs"] if parsed.output.exists() else {}
    folders = run_folders(parsed.runs)
    if not folders and not (parsed.report and runs):
        parser.error(f"there is no finished run below {', '.join(map(str, parsed.runs)) or 'no folder'}")
    asked = {} if parsed.report else {folder: mqmtar_of(folder, parser, parsed.pool) for folder in folders}
    for folder, task in tqdm(asked.items(), unit="model", disable=not asked):
        run = json.loads((folder / "run.json").read_text())
        if run.get("given_up"):
            tqdm.write(f"{folder} was given up before it left the plateau: there is no model to ask")
            continue
        set_matmul_precision(task)
        model = load_model(folder / "model").to(parsed.device)
        name = f"{folder.parent.name} {folder.name}"
        lengths: dict[int, dict[str, Any]] = {}
        if name in runs and runs[name]["run"] == run["header"]:
            lengths = {entry["multiple"]: entry for entry in runs[name]["lengths"]}
        elif name in runs:
            tqdm.write(f"{parsed.output} has {name} of another run, which is replaced")
        for multiple in parsed.multiples:
            lengths[multiple] = _measured(model, folder, task, multiple, parsed)
            found = [lengths[key] for key in sorted(lengths)]
            runs[name] = {"method": run["settings"]["method"], "run": run["header"], "lengths": found}
            write_json(parsed.output, {"runs": runs})
    if not runs:
        parser.error("there is nothing to report: every run was given up")
    parsed.output.with_suffix(".md").write_text(f"# MQMTAR's query-error law\n\n{_NOTE}\n\n{table(runs)}")
    print(f"wrote {parsed.output} and its table")


if __name__ == "__main__":
    main(sys.argv[1:])
