"""One decoding step of attention: the kernels against softmax attention on a long cache, inside CUDA graphs.

    python -m recipes.benchmark.decode                 # needs a CUDA GPU; writes decode.json beside this file
    python -m recipes.benchmark.decode --seconds 120   # the cases come in the order of their weight
    python -m recipes.benchmark.decode --tune          # times other sizes of the kernels' programs instead

One query a sequence, bfloat16. A graph holds calls over several caches in turn, together larger than the GPU's L2
cache; times are a call's share of the graph's median replay. Kinds: random (iid normal), near-uniform (queries x 0.05,
as at initialisation), nape (random; half of the heads ALiBi with slopes 1/h), alibi (all heads), static (random, with
a mask that shows three quarters of the slots).
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_asentmax import entmax_attention
from hf_asentmax.mappings import entmax
from recipes.common import results_header, write_json

KINDS = ("random", "near-uniform", "nape", "alibi", "static")
WITH_ALIBI = ("nape", "alibi")
PEERS = ("sdpa cuDNN", "sdpa default", "sdpa flash-2", "sdpa repeated keys, mask", "flex")
ROTATED_BYTES = 400 * 2**20  # of caches that a graph goes through, several times an H100's 50 MB of L2

Step = Callable[["Inputs"], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """(heads / kv_heads) of head_dim, kv_len keys, batch sequences; kind is one of KINDS."""

    heads: int
    kv_heads: int
    head_dim: int
    kv_len: int
    batch: int
    kind: str

    @property
    def key_bytes(self) -> int:
        return 2 * self.batch * self.kv_heads * self.kv_len * self.head_dim


@dataclass(frozen=True)
class Inputs:
    """One call's tensors: query, key, value in bfloat16, a mask (batch, 1, 1, kv_len), ALiBi slopes, key norms."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    slopes: torch.Tensor | None
    bound: torch.Tensor | None


def ordered_cases(kinds: list[str], lengths: list[int], batches: list[int]) -> Iterator[Case]:
    """The grid, the cases that the targets name first, near-uniform and other kinds after the random ones."""
    grid = list(itertools.product(((32, 8, 128), (16, 16, 64)), lengths, batches))

    def weight(item: tuple[tuple[int, int, int], int, int]) -> tuple[int, int]:
        (_, kv_heads, _), kv_len, batch = item
        named = (kv_len == 131072 and batch in (1, 8)) or (kv_len == 32768) or (kv_len == 8192 and batch == 1)
        return (0 if named else 1) + (0 if kv_heads == 8 else 2), batch * kv_len

    grid.sort(key=weight)
    for kind in kinds:
        for (heads, kv_heads, head_dim), kv_len, batch in grid:
            if kind != "random" and (batch == 32 or (kv_len == 8192 and kind != "alibi")):
                continue
            yield Case(heads, kv_heads, head_dim, kv_len, batch, kind)


def make_inputs(case: Case, device: str = "cuda") -> list[Inputs]:
    """As many sets as exceed ROTATED_BYTES, at most 16."""
    torch.manual_seed(0)
    count = min(16, max(1, math.ceil(ROTATED_BYTES / (2 * case.key_bytes))))
    mask = slopes = None
    if case.kind == "static":
        mask = torch.arange(case.kv_len, device=device)[None, None, None] < case.kv_len * 3 // 4
        mask = mask.expand(case.batch, 1, 1, -1).contiguous()
    if case.kind == "alibi":
        slopes = 1.0 / torch.arange(1, case.heads + 1, device=device)
    if case.kind == "nape":
        half = 1.0 / torch.arange(1, case.heads // 2 + 1, device=device)
        slopes = torch.cat([half, torch.zeros_like(half)])
    made = []
    for _ in range(count):
        shape = (case.batch, case.kv_heads, case.kv_len, case.head_dim)
        query = torch.randn(case.batch, case.heads, 1, case.head_dim, device=device)
        query = (query * (0.05 if case.kind == "near-uniform" else 1.0)).bfloat16()
        key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
        bound = None  # as the plugin keeps it with a cache
        if slopes is not None:
            bound = torch.linalg.vector_norm(key, dim=-1, dtype=torch.float32).amax(-1)
        made.append(Inputs(query, key, value, mask, slopes, bound))
    return made


def _ours(inputs: Inputs) -> torch.Tensor:
    return entmax_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        is_causal=inputs.mask is None,
        attention_mask=inputs.mask,
        alibi_slopes=inputs.slopes,
        key_norm_bound=inputs.bound,
        backend="triton",
    )


