"""Times one decoding step of attention on a long cache: the Triton kernels beside softmax attention, on one GPU.

    python -m recipes.benchmark.decode                      needs a CUDA GPU; writes decode.json beside this file
    python -m recipes.benchmark.decode --seconds 120        begins no case after so long; important cases come first

A step has one query a sequence, in bfloat16. A CUDA graph holds calls over several caches in turn, which together are
larger than the GPU's L2 cache; `ms` is the median replay over the number of calls. inputs.py describes the kinds of
input. Kind `static` is random, with a mask that shows three quarters of the cache, as transformers' static cache has.

The peers have no ALiBi, which only makes them faster.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from hf_asentmax import entmax_attention
from hf_asentmax.mappings import entmax
from recipes.benchmark import timing
from recipes.benchmark.inputs import alibi_slopes
from recipes.common import results_header, write_json

KINDS = ("random", "near-uniform", "nape", "alibi", "static")
WITH_ALIBI = ("nape", "alibi")
PEERS = ("sdpa cuDNN", "sdpa flash-2", "sdpa repeated keys, mask", "flex")
SHAPES = ((32, 8, 128), (16, 16, 64))  # (heads, kv_heads, head_dim)
ROTATED_BYTES = 400 * 2**20  # of the caches in a graph: several times an H100's L2 cache of 50 MB

Step = Callable[["Inputs"], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """`batch` sequences with kv_len keys and inputs of a kind, one of KINDS."""

    heads: int
    kv_heads: int
    head_dim: int
    kv_len: int
    batch: int
    kind: str

    @property
    def key_bytes(self) -> int:
        """The size of all keys."""
        return 2 * self.batch * self.kv_heads * self.kv_len * self.head_dim


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call.

    Attributes:
        query: (batch, heads, 1, head_dim) bfloat16.
        key: (batch, kv_heads, kv_len, head_dim) bfloat16.
        value: like `key`.
        mask: (batch, 1, 1, kv_len) bool, True for keys that are seen, or None.
        slopes: (heads,) ALiBi slopes, or None.
        key_norm_bound: (batch, kv_heads), the largest norm of a key, which the package keeps with a cache under ALiBi.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    slopes: torch.Tensor | None
    key_norm_bound: torch.Tensor | None


def ordered_cases(kinds: list[str], lengths: list[int], batches: list[int]) -> Iterator[Case]:
    """All cases, the most important of each kind first. Kinds other than random leave out the largest and smallest."""
    grid = list(itertools.product(SHAPES, lengths, batches))

    def weight(item: tuple[tuple[int, int, int], int, int]) -> tuple[int, int]:
        (_, kv_heads, _), kv_len, batch = item
        important = (kv_len == 131072 and batch in (1, 8)) or (kv_len == 32768) or (kv_len == 8192 and batch == 1)
        return (0 if important else 1) + (0 if kv_heads == 8 else 2), batch * kv_len

    grid.sort(key=weight)
    for kind in kinds:
        for (heads, kv_heads, head_dim), kv_len, batch in grid:
            if kind != "random" and (batch == 32 or (kv_len == 8192 and kind != "alibi")):
                continue
            yield Case(heads, kv_heads, head_dim, kv_len, batch, kind)


def make_inputs(case: Case, device: str = "cuda") -> list[Inputs]:
    """As many sets of tensors as it takes to exceed ROTATED_BYTES, at most 16."""
    torch.manual_seed(0)
    count = min(16, max(1, math.ceil(ROTATED_BYTES / (2 * case.key_bytes))))
    mask = None
    if case.kind == "static":
        mask = torch.arange(case.kv_len, device=device)[None, None, None] < case.kv_len * 3 // 4
        mask = mask.expand(case.batch, 1, 1, -1).contiguous()
    slopes = alibi_slopes(case.kind, case.heads, device)
    made = []
    for _ in range(count):
        shape = (case.batch, case.kv_heads, case.kv_len, case.head_dim)
        query = torch.randn(case.batch, case.heads, 1, case.head_dim, device=device)
        query = (query * (0.05 if case.kind == "near-uniform" else 1.0)).bfloat16()
        key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
        bound = None
        if slopes is not None:
            bound = torch.linalg.vector_norm(key, dim=-1, dtype=torch.float32).amax(-1)
        made.append(Inputs(query, key, value, mask, slopes, bound))
    return made


def ours(inputs: Inputs, backend: str = "triton") -> torch.Tensor:
    """The package's attention, alpha = 1.5."""
    return entmax_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        is_causal=inputs.mask is None,
        attention_mask=inputs.mask,
        alibi_slopes=inputs.slopes,
        key_norm_bound=inputs.key_norm_bound,
        backend=backend,
    )


def _sdpa(backend: SDPBackend) -> Step:
    def attend(inputs: Inputs) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                inputs.query, inputs.key, inputs.value, attn_mask=inputs.mask, enable_gqa=True
            )

    return attend


def _sdpa_repeated(case: Case, device: str) -> Step:
    """As transformers calls SDPA where there is a mask: keys and values are repeated for each query head."""
    mask = torch.ones(case.batch, 1, 1, case.kv_len, dtype=torch.bool, device=device)
    repeats = case.heads // case.kv_heads

    def attend(inputs: Inputs) -> torch.Tensor:
        key, value = inputs.key, inputs.value
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        return F.scaled_dot_product_attention(inputs.query, key, value, attn_mask=mask)

    return attend


def _flex() -> Step:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda inputs: compiled(inputs.query, inputs.key, inputs.value, enable_gqa=True)


