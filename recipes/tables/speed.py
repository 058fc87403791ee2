"""The sections on speed: attention alone, decoding, generation, training steps."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipes.benchmark.results import ATTENTION_CASE, DECODE_CASE, PEERS, Case, Row, by_case, times_faster
from recipes.common import REPOSITORY, markdown_table, read_json
from recipes.tables.origins import origin_of_several

__all__ = ["decoding", "generation", "overview", "training", "training_step"]

BENCHMARK = REPOSITORY / "recipes" / "benchmark"
# (kind, length, head_dim) of the rows of a table, in their order
TRAINING_CASES = (
    ("nape", 131072, 64),
    ("topical", 131072, 64),
    ("nape", 65536, 64),
    ("nape", 32768, 64),
    ("topical", 32768, 64),
    ("random", 32768, 64),
    ("sharp", 32768, 64),
    ("near-uniform", 32768, 64),
    ("topical", 32768, 128),
    ("near-uniform", 32768, 128),
    ("captured mqmtar", 30610, 32),
    ("nape", 8192, 64),
    ("topical", 8192, 64),
    ("random", 8192, 64),
    ("near-uniform", 8192, 64),
    ("topical", 8192, 128),
    ("nape", 2048, 64),
    ("random, many rows", 512, 64),
    ("random, many rows", 128, 64),
    ("random, many rows", 64, 16),
)
OVERVIEW_CASES = (
    ("topical", 8192, 64),
    ("topical", 32768, 64),
    ("nape", 32768, 64),
    ("nape", 131072, 64),
    ("near-uniform", 32768, 64),
)
OVERVIEW_DECODING = ("nape", 32, 8, 128, 131072, 1)
KINDS = {
    "topical": "topical",
    "nape": "NAPE",
    "near-uniform": "near-uniform",
    "captured mqmtar": "a trained model's last layer (MQMTAR)",
    "random, many rows": "random, short",
    "alibi": "ALiBi in all heads",
    "static": "random, static cache",
}
OVERVIEW_PEERS = ("sdpa cuDNN", "sdpa flash-2", "flex alibi")
KINDS_SENTENCE = (
    "Random inputs are independent normal numbers. Sharp ones have queries 8 times as large. In topical ones, runs of "
    "256 keys share a direction. NAPE gives half of the heads ALiBi. Near-uniform inputs have queries 20 times "
    "smaller, as in an untrained model."
)


def _kind(name: str) -> str:
    """A kind of input as tables write it."""
    return KINDS.get(name, name)


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _row_commits(content: dict[str, Any], rows: Iterable[Row]) -> list[str]:
    """The commits of rows of attention.json, which holds several runs: a row names its own if it is not the file's."""
    return [row.get("commit") or content["commit"] for row in rows]


def _decode_commit(content: dict[str, Any], kind: str) -> str:
    """The commit of one kind's rows in decode.json, whose header names them as `COMMIT (KIND and KIND), COMMIT ...`."""
    found = re.search(rf"([0-9a-f]{{7,40}}) \([^)]*\b{kind}\b", content["commit"])
    return found[1] if found else content["commit"]


def _attention_runs(content: dict[str, Any], cases: tuple[Case, ...]) -> dict[Case, list[dict[str, Row]]]:
    """For each case, (kind, length, head_dim), the rows of every run that measured ours.

    Raises:
        ValueError: a case has no such run.
    """
    runs: dict[Case, list[dict[str, Row]]] = {case: [] for case in cases}
    for case, methods in by_case(content["results"], ATTENTION_CASE).items():
        if "ours" in methods and case[:3] in runs:
            runs[case[:3]].append(methods)
    missing = [str(case) for case in cases if not runs[case]]
    if missing:
        raise ValueError(
            f"attention.json has no time of ours for (kind, length, head_dim) {', '.join(missing)}: measure them with "
            "python -m recipes.benchmark.attention, or take them out of recipes/tables/speed.py"
        )
    return runs


