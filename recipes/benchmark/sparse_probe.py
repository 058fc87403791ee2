"""Times the passes of the sparse regime one by one, next to cuDNN softmax on the same card, and checks them.

    python recipes/benchmark/sparse_probe.py --cases 32768:64:random 32768:64:topical --out probe.json
    python recipes/benchmark/sparse_probe.py --cases 32768:64:random --sweep

Run from the repository's root on a machine with a GPU. A case is N:head_dim:kind, kind one of random, sharp, topical,
nape, uniform; batch 1, 16 heads, causal, bfloat16. `--sweep` tries tile sizes instead of the defaults, each variant in
SWEEP, and prints each kernel's time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_asentmax.backends.triton.common.problem import Problem
from hf_asentmax.backends.triton.common.row_ranges import RowRanges
from hf_asentmax.backends.triton.dense.launch import largest_key_norms
from hf_asentmax.backends.triton.lists.launch import (
    SparseTiles,
    column_ends,
    sparse_backward,
    sparse_forward,
    sparse_tiles,
)
from hf_asentmax.mappings import entmax

HEADS = 16
NO_RANGES = RowRanges(None, None, None, None, None)

# Variants of the passes over the scores and of those on the list. Each is timed kernel by kernel.
SWEEP: list[dict[str, Any]] = [
    {},
    {"grad_rows": 1, "column_keys": 1},
    {"grad_rows": 8, "column_keys": 8},
    {"grad_chunk": 8, "column_chunk": 8},
    {"grad_chunk": 32, "column_chunk": 32},
    {"list_registers": 96, "grad_registers": 80},
]


def inputs(kind: str, length: int, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """(query, key, value, grad), each (1, HEADS, length, head_dim), by the recipe of the issue's table."""
    torch.manual_seed(0)
    shape = (1, HEADS, length, head_dim)
    query, key, value, grad = (torch.randn(shape, device="cuda") for _ in range(4))
    if kind == "sharp":
        query *= 8
    elif kind == "uniform":
        query *= 0.05
    elif kind == "topical":
        topics = F.normalize(torch.randn(1, HEADS, length // 256, head_dim, device="cuda"), dim=-1) * head_dim**0.5
        chosen = torch.randint(0, length // 256, (1, HEADS, length), device="cuda")
        key += topics.repeat_interleave(256, 2)
        query += 2.0 * topics.gather(2, chosen[..., None].expand(shape))
    return tuple(tensor.to(dtype) for tensor in (query, key, value, grad))


def slopes_for(kind: str) -> torch.Tensor | None:
    """NAPE: half of the heads without positions, half with ALiBi slopes 1/h."""
    if kind != "nape":
        return None
    half = HEADS // 2
    return torch.cat([torch.zeros(half), 1.0 / torch.arange(1, half + 1)]).cuda()


def kernel_times(function: Any, repeats: int = 5) -> dict[str, float]:
    """Milliseconds a call on the device, kernel by kernel (a kernel launched several times counts in sum)."""
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.self_device_time_total > 0:
            times[event.key.removesuffix("_kernel")[:32]] = event.self_device_time_total / repeats / 1000.0
    return {name: round(time, 3) for name, time in sorted(times.items(), key=lambda item: -item[1]) if time > 0.004}


def median_time(function: Any, repeats: int = 15) -> float:
    """Milliseconds a call, median, by events."""
    for _ in range(2):
        function()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return round(statistics.median(times), 3)


class Case:
    """One case's tensors, and the two passes over them."""

    def __init__(self, kind: str, length: int, head_dim: int, tiles: SparseTiles | None = None) -> None:
        self.query, self.key, self.value, self.grad = inputs(kind, length, head_dim)
        self.problem = Problem(
            self.query, self.key, self.value, 1.5, head_dim**-0.5, True, None, None, slopes_for(kind), NO_RANGES
        )
        self.tiles = tiles or sparse_tiles(torch.bfloat16, head_dim)
        self.output = torch.empty_like(self.query)
        self.tau = torch.empty(self.query.shape[:3], device="cuda")
        self.mean_value, self.query_grad, self.key_grad, self.value_grad = (
            torch.empty_like(tensor) for tensor in (self.query, self.query, self.key, self.value)
        )

    def forward(self) -> None:
        norms = largest_key_norms(self.problem)
        self.lists = sparse_forward(self.problem, self.output, self.tau, self.mean_value, norms, self.tiles)

    def backward(self, deterministic: bool = False) -> None:
        sparse_backward(
            self.problem, self.tau, self.mean_value, self.lists, self.grad, self.query_grad, self.key_grad,
            self.value_grad, column_ends(self.lists.column_counts), deterministic=deterministic, tiles=self.tiles,
        )  # fmt: skip

    def both(self) -> None:
        self.forward()
        self.backward()


def sampled_error(case: Case, rows: int = 64) -> tuple[float, float]:
    """(relative Frobenius error of the output against float64 on sampled rows, largest list minus support there)."""
    length = case.query.shape[2]
    row = torch.randint(0, length, (rows,), device="cuda").sort().values
    scores = case.query[0, :, row].double() @ case.key[0].double().transpose(1, 2) * case.problem.scale
    column = torch.arange(length, device="cuda")
    if case.problem.slopes is not None:
        scores -= case.problem.slopes.double()[:, None, None] * (row[:, None] - column).abs()
    weights = entmax(scores.masked_fill(column > row[:, None], -torch.inf), 1.5)
    exact = weights @ case.value[0].double()
    error = (case.output[0, :, row].double() - exact).norm() / exact.norm()
    surplus = case.lists.counts.reshape(HEADS, length)[:, row] - (weights > 0).sum(-1)
    return error.item(), surplus.max().item()


def gradient_errors(kind: str, length: int, head_dim: int) -> list[float]:
    """Relative errors of output, dq, dk, dv against float64 in full, at a length that allows it."""
    from hf_asentmax import entmax_attention

    case = Case(kind, length, head_dim)
    case.both()
    exact = [tensor.double().requires_grad_() for tensor in (case.query, case.key, case.value)]
    slopes = None if case.problem.slopes is None else case.problem.slopes.double()
    output = entmax_attention(*exact, alibi_slopes=slopes, backend="eager")
    ours = (case.output, case.query_grad, case.key_grad, case.value_grad)
    theirs = (output, *torch.autograd.grad(output, exact, case.grad.double()))
    return [((mine.double() - right).norm() / right.norm()).item() for mine, right in zip(ours, theirs, strict=True)]


def softmax_times(case: Case, backend: SDPBackend) -> tuple[float, float]:
    """(forward, forward and backward) milliseconds of PyTorch's SDPA, without ALiBi."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in (case.query, case.key, case.value)]

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(tensors[0], tensors[1], tensors[2], is_causal=True)

    with sdpa_kernel(backend):
        return median_time(forward), median_time(lambda: torch.autograd.grad(forward(), tensors, case.grad))


def measure(spec: str) -> dict[str, Any]:
    """One case with the default tiles: times, error, list lengths, and memory."""
    length, head_dim, kind = spec.split(":")
    case = Case(kind, int(length), int(head_dim))
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    case.both()
    extra = torch.cuda.max_memory_allocated() - base
    error, surplus = sampled_error(case)
    result = {
        "case": spec,
        "forward": median_time(case.forward),
        "both": median_time(case.both),
        "deterministic_backward": median_time(lambda: case.backward(True)),
        "kernels": kernel_times(case.both),
        "listed": round(case.lists.counts.float().mean().item(), 2),
        "longest": case.lists.counts.max().item(),
        "overflowed": round(case.lists.overflow.float().mean().item(), 4),
        "error": error,
        "surplus": surplus,
        "extra_MB": extra >> 20,
        "cudnn": softmax_times(case, SDPBackend.CUDNN_ATTENTION),
    }
    result["flash"] = softmax_times(case, SDPBackend.FLASH_ATTENTION) if int(length) <= 32768 else None
    return result


def compile_variant(arguments: tuple[dict[str, Any], str]) -> None:
    """Fills Triton's cache: variants compile in processes side by side."""
    variant, spec = arguments
    _, head_dim, kind = spec.split(":")
    case = Case(kind, 2048, int(head_dim), sparse_tiles(torch.bfloat16, int(head_dim))._replace(**variant))
    case.both()
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=["32768:64:random"])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--check", nargs="*", default=[], help="cases to check in full against float64")
    parser.add_argument("--out", type=Path, default=Path("sparse_probe.json"))
    options = parser.parse_args()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cases": []}
    print(results["device"], flush=True)
    variants = SWEEP if options.sweep else [{}]
    with multiprocessing.get_context("spawn").Pool(12) as pool:
        pool.map(compile_variant, [(variant, spec) for variant in variants for spec in options.cases], chunksize=1)
    print("compiled", flush=True)
    for spec in options.check:
        length, head_dim, kind = spec.split(":")
        errors = gradient_errors(kind, int(length), int(head_dim))
        print("check", spec, [f"{error:.1e}" for error in errors], flush=True)
    for spec in options.cases:
        if options.sweep:
            length, head_dim, kind = spec.split(":")
            for variant in variants:
                tiles = sparse_tiles(torch.bfloat16, int(head_dim))._replace(**variant)
                result = {
                    "case": spec,
                    "variant": variant,
                    "kernels": kernel_times(Case(kind, int(length), int(head_dim), tiles).both, 3),
                }
                results["cases"].append(result)
                print(json.dumps(result), flush=True)
        else:
            results["cases"].append(measure(spec))
            print(json.dumps(results["cases"][-1]), flush=True)
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
