"""Times attention alone, forward and backward: the Triton kernels beside softmax attention and AdaSplash, on one GPU.

    python -m recipes.benchmark.attention                      needs a CUDA GPU; writes attention.json beside this file
    python -m recipes.benchmark.attention --lengths 8192 --kinds random
    python -m recipes.benchmark.attention --seconds 120        begins no case after so long; important cases come first
    python -m recipes.benchmark.figure                         draws attention.png from the JSON

All inputs are bfloat16 and causal (inputs.py describes their kinds), and batch x heads x length is 16 x 32,768 up to
that length. Times are medians:

    forward_ms, forward_backward_ms   of calls from Python, which do not wait for the GPU
    graph_ms                          of replays of a CUDA graph of both passes, which need no Python
    host_ms                           that Python takes to launch both passes

SDPA and AdaSplash run without ALiBi, which is the least work that they could have. FlexAttention has the same ALiBi.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from hf_asentmax import entmax_attention
from hf_asentmax.mappings import entmax
from recipes.benchmark import timing
from recipes.benchmark.inputs import alibi_slopes, training_inputs
from recipes.common import results_header, write_json

KINDS = ("random", "sharp", "topical", "nape", "near-uniform")
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
HEADS = 16
TOKENS = 32768
SHORT = ((512, 64), (256, 64), (128, 64), (64, 64), (128, 32), (64, 16))  # (length, head_dim) at batch x heads = 16,384
# (length, head_dim, kind): the cases of a table, and those that show how the time grows with the length
TABLE = (
    *((32768, 64, kind) for kind in KINDS),
    *((8192, 64, kind) for kind in KINDS if kind != "nape"),
    *((length, 128, kind) for length in (32768, 8192) for kind in ("random", "sharp", "topical", "near-uniform")),
)
GROWTH = tuple((length, 64, kind) for length in LENGTHS for kind in ("topical", "nape", "near-uniform"))
METHODS = ("ours", "sdpa flash-2", "sdpa cuDNN", "flex alibi", "adasplash v2", "adasplash v1")
# Measured last, and only at these lengths: FlexAttention compiles for each length, and AdaSplash tries many tile sizes.
ONLY_AT = {"flex alibi": (8192, 32768, 131072), "adasplash v2": (8192, 32768), "adasplash v1": (8192,)}

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Inputs of one kind and shape, or those in a file of capture.py."""

    kind: str
    length: int
    head_dim: int
    batch: int
    file: Path | None = None

    def make(self, device: str = "cuda") -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """([query, key, value, gradient of the output], ALiBi slopes or None)."""
        if self.file is None:
            inputs = training_inputs(self.kind, self.batch, HEADS, self.length, self.head_dim, device)
            return inputs, alibi_slopes(self.kind, HEADS, device)
        tensors = torch.load(self.file)
        query, key, value = (tensors[name].to(device).bfloat16() for name in ("query", "key", "value"))
        slopes = tensors["alibi_slopes"]
        return [query, key, value, torch.randn_like(query)], None if slopes is None else slopes.to(device)