def _faster_in_a_run(runs: list[dict[str, Row]], peer: str, entry: str) -> float | None:
    """The peer's time over ours in the run that measured the peer."""
    run = next((run for run in runs if peer in run), None)
    return None if run is None else times_faster(run["ours"], run[peer], entry)


def overview(folder: Path = BENCHMARK) -> str:
    """The README's table: training at several lengths, the bad case, and a decoding step."""
    attention, decode = read_json(folder / "attention.json"), read_json(folder / "decode.json")
    runs = _attention_runs(attention, OVERVIEW_CASES)
    rows = []
    for case in OVERVIEW_CASES:
        faster = [_times(_faster_in_a_run(runs[case], peer, "graph_ms")) for peer in OVERVIEW_PEERS]
        ours = runs[case][0]["ours"]["graph_ms"]
        rows.append([f"training, {case[1]:,} tokens, {_kind(case[0])}", f"{ours:.2f}", *faster])
    step = by_case(decode["results"], DECODE_CASE)[OVERVIEW_DECODING]
    faster = [_times(times_faster(step["ours"], step[peer], "ms")) if peer in step else "-" for peer in OVERVIEW_PEERS]
    name = f"decoding, {OVERVIEW_DECODING[4]:,} keys, {_kind(OVERVIEW_DECODING[0])}"
    rows.append([name, f"{step['ours']['ms']:.3f}", *faster])
    columns = ["", "ours, ms", *(f"times faster than {PEERS[peer]}" for peer in OVERVIEW_PEERS)]
    headers = [{**attention, "commit": ""}, {**decode, "commit": _decode_commit(decode, OVERVIEW_DECODING[0])}]
    row_commits = _row_commits(attention, (runs[case][0]["ours"] for case in OVERVIEW_CASES))
    return "\n\n".join(
        [
            markdown_table(columns, rows),
            "Topical: runs of 256 keys share a direction. Near-uniform: the scores of an untrained model. "
            + origin_of_several(headers, "recipes/benchmark", row_commits),
        ]
    )


def training(folder: Path = BENCHMARK) -> str:
    """Attention alone, forward and backward, beside its peers."""
    content = read_json(folder / "attention.json")
    runs = _attention_runs(content, TRAINING_CASES)
    peers = ("sdpa cuDNN", "sdpa flash-2", "flex alibi", "adasplash v2")
    rows = []
    for case in TRAINING_CASES:
        kind, length, head_dim = case
        ours = runs[case][0]["ours"]
        rows.append(
            [
                _kind(kind),
                f"{length:,}",
                str(head_dim),
                f"{ours['batch'] * ours['heads']:,}",
                f"{ours['support']:,.0f}",
                f"{ours['graph_ms']:.2f}",
                *(_times(_faster_in_a_run(runs[case], peer, "graph_ms")) for peer in peers),
                _times(_faster_in_a_run(runs[case], "sdpa cuDNN", "forward_backward_ms")),
            ]
        )
    columns = ["input", "tokens", "head_dim", "batch x heads", "keys with a weight", "ours, ms"]
    columns += [*(f"faster than {PEERS[peer]}" for peer in peers), "than cuDNN softmax, called from Python"]
    row_commits = _row_commits(content, (row for case in TRAINING_CASES for run in runs[case] for row in run.values()))
    return "\n\n".join(
        [
            "Milliseconds of forward and backward together, bfloat16, causal, as replays of a CUDA graph. The last "
            f"column is without a graph, so that the time of Python counts too. {KINDS_SENTENCE}",
            markdown_table(columns, rows),
            origin_of_several([{**content, "commit": ""}], "recipes/benchmark/attention.json", row_commits)
            + " That file has more cases, forward passes alone, errors and memory.",
        ]
    )


