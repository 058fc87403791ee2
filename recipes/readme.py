"""Writes the README's tables from the results files in this folder, between its marks.

python recipes/readme.py             after a recipe's results.json was copied to its folder
python recipes/readme.py --check     only say whether README.md is up to date
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.benchmark import attention_report, decode_report
from recipes.common import markdown_table, short_commit
from recipes.synthetic.report import TRACKS, Group, caveats, compared, grouped, in_vain, tables, trained_alike

RECIPES = Path(__file__).resolve().parent
README = RECIPES.parent / "README.md"


def origin(content: dict[str, Any]) -> str:
    """One sentence that says where numbers come from."""
    device, versions = content["device"]["name"], content["versions"]
    seeds = content["seeds"]
    seeds_text = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return (
        f"`{content['command']}`, {seeds_text}, on {device}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, commit {short_commit(content['commit'])}."
    )


def _origin_of_seeds(headers: list[dict[str, Any]]) -> str:
    """`origin` of results that have a file for each seed, where one command tests all seeds of a folder."""
    commands = dict.fromkeys(re.sub(r"/seed\d+", "", header["command"]) for header in headers)
    commits = dict.fromkeys(short_commit(header["commit"]) for header in headers)
    seeds = [seed for header in headers for seed in header["seeds"]]
    return origin({**headers[0], "command": "; ".join(commands), "commit": ", ".join(commits), "seeds": seeds})


def _by_method(runs: list[dict[str, Any]], key: str, scale: float) -> list[list[str]]:
    """A line per method: the mean over its seeds at each length, and the range where there are several."""
    by_method: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        by_method.setdefault(run["method"], []).append(run[key])
    rows = []
    for method, values in by_method.items():
        cells = []
        for length in values[0]:
            column = [scale * one[length] for one in values]
            mean = f"{sum(column) / len(column):.1f}"
            least, most = f"{min(column):.1f}", f"{max(column):.1f}"
            cells.append(mean if least == most else f"{mean} ({least} to {most})")
        rows.append([method, *cells])
    return rows


def quickstart(content: dict[str, Any]) -> str:
    """The associative recall that `make quickstart` trains."""
    runs = content["runs"]
    lengths = [int(length) for length in runs[0]["accuracy"]]
    columns = ["", *(f"{length:,} ({length // lengths[0]}x)" for length in lengths)]
    queries = content["streams_per_length"] * content["queries_per_stream"]
    return "\n\n".join(
        [
            "![Right answers, and keys in use, against length](recipes/quickstart/results.png)",
            f"Associative recall, trained on at most {lengths[0]} tokens: right answers in %, {queries} queries at "
            "each length, the mean of the seeds (and their range).",
            markdown_table(columns, _by_method(runs, "accuracy", 100.0)),
            "How many keys a query of the last layer gives any weight, in the head that looks at most:",
            markdown_table(columns, _by_method(runs, "keys_in_use", 1.0)),
            origin(content),
        ]
    )


def pretrain(content: dict[str, Any]) -> str:
    """Language models on text: perplexity against length."""
    lengths = list(next(iter(content["results"].values()))["by_length"])
    shortest = content["train_length"]
    rows = [
        [name, *(f"{result['by_length'][length]['perplexity']:.2f}" for length in lengths)]
        for name, result in content["results"].items()
    ]
    tokens = next(iter(content["results"].values()))["tokens"]
    return "\n\n".join(
        [
            "## A language model on real text",
            f"Perplexity of small models trained on {shortest} tokens, over the same {tokens:,} held-out tokens in "
            "windows of each length (`recipes/pretrain/`).",
            markdown_table(["", *(f"{int(n):,} ({int(n) // shortest}x)" for n in lengths)], rows),
            origin(content),
        ]
    )


def _ratio(ours: dict[str, Any], peer: dict[str, Any] | None, key: str) -> str:
    """The peer's time over ours."""
    return "-" if not peer or not peer.get(key) or not ours.get(key) else f"{peer[key] / ours[key]:.2f}x"


def _has_curves(content: dict[str, Any]) -> bool:
    """Whether there is a kind of input at four lengths or more: enough to look at."""
    lengths: dict[str, set[int]] = {}
    for row in content["results"]:
        lengths.setdefault(row["kind"], set()).add(row["length"])
    return any(len(found) >= 4 for kind, found in lengths.items() if "many rows" not in kind)


def _case_order(item: tuple[tuple[Any, ...], Any]) -> tuple[Any, ...]:
    """Long sequences by their head dimension, length and kind, then the short ones."""
    kind, length, head_dim, *_ = item[0]
    return "many rows" in kind, head_dim, -length, kind