def table_cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """The cases of the tables: those of TABLE, captured tensors, many short rows."""
    yield from _chosen(TABLE, arguments)
    for path in arguments.captured:
        batch, _, length, head_dim = torch.load(path)["query"].shape
        yield Case(f"captured {path.stem}", length, head_dim, batch, path)
    for length, head_dim in SHORT if arguments.short else ():
        yield Case("random, many rows", length, head_dim, 16384 // HEADS)


def growth_cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """The cases that only the figure needs."""
    yield from _chosen([case for case in GROWTH if case not in TABLE], arguments)


def _chosen(cases: Any, arguments: argparse.Namespace) -> Iterator[Case]:
    for length, head_dim, kind in cases:
        if length in arguments.lengths and head_dim in arguments.head_dims and kind in arguments.kinds:
            yield Case(kind, length, head_dim, max(1, TOKENS // length))


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


def methods(length: int, slopes: torch.Tensor | None, backend: str = "triton") -> dict[str, Callable[[], Attention]]:
    """What makes each of the methods that are installed and can do the call."""
    made: dict[str, Callable[[], Attention]] = {
        "ours": lambda: lambda q, k, v: entmax_attention(q, k, v, alibi_slopes=slopes, backend=backend),
        "sdpa flash-2": lambda: _sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa cuDNN": lambda: _sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    if slopes is not None:
        return {**made, "flex alibi": lambda: _flex_alibi(length, slopes)}
    try:
        import adasplash
    except ImportError:
        return made
    made["adasplash v2"] = lambda: lambda q, k, v: adasplash.adasplash_v2(q, k, v)
    made["adasplash v1"] = lambda: lambda q, k, v: adasplash.adasplash_v1(q, k, v, alpha=1.5, is_causal=True)
    return made


@torch.no_grad()
def sampled_rows(inputs: list[torch.Tensor], slopes: torch.Tensor | None, rows: int = 48) -> dict[str, Any]:
    """What evenly spaced queries of the first and the last head should give.

    Returns:
        `rows` and `heads`: the queries; `output`: their output in float64; `support`: how many keys have a weight, on
        average.
    """
    heads = [0, inputs[0].shape[1] - 1]
    query, key, value = (tensor[:1, heads].double() for tensor in inputs[:3])
    slopes = None if slopes is None else slopes[heads].double()
    length = query.shape[2]
    chosen = torch.linspace(0, length - 1, rows, device=query.device).long()
    outputs, support = [], 0.0
    for row in chosen.tolist():
        seen = slice(0, row + 1)
        one, keys = query[:, :, row : row + 1], key[:, :, seen]
        outputs.append(entmax_attention(one, keys, value[:, :, seen], alibi_slopes=slopes, backend="eager"))
        scores = (one @ keys.transpose(-1, -2))[:, :, 0] / math.sqrt(query.shape[-1])
        if slopes is not None:
            scores -= slopes[:, None] * torch.arange(row, -1, -1, device=query.device)
        support += (entmax(scores, 1.5) > 0).sum(-1).double().mean().item()
    return {"rows": chosen, "heads": heads, "output": torch.cat(outputs, 2), "support": round(support / rows, 1)}


def measure(name: str, attend: Attention, inputs: list[torch.Tensor], truth: dict[str, Any]) -> dict[str, Any]:
    """Times and memory of one method, and the error of entmax: ||output - truth|| / ||truth|| on the sampled rows."""
    *tensors, grad = inputs
    with torch.no_grad():
        forward = timing.median_ms(lambda: attend(*tensors))
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def both() -> None:
        torch.autograd.grad(attend(*leaves), leaves, grad)

    memory = timing.peak_mib(both)
    result: dict[str, Any] = {
        "method": name,
        "forward_ms": round(forward, 4),
        "forward_backward_ms": round(timing.median_ms(both), 4),
        "graph_ms": None if (replay := timing.graph_ms(both)) is None else round(replay, 4),
        "host_ms": round(timing.host_ms(both), 4),
        "peak_mib": round(memory, 1),
    }
    if name == "ours" or name.startswith("adasplash"):
        with torch.no_grad():
            output = attend(*tensors)[:1, truth["heads"]][:, :, truth["rows"]].double()
        result["error"] = float(f"{((output - truth['output']).norm() / truth['output'].norm()).item():.2e}")
    return result


def run_case(case: Case, wanted: list[str], device: str = "cuda", backend: str = "triton") -> Iterator[dict[str, Any]]:
    """A row of results for each method. The row of a method that fails says why."""
    inputs, slopes = case.make(device)
    truth = sampled_rows(inputs, slopes)
    shape = {"length": case.length, "head_dim": case.head_dim, "batch": case.batch, "heads": inputs[0].shape[1]}
    for name, make in methods(case.length, slopes, backend).items():
        if name not in wanted:
            continue
        try:
            row = measure(name, make(), inputs, truth)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row = {"method": name, "failed": f"{type(error).__name__}: {str(error)[:120]}"}
        yield {"kind": case.kind, **shape, "support": truth["support"], **row}


def jobs(arguments: argparse.Namespace) -> list[tuple[Case, list[str]]]:
    """Cases with the methods to run on them: the table before the growth, and in each the quick methods first."""
    quick = [name for name in arguments.methods if name not in ONLY_AT]
    slow = [name for name in arguments.methods if name in ONLY_AT]
    found = []
    for cases in (list(table_cases(arguments)), list(growth_cases(arguments))):
        for names in (quick, slow):
            for case in cases:
                here = [name for name in names if case.length in ONLY_AT.get(name, (case.length,))]
                found += [(case, here)] if here else []
    return found


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--head-dims", type=int, nargs="*", default=(64, 128))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--short", action=argparse.BooleanOptionalAction, default=True, help="also many short rows")
    parser.add_argument("--captured", type=Path, nargs="*", default=(), help="files of capture.py")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after so long")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("attention.json"))
    parsed = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, found none: run this where there is one")
    return parsed


def main(command: list[str] | None = None) -> None:
    """Runs the benchmark; see the module's description."""
    arguments = parse_arguments(command)
    header = results_header(torch.device("cuda"), [0])
    results: list[dict[str, Any]] = []
    started = time.perf_counter()
    for case, names in tqdm(jobs(arguments), desc="attention", unit="case", dynamic_ncols=True):
        if time.perf_counter() - started > arguments.seconds:
            tqdm.write(f"stopped after {arguments.seconds:g} s")
            break
        for row in run_case(case, names):
            results.append(row)
            tqdm.write(" ".join(f"{key}={value}" for key, value in row.items()))
            write_json(arguments.out, {**header, "results": results})
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