def decoding(folder: Path = BENCHMARK) -> str:
    """One decoding step beside its peers."""
    content = read_json(folder / "decode.json")
    peers = ("sdpa cuDNN", "sdpa flash-2", "sdpa repeated keys, mask", "flex")
    rows: list[list[str]] = []
    for (kind, heads, kv_heads, head_dim, kv_len, batch), methods in by_case(content["results"], DECODE_CASE).items():
        if (heads, kv_heads, head_dim) != (32, 8, 128):
            continue
        ours = methods["ours"]
        faster = [_times(times_faster(ours, methods[peer], "ms")) if peer in methods else "-" for peer in peers]
        rows.append([_kind(kind), f"{kv_len:,}", str(batch), f"{1e3 * ours['ms']:,.0f}", *faster])
    columns = ["input", "keys", "batch", "ours, us", *(f"faster than {PEERS[peer]}" for peer in peers)]
    return "\n\n".join(
        [
            "Microseconds of one step inside a CUDA graph, bfloat16, 32 query heads and 8 key heads of 128. None of "
            "the peers has ALiBi. SDPA with a mask is what transformers runs on a static cache: it repeats the keys "
            "for each query head.",
            markdown_table(columns, rows),
            origin_of_several([content], "recipes/benchmark/decode.json")
            + " That file also has 16 query heads and 16 key heads of 64, errors, and the times of single kernels.",
        ]
    )


def _model(row: Row) -> str:
    """The method of a whole model, as people write it: softmax + RoPE (SDPA)."""
    name: str = row["method"]
    return name.replace(", ", " + ").replace("(sdpa)", "(SDPA)")


def _scores(row: Row) -> str:
    return "untrained" if row["sharpen"] == 1 else f"queries x {row['sharpen']:g}"


def generation(folder: Path = BENCHMARK) -> str:
    """`generate` beside the same model on SDPA."""
    content = read_json(folder / "generate.json")
    rows = [
        [
            row["size"],
            _scores(row),
            _model(row),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['times_faster_than_sdpa']:.2f}x",
            "-" if row["gpu_ms"] is None else f"{row['gpu_ms']:.2f}",
            f"{row['prompt_ms']:.0f}",
        ]
        for row in content["rows"]
    ]
    (context,) = {row["context"] for row in content["rows"]}
    columns = ["model size", "scores", "attention", "tokens a second", "faster than softmax + RoPE (SDPA)"]
    columns += ["GPU time a token, ms", "time to the first token, ms"]
    return "\n\n".join(
        [
            f"One sequence with a prompt of {context:,} tokens, static cache, steps compiled into CUDA graphs by "
            "transformers. Models are untrained; queries x 16 makes supports about as small as in a trained model.",
            markdown_table(columns, rows),
            origin_of_several([content], "recipes/benchmark/generate.json"),
        ]
    )


def training_step(folder: Path = BENCHMARK) -> str:
    """A whole training step beside the same model on SDPA."""
    content = read_json(folder / "training_step.json")
    lines: dict[tuple[int, str, str], dict[float, Row]] = {}
    for row in content["rows"]:
        lines.setdefault((row["length"], row["compiled"], _model(row)), {})[row["sharpen"]] = row
    compiled_names = {"layers": "layers", "model": "whole model", "graphs": "whole model, CUDA graphs"}
    rows = []
    for (length, compiled, name), by_factor in lines.items():
        cells = [f"{length:,}", compiled_names[compiled], name]
        for factor in (16.0, 1.0):
            row = by_factor[factor]
            cells += [f"{row['tokens_per_second']:,}", f"{row['times_faster_than_sdpa']:.2f}x"]
        rows.append([*cells, f"{by_factor[16.0]['peak_gib']:.1f}"])
    columns = ["tokens", "compiled", "attention", "tokens a second, queries x 16", "faster than softmax + RoPE (SDPA)"]
    columns += ["tokens a second, untrained", "faster than softmax + RoPE (SDPA)", "peak GiB"]
    return "\n\n".join(
        [
            "A 124M Llama at batch 1. Queries x 16 makes supports about as small as in a trained model; without it the "
            "scores are those of an untrained model.",
            markdown_table(columns, rows),
            origin_of_several([content], "recipes/benchmark/training_step.json"),
        ]
    )