def peer(name: str, case: Case, device: str = "cuda") -> Step | None:
    """A softmax attention, or None where it does not apply or would take more than 40 GiB."""
    if name == "sdpa repeated keys, mask":
        repeated_bytes = 2 * case.key_bytes * case.heads // case.kv_heads
        return _sdpa_repeated(case, device) if repeated_bytes < 40 * 2**30 and case.kind == "random" else None
    if name == "flex":
        return _flex() if case.kind == "random" else None
    if name == "sdpa flash-2":
        return _sdpa(SDPBackend.FLASH_ATTENTION) if case.kind != "static" else None
    return _sdpa(SDPBackend.CUDNN_ATTENTION)


def step_ms(step: Step, sets: list[Inputs]) -> float:
    """The time of one call in a graph of at least 16 calls, over the sets in turn."""
    calls = len(sets) * max(1, 16 // len(sets))

    def warm_up() -> None:
        for inputs in sets[:2]:
            step(inputs)

    def all_calls() -> None:
        for index in range(calls):
            step(sets[index % len(sets)])

    return timing.replay_ms(timing.capture(all_calls, warm_up)) / calls


@torch.no_grad()
def last_group(inputs: Inputs) -> tuple[float, torch.Tensor]:
    """(mean number of keys with a weight, output in float64) of the last key head's queries, first sequence."""
    repeats = inputs.query.shape[1] // inputs.key.shape[1]
    query = inputs.query[:1, -repeats:].double()
    key, value = (tensor[:1, -1:].double() for tensor in (inputs.key, inputs.value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if inputs.mask is not None:
        scores = scores.masked_fill(~inputs.mask[:1], -math.inf)
    weights = entmax(scores, 1.5)
    return (weights > 0).sum(-1).double().mean().item(), weights @ value


def measure_ours(case: Case, sets: list[Inputs], bandwidth: float, backend: str = "triton") -> dict[str, Any]:
    """Time, error and support of our kernels, and how close they come to the least time.

    floor_ms is the time to read all keys and the values with a weight, at `bandwidth` bytes/ms.
    """
    step = partial(ours, backend=backend)
    row: dict[str, Any] = {"method": "ours", "ms": round(step_ms(step, sets), 5)}
    if case.kind not in WITH_ALIBI:
        support, expected = last_group(sets[0])
        output = step(sets[0])[:1, -expected.shape[1] :].double()
        row["support"] = round(support, 1)
        row["error"] = float(f"{((output - expected).norm() / expected.norm()).item():.2e}")
        read = case.key_bytes * (0.75 if case.kind == "static" else 1.0)
        read += 2 * case.batch * case.heads * case.head_dim * min(support, case.kv_len)
        row["floor_ms"] = round(read / bandwidth, 5)
        row["share_of_floor"] = round(read / bandwidth / row["ms"], 3)
    turns = itertools.cycle(sets)
    row["kernels_us"] = timing.kernel_us(lambda: step(next(turns)), calls=8)
    return row


def measure_peer(name: str, step: Step, sets: list[Inputs]) -> dict[str, Any]:
    """The time of a softmax attention."""
    return {"method": name, "ms": round(step_ms(step, sets), 5)}


def attempt(run: Callable[[], dict[str, Any]], name: str) -> dict[str, Any]:
    """The row of a measurement, or one that says why it failed."""
    try:
        return run()
    except (RuntimeError, torch.OutOfMemoryError) as error:
        return {"method": name, "failed": f"{type(error).__name__}: {str(error)[:120]}"}


def run_case(case: Case, names: list[str], bandwidth: float) -> Iterator[dict[str, Any]]:
    """A row of results for each of the methods, `ours` among them or not."""
    sets = make_inputs(case)
    for name in names:
        if name == "ours":
            yield {**vars(case), **attempt(partial(measure_ours, case, sets, bandwidth), name)}
        elif (step := peer(name, case)) is not None:
            yield {**vars(case), **attempt(partial(measure_peer, name, step, sets), name)}


def jobs(arguments: argparse.Namespace) -> list[tuple[Case, list[str]]]:
    """Cases with the methods to run on them. FlexAttention comes last, because it compiles for every shape."""
    cases = list(ordered_cases(arguments.kinds, arguments.lengths, arguments.batches))
    quick = ["ours", *(name for name in arguments.peers if name != "flex")]
    slow = [(case, ["flex"]) for case in cases if "flex" in arguments.peers and case.kind == "random"]
    return [(case, quick) for case in cases] + slow


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after so long")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("decode.json"))
    parsed = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, found none: run this where there is one")
    return parsed


@torch.no_grad()
def main(command: list[str] | None = None) -> None:
    """Runs the benchmark; see the module's description."""
    arguments = parse_arguments(command)
    started = time.perf_counter()
    header = results_header(torch.device("cuda"), [0])
    bandwidth = timing.copy_bytes_per_ms()
    header["copy_tb_per_s"] = round(bandwidth / 1e9, 3)
    results: list[dict[str, Any]] = []
    for case, names in tqdm(jobs(arguments), desc="decoding", unit="case", dynamic_ncols=True):
        if time.perf_counter() - started > arguments.seconds:
            tqdm.write(f"stopped after {arguments.seconds:g} s")
            break
        for row in run_case(case, names, bandwidth):
            results.append(row)
            tqdm.write(" ".join(f"{key}={value}" for key, value in row.items()))
            write_json(arguments.out, {**header, "results": results})
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