def _sdpa(backend: SDPBackend | None) -> Step:
    def attend(inputs: Inputs) -> torch.Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(
                inputs.query, inputs.key, inputs.value, attn_mask=inputs.mask, enable_gqa=True
            )
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                inputs.query, inputs.key, inputs.value, attn_mask=inputs.mask, enable_gqa=True
            )

    return attend


def _sdpa_repeated(case: Case) -> Step:
    """As transformers calls it where a mask is given: keys and values repeated for each query head."""
    mask = torch.ones(case.batch, 1, 1, case.kv_len, dtype=torch.bool, device="cuda")

    def attend(inputs: Inputs) -> torch.Tensor:
        repeats = case.heads // case.kv_heads
        key, value = inputs.key, inputs.value
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        return F.scaled_dot_product_attention(inputs.query, key, value, attn_mask=mask)

    return attend


def _flex() -> Step:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(inputs: Inputs) -> torch.Tensor:
        return compiled(inputs.query, inputs.key, inputs.value, enable_gqa=True)

    return attend


def peer(name: str, case: Case) -> Step | None:
    """A softmax peer; None where it does not apply (peers run without ALiBi, which only favours them)."""
    if name == "sdpa repeated keys, mask":
        repeated_bytes = 2 * case.key_bytes * case.heads // case.kv_heads
        return _sdpa_repeated(case) if repeated_bytes < 40 * 2**30 and case.kind == "random" else None
    if name == "flex":
        return _flex() if case.kind == "random" else None
    if name == "sdpa flash-2":
        return _sdpa(SDPBackend.FLASH_ATTENTION) if case.kind != "static" else None
    return _sdpa(SDPBackend.CUDNN_ATTENTION if name == "sdpa cuDNN" else None)


def graph_ms(step: Step, sets: list[Inputs], budget_ms: float = 100.0) -> float:
    """A call's share of the median replay of a graph with at least 16 calls, over the sets in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for inputs in sets[:2]:
            step(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    calls = len(sets) * max(1, 16 // len(sets))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            step(sets[index % len(sets)])
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    graph.replay()
    while len(times) < 5 or (sum(times) < budget_ms and len(times) < 50):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    del graph
    return statistics.median(times) / calls


def copy_bytes_per_ms() -> float:
    """Read and written, of the best of some copies of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = math.inf
    for _ in range(20):
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end))
    return 2 * 2**30 / best


@torch.no_grad()
def first_group(inputs: Inputs) -> tuple[float, torch.Tensor]:
    """(mean support, float64 output) of the last key head's query heads in the first sequence."""
    repeats = inputs.query.shape[1] // inputs.key.shape[1]
    query, key, value = (
        inputs.query[:1, -repeats:].double(),
        inputs.key[:1, -1:].double(),
        inputs.value[:1, -1:].double(),
    )
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if inputs.mask is not None:
        scores = scores.masked_fill(~inputs.mask[:1], -math.inf)
    weights = entmax(scores, 1.5)
    return (weights > 0).sum(-1).double().mean().item(), weights @ value


def kernel_microseconds(step: Step, sets: list[Inputs]) -> dict[str, float]:
    """Mean time of each kernel by its name, outside of a graph."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for index in range(8):
            step(sets[index % len(sets)])
        torch.cuda.synchronize()
    return {
        event.key: round(event.self_device_time_total / event.count, 2)
        for event in recorded.key_averages()
        if event.self_device_time_total > 0 and "kernel" in event.key
    }


def measure_ours(case: Case, sets: list[Inputs], bandwidth: float) -> dict[str, Any]:
    """Time, error, support, and the share of the byte floor: K and the support's values at the bandwidth of a copy."""
    row: dict[str, Any] = {"method": "ours", "ms": round(graph_ms(_ours, sets), 5)}
    if case.kind not in WITH_ALIBI:
        support, expected = first_group(sets[0])
        output = _ours(sets[0])[:1, -expected.shape[1] :].double()
        row["support"] = round(support, 1)
        row["error"] = float(f"{((output - expected).norm() / expected.norm()).item():.2e}")
        read = case.key_bytes * (0.75 if case.kind == "static" else 1.0)
        read += 2 * case.batch * case.heads * case.head_dim * min(support, case.kv_len)
        row["floor_ms"] = round(read / bandwidth, 5)
        row["share_of_floor"] = round(read / bandwidth / row["ms"], 3)
    row["kernels_us"] = kernel_microseconds(_ours, sets)
    return row