def benchmark(content: dict[str, Any]) -> str:
    """The attention kernels beside their peers."""
    peers = [peer for peer in attention_report.PEERS if any(row["method"] == peer for row in content["results"])]
    runs: dict[tuple[Any, ...], list[dict[str, dict[str, Any]]]] = {}
    for case, methods in attention_report.by_case(content["results"]).items():
        if "ours" in methods and (case[1] >= 8192 or "many rows" in case[0]):
            runs.setdefault(case[:-1], []).append(methods)
    rows = []
    for (kind, length, head_dim, batch, heads), of_case in sorted(runs.items(), key=_case_order):
        ours = of_case[0]["ours"]
        key = "graph_ms" if ours.get("graph_ms") else "forward_backward_ms"
        cells = [kind, f"{length:,}", str(head_dim), f"{batch * heads:,}", str(ours["support"]), f"{ours[key]:.2f}"]
        for peer, measured in [*((peer, key) for peer in peers), ("sdpa cuDNN", "forward_backward_ms")]:
            run = next((run for run in of_case if peer in run), {"ours": ours})  # both times are of one run
            cells.append(_ratio(run["ours"], run.get(peer), measured))
        rows.append(cells)
    columns = ["input", "N", "D", "batch x heads", "keys a row", "ours, ms", *peers, "cuDNN, called from Python"]
    return "\n\n".join(
        [
            "## Speed",
            "Attention alone, forward and backward, bfloat16, causal: how many times faster ours is than each peer "
            "(below 1: slower), as replays of a CUDA graph and, in the last column, as calls from Python, where the "
            "host's time counts. SDPA runs without ALiBi everywhere"
            + (", FlexAttention with the same ALiBi as ours" if "flex alibi" in peers else "")
            + ". All numbers: [attention.md](recipes/benchmark/attention.md).",
            *(["![Time against length](recipes/benchmark/attention.png)"] if _has_curves(content) else []),
            markdown_table(columns, rows),
            origin(content),
        ]
    )


def decode(content: dict[str, Any]) -> str:
    """One decoding step beside its peers."""
    peers = [peer for peer in decode_report.PEERS if any(row["method"] == peer for row in content["results"])]
    rows = []
    for (kind, heads, kv_heads, head_dim, kv_len, batch), methods in decode_report.by_case(content["results"]).items():
        if "ours" in methods:
            cells = [kind, f"{heads}/{kv_heads} x {head_dim}", f"{kv_len:,}", str(batch)]
            cells.append(f"{1e3 * methods['ours']['ms']:.0f}")
            for peer in peers:
                row = methods.get(peer)
                cells.append(f"{decode_report.times_faster(methods['ours'], row):.2f}x" if row else "-")
            rows.append(cells)
    return "\n\n".join(
        [
            "One decoding step of attention inside a CUDA graph, how many times faster than each peer "
            "([details](recipes/benchmark/decode.md)):",
            markdown_table(["input", "heads x D", "keys", "batch", "ours, us", *peers], rows),
            origin(content),
        ]
    )


def training_step(content: dict[str, Any]) -> str:
    """A whole training step beside the same model on sdpa."""
    columns = ["tokens", "compiled", "query projections x", "model", "tokens a second", "times sdpa's", "peak GiB"]
    rows = [
        [
            f"{row['length']:,}",
            row["compiled"],
            f"{row['sharpen']:g}",
            row["method"],
            f"{row['tokens_per_second']:,}",
            f"{row['times_faster_than_sdpa']:.2f}",
            f"{row['peak_gib']:.1f}",
        ]
        for row in content["rows"]
    ]
    return "\n\n".join(
        [
            "A training step of a 124M Llama, batch 1, its layers compiled, the whole model, or that into CUDA graphs "
            "(query projections multiplied, so that supports are as small as in a trained "
            "model, or as they are at the start):",
            markdown_table(columns, rows),
            origin(content),
        ]
    )


def generate(content: dict[str, Any]) -> str:
    """Tokens a second of generation beside the same model on sdpa."""
    columns = ["size", "context", "query projections x", "model", "tokens a second", "times sdpa's"]
    columns += ["on the GPU, ms", "prompt, ms"]
    rows = [
        [
            row["size"],
            f"{row['context']:,}",
            f"{row['sharpen']:g}",
            row["method"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['times_faster_than_sdpa']:.2f}",
            "-" if row["gpu_ms"] is None else f"{row['gpu_ms']:.2f}",
            f"{row['prompt_ms']:.0f}",
        ]
        for row in content["rows"]
    ]
    return "\n\n".join(
        [
            "`generate`, one sequence, static cache, steps compiled with CUDA graphs as transformers does. Tokens a "
            "second by the wall clock, the models in turns; beside it what the GPU works in a step, and the time to "
            "the first token:",
            markdown_table(columns, rows),
            origin(content),
        ]
    )


