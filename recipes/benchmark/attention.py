"""Attention alone: the kernels against softmax attention and against another entmax kernel, on one GPU.

    python -m recipes.benchmark.attention              # needs a CUDA GPU; writes attention.json beside this file
    python -m recipes.benchmark.attention --lengths 8192 --kinds random
    python -m recipes.benchmark.attention --seconds 120          # the cases come in the order of their weight
    python -m recipes.benchmark.attention_report       # the plot and the table, from the JSON

bfloat16, causal, batch x heads x length about constant (16 x 32,768). Medians of CUDA events, peers in the same run:
of calls from Python, launched without waiting in between, and of replays of a CUDA graph, where the host has no part.
host_ms is what a call keeps Python busy.
Kinds of input: random (iid normal), sharp (queries x 8), topical (runs of 256 keys share a direction, a query picks
one), nape (random; half of the heads ALiBi with slopes 1/h), near-uniform (queries x 0.05, as at initialisation), and
captured (of a trained model, by capture.py, given with --captured).
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_asentmax import entmax_attention
from hf_asentmax.mappings import entmax
from recipes.common import results_header, write_json

KINDS = ("random", "sharp", "topical", "nape", "near-uniform")
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
SHORT = ((512, 64), (256, 64), (128, 64), (64, 64), (128, 32), (64, 16))  # (length, head_dim) at batch x heads = 16K
HEADS = 16
TOKENS = 32768
# What is measured, (length, head_dim, kind): a table first, then how time grows with the length.
TABLE = (
    *((32768, 64, kind) for kind in KINDS),
    *((8192, 64, kind) for kind in KINDS if kind != "nape"),
    *((length, 128, kind) for length in (32768, 8192) for kind in ("random", "sharp", "topical", "near-uniform")),
)
CURVES = tuple((length, 64, kind) for length in LENGTHS for kind in ("topical", "nape", "near-uniform"))
METHODS = ("ours", "sdpa flash-2", "sdpa cuDNN", "flex alibi", "adasplash v2", "adasplash v1")
# Measured after the others: these compile for each length, or try many tile sizes (a minute for a case).
LAST = ("flex alibi", "adasplash v2", "adasplash v1")
ONLY_AT = {"flex alibi": (8192, 32768, 131072), "adasplash v2": (8192, 32768), "adasplash v1": (8192,)}

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def make_inputs(kind: str, batch: int, length: int, head_dim: int) -> list[torch.Tensor]:
    """[query, key, value, grad_output], each (batch, HEADS, length, head_dim) bfloat16 on the GPU."""
    torch.manual_seed(0)
    query, key, value, grad = (torch.randn(batch, HEADS, length, head_dim, device="cuda") for _ in range(4))
    if kind == "sharp":
        query = query * 8
    elif kind == "near-uniform":
        query = query * 0.05
    elif kind == "topical":
        count = max(length // 256, 1)
        topics = F.normalize(torch.randn(batch, HEADS, count, head_dim, device="cuda"), dim=-1) * math.sqrt(head_dim)
        segment = (torch.arange(length, device="cuda") // 256).clamp_max(count - 1)
        key = 0.5 * key + topics[:, :, segment]
        pick = (torch.rand(length, device="cuda") * (segment + 1)).long()
        query = (0.5 * query + topics[:, :, pick]) * 2
    return [tensor.bfloat16() for tensor in (query, key, value, grad)]


def nape_slopes() -> torch.Tensor:
    """(HEADS,) ALiBi slopes 1/h on half of the heads, 0 on the others."""
    half = 1.0 / torch.arange(1, HEADS // 2 + 1, device="cuda")
    return torch.cat([half, torch.zeros(HEADS - HEADS // 2, device="cuda")])


def _sdpa(backend: SDPBackend) -> Attention:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    return attend


def _flex_alibi(length: int, slopes: torch.Tensor) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return compiled(query, key, value, score_mod=lambda s, b, h, i, j: s + slopes[h] * (j - i), block_mask=mask)

    return attend


def methods(length: int, slopes: torch.Tensor | None, wanted: list[str]) -> Iterator[tuple[str, Attention]]:
    """The methods that are installed and can do a call; SDPA does it without the slopes, as the least it could take."""
    all_methods: dict[str, Callable[[], Attention]] = {
        "ours": lambda: lambda q, k, v: entmax_attention(q, k, v, alibi_slopes=slopes, backend="triton"),
        "sdpa flash-2": lambda: _sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa cuDNN": lambda: _sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    if slopes is not None:
        all_methods["flex alibi"] = lambda: _flex_alibi(length, slopes)
    try:
        import adasplash
    except ImportError:
        pass
    else:
        if slopes is None:
            all_methods["adasplash v2"] = lambda: lambda q, k, v: adasplash.adasplash_v2(q, k, v)
            all_methods["adasplash v1"] = lambda: (
                lambda q, k, v: adasplash.adasplash_v1(q, k, v, alpha=1.5, is_causal=True)
            )
    for name, make in all_methods.items():
        if name in wanted:
            yield name, make()


def median_ms(run: Callable[[], Any], budget_ms: float = 120.0) -> float:
    """Median time of a call on the GPU, over about `budget_ms`, at least 5 calls, launched without waiting between."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    run()
    events[0].record()
    run()
    events[1].record()
    torch.cuda.synchronize()
    calls = min(50, max(5, int(budget_ms / max(events[0].elapsed_time(events[1]), 1e-3))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in itertools.pairwise(marks))


def host_ms(run: Callable[[], Any], calls: int = 8) -> float:
    """How long Python takes to launch a call, when nothing makes it wait."""
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def graph_ms(run: Callable[[], Any]) -> float | None:
    """Median time of a replay of the call in a CUDA graph; None where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        print(f"no CUDA graph: {str(error)[:100]}")
        return None
    return median_ms(graph.replay)


@torch.no_grad()
def sampled_rows(inputs: list[torch.Tensor], slopes: torch.Tensor | None, rows: int = 48) -> dict[str, Any]:
    """Of evenly spaced rows of the first and the last head: the float64 output, and the mean number of weights."""
    heads = [0, inputs[0].shape[1] - 1]
    query, key, value = (tensor[:1, heads].double() for tensor in inputs[:3])
    slopes = None if slopes is None else slopes[heads].double()
    length = query.shape[2]
    chosen = torch.linspace(0, length - 1, rows, device="cuda").long()
    outputs, support = [], 0.0
    for row in chosen.tolist():
        seen = slice(0, row + 1)
        keys = key[:, :, seen]
        outputs.append(
            entmax_attention(query[:, :, row : row + 1], keys, value[:, :, seen], alibi_slopes=slopes, backend="eager")
        )
        scores = (query[:, :, row : row + 1] @ keys.transpose(-1, -2))[:, :, 0] / math.sqrt(query.shape[-1])
        if slopes is not None:
            scores -= slopes[:, None] * torch.arange(row, -1, -1, device="cuda")
        support += (entmax(scores, 1.5) > 0).sum(-1).double().mean().item()
    return {"rows": chosen, "heads": heads, "output": torch.cat(outputs, 2), "support": round(support / rows, 1)}


def measure(name: str, attend: Attention, inputs: list[torch.Tensor], truth: dict[str, Any]) -> dict[str, Any]:
    """Times, memory and, for entmax, error of one method."""
    *tensors, grad = inputs
    with torch.no_grad():
        forward = median_ms(lambda: attend(*tensors))
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def both() -> None:
        torch.autograd.grad(attend(*leaves), leaves, grad)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    torch.cuda.synchronize()
    memory = torch.cuda.max_memory_allocated() - before
    result: dict[str, Any] = {
        "method": name,
        "forward_ms": round(forward, 4),
        "forward_backward_ms": round(median_ms(both), 4),
        "graph_ms": None if (replay := graph_ms(both)) is None else round(replay, 4),
        "host_ms": round(host_ms(both), 4),
        "peak_mib": round(memory / 2**20, 1),
    }
    if name == "ours" or name.startswith("adasplash"):
        with torch.no_grad():
            output = attend(*tensors)[:1, truth["heads"]][:, :, truth["rows"]].double()
        result["error"] = float(f"{((output - truth['output']).norm() / truth['output'].norm()).item():.2e}")
    return result


Cases = Iterator[tuple[str, list[torch.Tensor], torch.Tensor | None]]


def _of_a_kind(table: Iterable[tuple[int, int, str]], arguments: argparse.Namespace) -> Cases:
    for length, head_dim, kind in table:
        if length in arguments.lengths and head_dim in arguments.head_dims and kind in arguments.kinds:
            slopes = nape_slopes() if kind == "nape" else None
            yield kind, make_inputs(kind, max(1, TOKENS // length), length, head_dim), slopes


def _captured(path: Path) -> tuple[str, list[torch.Tensor], torch.Tensor | None]:
    tensors = torch.load(path)
    query, key, value = (tensors[name].cuda().bfloat16() for name in ("query", "key", "value"))
    slopes = tensors["alibi_slopes"]
    inputs = [query, key, value, torch.randn_like(query)]
    return f"captured {path.stem}", inputs, None if slopes is None else slopes.cuda()


def _single_cases(arguments: argparse.Namespace) -> Cases:
    """(kind, inputs, slopes)"""
    yield from _of_a_kind(TABLE, arguments)
    yield from map(_captured, arguments.captured)
    for length, head_dim in SHORT if arguments.short else ():
        yield "random, many rows", make_inputs("random", 16384 // HEADS, length, head_dim), None


def _curves(arguments: argparse.Namespace) -> Cases:
    yield from _of_a_kind((case for case in CURVES if case not in TABLE), arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--head-dims", type=int, nargs="*", default=(64, 128))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--short", action=argparse.BooleanOptionalAction, default=True, help="also many short rows")
    parser.add_argument("--captured", type=Path, nargs="*", default=(), help="tensors of a trained model")
    parser.add_argument(
        "--methods",
        nargs="*",
        choices=METHODS,
        default=METHODS,
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no new case after so long")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("attention.json"))
    arguments = parser.parse_args()

    results: list[dict[str, Any]] = []
    started = time.perf_counter()
    header = results_header(torch.device("cuda"), [0])
    first = [name for name in arguments.methods if name not in LAST]
    last = [name for name in arguments.methods if name in LAST]
    passes = [(cases, wanted) for cases in (_single_cases, _curves) for wanted in (first, last) if wanted]
    for wanted, (kind, inputs, slopes) in ((wanted, case) for cases, wanted in passes for case in cases(arguments)):
        if time.perf_counter() - started > arguments.seconds:
            print("out of time")
            break
        batch, heads, length, head_dim = inputs[0].shape
        wanted = [name for name in wanted if length in ONLY_AT.get(name, (length,))]
        if not wanted:
            continue
        truth = sampled_rows(inputs, slopes)
        case = {"kind": kind, "length": length, "head_dim": head_dim, "batch": batch, "heads": heads}
        case["support"] = truth["support"]
        for name, attend in methods(length, slopes, wanted):
            try:
                row = measure(name, attend, inputs, truth)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                row = {"method": name, "failed": f"{type(error).__name__}: {str(error)[:120]}"}
            results.append(case | row)
            print(" ".join(f"{key}={value}" for key, value in results[-1].items()), flush=True)
            write_json(arguments.output, {**header, "results": results})
        del inputs, truth
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
