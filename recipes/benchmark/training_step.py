"""Times a training step of a 124M Llama with ASEntmax beside the same model on transformers' SDPA.

    python -m recipes.benchmark.training_step            needs a CUDA GPU; writes training_step.json beside this file
    python -m recipes.benchmark.training_step --size tiny --lengths 64 --steps 1        tries the script without a GPU

A step is forward, backward and optimizer at batch 1, with bf16 autocast over float32 weights. --compile says how:

    layers    each decoder layer is compiled; one compiled graph serves all of them
    model     the whole model is compiled, as by torch.compile(model)
    graphs    the whole model is compiled into CUDA graphs, by torch.compile(model, mode="reduce-overhead"); with few
              tokens a step, Python is slower than the GPU in the other two

In a model that is compiled whole, transformers gives SDPA a mask over all pairs of tokens, which makes SDPA's kernels
three times slower. Compare ours with SDPA's rows of compiled layers as well.

--sharpen multiplies the query projections: 1 leaves the scores of an untrained model, which are nearly equal and give
entmax its largest supports; 16 makes supports about as small as in a trained model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from recipes.benchmark.models import METHODS, SIZES, build, sharpen
from recipes.common import default_device, results_header, write_json

COMPILED = ("layers", "model", "graphs")
WARM_UP = 2


def compile_parts(model: PreTrainedModel, parts: str) -> None:
    """Compiles in place what `parts`, one of COMPILED, says."""
    for part in model.model.layers if parts == "layers" else [model]:
        part.compile(dynamic=False, mode="reduce-overhead" if parts == "graphs" else "default")


def median_step_seconds(model: PreTrainedModel, length: int, device: torch.device, steps: int) -> tuple[float, float]:
    """(median seconds of a step after the warm-up, peak memory in GiB) at batch 1."""
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=on_gpu)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for step in range(steps + WARM_UP):
        ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator).to(device)
        if on_gpu:
            torch.cuda.synchronize()
            if step == WARM_UP:
                torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0


def measured(
    length: int, compiled: str, method: str, arguments: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, Any]]:
    """A row for each factor on the query projections, without the comparison."""
    torch._dynamo.reset()
    model = build(method, arguments.size, length)
    model.to(device).train()  # type: ignore[arg-type]  # transformers wraps Module.to
    if device.type == "cuda":
        compile_parts(model, compiled)
    before = 1.0
    for factor in arguments.sharpen:
        sharpen(model, factor / before)
        before = factor
        seconds, peak = median_step_seconds(model, length, device, arguments.steps)
        yield {
            "length": length,
            "sharpen": factor,
            "method": method,
            "compiled": compiled,
            "step_ms": round(1e3 * seconds, 2),
            "tokens_per_second": round(length / seconds),
            "peak_gib": round(peak, 2),
        }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768], help="tokens in the one sequence")
    parser.add_argument("--size", choices=SIZES, default="124M", help="of the model (default 124M)")
    parser.add_argument("--sharpen", type=float, nargs="+", default=[16.0, 1.0], help="factors on query projections")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS)[:3], help="SDPA comes first")
    parser.add_argument("--compile", choices=COMPILED, nargs="+", default=list(COMPILED), help="on a GPU")
    parser.add_argument("--steps", type=int, default=5, help=f"measured, after {WARM_UP} of warm-up (default 5)")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no row after so long (default 600)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parsed = parser.parse_args(arguments)
    if parsed.size != "tiny" and not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, found none: add --size tiny --lengths 64 to try the script")
    return parsed


def main(command: list[str] | None = None) -> None:
    """Runs the benchmark; see the module's description."""
    arguments = parse_arguments(command)
    device = default_device()
    torch.set_float32_matmul_precision("high")
    header = results_header(device, [0])
    rows: list[dict[str, Any]] = []
    first: dict[tuple[int, str, float], float] = {}  # the first method's times
    started = time.perf_counter()
    cases = list(product(arguments.lengths, arguments.compile, arguments.methods))
    for length, compiled, method in tqdm(cases, desc="training", unit="model", dynamic_ncols=True):
        for row in measured(length, compiled, method, arguments, device):
            reference = first.setdefault((length, compiled, row["sharpen"]), row["step_ms"])
            rows.append({**row, "times_faster_than_sdpa": round(reference / row["step_ms"], 3)})
            tqdm.write(str(rows[-1]))
            write_json(arguments.out, {**header, "rows": rows})
            if time.perf_counter() - started > arguments.seconds:
                tqdm.write(f"stopped after {arguments.seconds:g} s")
                return


if __name__ == "__main__":
    main()