def measure_peer(name: str, step: Step, sets: list[Inputs]) -> dict[str, Any]:
    """A softmax peer's time."""
    return {"method": name, "ms": round(graph_ms(step, sets), 5)}


def attempt(run: Callable[[], dict[str, Any]], name: str) -> dict[str, Any]:
    """The row of a measurement, or one that says why there is none."""
    try:
        return run()
    except (RuntimeError, torch.OutOfMemoryError) as error:
        return {"method": name, "failed": f"{type(error).__name__}: {str(error)[:120]}"}


def tune(case: Case) -> Iterator[dict[str, Any]]:
    """Times of ours with one or two sizes changed from what decode_tiles chooses."""
    from hf_asentmax.kernels import decode_launch, launching

    chosen = decode_launch.decode_tiles
    changes: list[dict[str, int]] = [{}]
    changes += [{"tiles": tiles} for tiles in (1, 2, 4, 8, 16, 32)]
    changes += [{"keys": keys, "stages": stages} for keys in (64, 128) for stages in (1, 2, 3, 4)]
    changes += [{"warps": 8}, {"warps": 2, "keys": 64}, {"warps": 8, "keys": 256, "stages": 2}]
    changes += [{"parts": parts} for parts in (1, 2, 4, 8)]
    changes += [{"output_warps": warps, "values": values} for warps, values in ((8, 64), (2, 32), (1, 16), (4, 32))]
    changes += [{"parts": 4, "output_warps": 8}, {"parts": 4, "values": 32}]
    sets = make_inputs(case)
    for change in changes:

        def changed(problem: Any, reaches: bool = False, change: dict[str, int] = change) -> decode_launch.DecodeTiles:
            return chosen(problem, reaches)._replace(**change)

        def run(change: dict[str, int] = change) -> dict[str, Any]:
            return {"change": change, "ms": round(graph_ms(_ours, sets, 30.0), 5), **kernel_microseconds(_ours, sets)}

        decode_launch.decode_tiles = changed
        launching.forget()  # the launches of the sizes before
        yield attempt(run, str(change))
    decode_launch.decode_tiles = chosen
    launching.forget()


def main() -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--tune", action="store_true", help="sizes of our kernels for the first cases, nothing else")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no new case after so long")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("decode.json"))
    arguments = parser.parse_args()

    started = time.perf_counter()
    header = {**results_header(torch.device("cuda"), [0]), "copy_tb_per_s": round(copy_bytes_per_ms() / 1e9, 3)}
    bandwidth = header["copy_tb_per_s"] * 1e9
    cases = list(ordered_cases(arguments.kinds, arguments.lengths, arguments.batches))
    results: list[dict[str, Any]] = []

    def add(case: Case, row: dict[str, Any]) -> None:
        results.append({**vars(case), **row})
        print(" ".join(f"{key}={value}" for key, value in results[-1].items()), flush=True)
        write_json(arguments.output, {**header, "results": results})

    if arguments.tune:
        for case in cases[:4]:
            for row in tune(case):
                add(case, row)
                if time.perf_counter() - started > arguments.seconds:
                    return
        return
    quick = [name for name in arguments.peers if name != "flex"]
    slow = [name for name in arguments.peers if name == "flex"]  # compiles for every shape: after all else
    for ours, names in ((True, quick), (False, slow)):
        for case in cases if ours or names else []:
            if time.perf_counter() - started > arguments.seconds:
                print("out of time")
                return
            sets = make_inputs(case)
            if ours:
                add(case, attempt(partial(measure_ours, case, sets, bandwidth), "ours"))
            for name in names:
                step = peer(name, case)
                if step is not None:
                    add(case, attempt(partial(measure_peer, name, step, sets), name))
            del sets
            torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.no_grad():
        main()