def _other_settings(groups: list[Group], shown: Group, multiple: int) -> str:
    """What seeds have under other settings than those of the group shown: all of them, better or worse."""
    found: dict[int, list[float]] = {}
    for result in (result for group in groups if group is not shown for result in group.results):
        for entry in result["lengths"]:
            if entry["multiple"] == multiple:
                found.setdefault(result["run"]["seed"], []).append(100 * entry["exact_match"])
    if not found:
        return ""
    each = (f"seed {seed}: {', '.join(f'{v:.1f}' for v in sorted(values))}" for seed, values in sorted(found.items()))
    return f" (under other settings {'; '.join(each)})"


def _beyond() -> list[str]:
    """What was tested at more than 1024x, a sentence a model."""
    texts = []
    for path in sorted((RECIPES / "synthetic" / "beyond").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        run, each = content["run"], []
        for entry in content["lengths"]:
            low, high = (100 * bound for bound in entry["interval"])
            each.append(
                f"{100 * entry['exact_match']:.1f}% at {entry['length']:,} tokens ({entry['samples']} samples, "
                f"{entry['pairs']:,} pairs; 95% interval {low:.0f} to {high:.0f})"
            )
        texts.append(
            f"Beyond that: seed {run['seed']} trained on {TRACKS[run['track']]} with a learning rate of "
            f"{run['task_settings']['lr']:g} in its second run has {', '.join(each)}. "
            "[How](recipes/synthetic/findings.md#beyond-1024x)."
        )
    return texts


_NAMES = {"asentmax": "ASEntmax", "ssmax": "SSMax", "adaptive_temperature": "adaptive temperature"}


def _rows(group: Group, multiples: Sequence[int], marks: str = "") -> list[list[str]]:
    """Exact match at each length where it was tested: of several seeds the mean, and the best one's."""
    marks = "†" * bool(group.caveat) + marks
    name = f"ours: {_NAMES.get(group.method, group.method)} + NAPE{marks}, trained on {TRACKS[group.track]}"

    def row(name: str, members: Group) -> list[str]:
        return [name, *(cell(members, multiple) for multiple in multiples)]

    def cell(members: Group, multiple: int) -> str:
        found, tested = members.pooled(multiple), len(members.entries(multiple))
        fewer = f" ({tested} seed{'s' if tested > 1 else ''})" if tested < len(members.results) else ""
        return f"{found[0]:.1f}{fewer}" if found else ""

    if len(group.results) == 1:
        return [row(name, group)]
    return [
        row(f"{name}, mean of {len(group.results)} seeds", group),
        row(f"{name}, best of {len(group.results)} seeds", _best_seed(group)),
    ]


def _best_seed(group: Group) -> Group:
    """The group's seed that has most right at the longest length."""
    singles = [dataclasses.replace(group, results=(result,)) for result in group.results]
    return max(singles, key=lambda single: max((m, single.entries(m)[0]["exact_match"]) for m in single.multiples()))


_OTHERWISE = "‡ Trained otherwise than ASEntmax's row of that distribution; what differs is said below."
_SYNTHETIC_NOTES = (
    "- Our own training data have near misses among keys and values, so their rows are no comparison with the "
    "published ones (the paper's, best of 3 seeds, and an independent group's, both on the paper's data).",
    "- **Entmax, SSMax and softmax on the paper's data had the same two runs as ASEntmax**, with its learning rates, "
    "one seed each. The training carries softmax to 70% at 1024x (3% as published), and the rest of the way a sparse "
    "mapping or a length scaling is enough: a softmax query is 25 to 510 times as likely to be wrong there as one of "
    "ASEntmax's three seeds ([their errors](recipes/synthetic/findings.md#mqmtar-what-was-run)). Adaptive temperature, "
    "which works outside of training only, has softmax's weights (on our own data rounded to bfloat16), and was "
    "tested on fewer samples at its longer lengths.",
    "- **With near misses in training softmax gets there too.** On our own data softmax and SSMax had ASEntmax's three "
    "runs, with hard samples in the first one, which ASEntmax's had not, and the third begun from weights rounded to "
    "bfloat16; one seed each. Of 17,472 queries at 1024x 13 and 45 of theirs are wrong, none of ASEntmax's seed 0 "
    "([law](recipes/synthetic/law.md)). Entmax had 4.4 minutes and an earlier training (ASEntmax with it: 100.0, "
    "73.0 and 86.0): no comparison of the attentions.",
    "- Intervals, figures and what else was tried: [recipes/synthetic](recipes/synthetic/README.md); model cards: "
    "[own](model_cards/mqmtar-own.md), [paper](model_cards/mqmtar-paper.md).",
)


def synthetic(*contents: dict[str, Any]) -> str:
    """Exact match on MQMTAR by length, the best settings on each training distribution beside published rows."""
    published = json.loads((RECIPES / "synthetic" / "published.json").read_text(encoding="utf-8"))["exact_match"]
    shown = [1, 4, 16, 64, 256, 1024]
    rows: list[list[str]] = []
    notes: list[str] = []
    origins: list[str] = []
    others: list[list[str]] = []
    in_table: list[Group] = []
    under_nape = [group for group in grouped(list(contents)) if group.positions == "nape"]
    for (_, track), of_track in tables(under_nape):
        members = [group for group in of_track if group.method == "asentmax"]
        chosen = compared(of_track)
        (group,) = (one for one in chosen if one.method == "asentmax")
        runs = [result["run"] for result in group.results]
        rows.extend(_rows(group, shown))
        last = max(multiple for multiple in shown if group.pooled(multiple))
        best_seed = _best_seed(group)
        _, low, high = best_seed.pooled(last) or (0.0, 0.0, 0.0)
        each = ", ".join(f"{100 * entry['exact_match']:.1f}" for entry in group.entries(last))
        many = len(runs) > 1
        notes.append(
            f"- **Trained on {TRACKS[track]}**: {len(runs)} seed{'s' if many else ''} ({each} at {last}x; 95% interval "
            f"of the best one's {best_seed.entries(last)[0]['samples']} samples {low:.1f} to {high:.1f}), "
            f"{'on average ' if many else ''}{group.millions:.1f}M samples in "
            f"{group.minutes:.1f} minutes of one GPU{in_vain(runs)}"
            f"{_other_settings(members, group, last)}."
        )
        origins.append(_origin_of_seeds([result["evaluation"] for result in group.results]))
        in_table.extend(chosen)
        for other in chosen:
            if other is not group:
                others.extend(_rows(other, shown, "" if trained_alike(other, group) else "‡"))
    rows.extend(others)
    for method, sources in published["mqmtar"].items():
        for source, values in sources.items():
            rows.append([f"{method}, {source}", *(f"{values.get(str(multiple), '')}" for multiple in shown)])
    return "\n\n".join(
        [
            "![Exact match against length](recipes/synthetic/results/mqmtar-paper.png)",
            "Multi-query multi-token associative recall, trained on at most 64 tokens, exact match in %:",
            markdown_table(["", *(f"{64 * multiple:,} ({multiple}x)" for multiple in shown)], rows),
            *(f"† {text}" for text in caveats(in_table, "recipes/synthetic/findings.md")),
            *([_OTHERWISE] if any("‡" in name for name, *_ in others) else []),
            "\n".join([*notes, *_SYNTHETIC_NOTES]),
            *_beyond(),
            *origins,
        ]
    )


# What a block is made of: the results files that a pattern matches, and what writes it.
BLOCKS: dict[str, tuple[str, Callable[..., str]]] = {
    "quickstart": ("quickstart/results.json", quickstart),
    "pretrain": ("pretrain/results.json", pretrain),
    "benchmark": ("benchmark/attention.json", benchmark),
    "decode": ("benchmark/decode.json", decode),
    "training step": ("benchmark/training_step.json", training_step),
    "synthetic": ("synthetic/results/mqmtar-*.json", synthetic),
    "generate": ("benchmark/generate.json", generate),
}


def render(text: str) -> str:
    """README.md with every block that has results written anew."""
    for name, (pattern, write) in BLOCKS.items():
        contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECIPES.glob(pattern))]
        if not contents:
            continue
        block = write(*contents)
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        marked = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not marked.search(text):
            raise SystemExit(f"README.md has no marks {begin} and {end}")
        text = marked.sub(lambda _, new=f"{begin}\n{block}\n{end}": new, text)  # type: ignore[misc]
    return text


def main() -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if README.md is out of date")
    check = parser.parse_args().check
    before = README.read_text(encoding="utf-8")
    after = render(before)
    if before == after:
        print("README.md is up to date")
    elif check:
        sys.exit("README.md is out of date; run python recipes/readme.py")
    else:
        README.write_text(after, encoding="utf-8")
        print("README.md was written")


if __name__ == "__main__":
    main()
