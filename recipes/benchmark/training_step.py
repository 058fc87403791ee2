"""A training step of a 124M Llama: tokens per second with ASEntmax against the same model on transformers' sdpa.

    python -m recipes.benchmark.training_step            # needs a CUDA GPU; writes training_step.json beside this file

The whole step, forward, backward and optimizer, bf16 autocast over fp32 weights. What is compiled: `layers`, each
decoder layer (one graph serves all of them); `model`, the whole model, as torch.compile(model) does; `graphs`, the
same into CUDA graphs (mode="reduce-overhead"): at few tokens a step the host is slower than the GPU otherwise. In a
compiled model transformers gives sdpa a mask over all pairs of tokens (with torch 2.11 and transformers 5.17 also
where it is given a cache, or sees no packed sequences), which makes sdpa's kernels three times slower: compare the
rows of ours with those of sdpa's layers as well. Scores are those of a model at its start (nearly equal:
entmax's supports are at their largest) and of query projections multiplied by --sharpen (supports as small as in a
trained model). After --seconds, no further row is begun.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import hf_asentmax  # noqa: F401  (registers the presets)
from recipes.common import results_header

COMPILED = ("layers", "model", "graphs")
METHODS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "softmax, RoPE (sdpa)": ("sdpa", None),
    "ASEntmax, RoPE": ("asentmax", {}),
    "ASEntmax, NAPE": ("asentmax", {"positions": "nape"}),
    "entmax, NAPE": ("entmax", {"positions": "nape"}),
}
WARM_UP = 2


def build(implementation: str, flags: dict[str, Any] | None, length: int, small: bool) -> PreTrainedModel:
    """GPT-2's size in Llama's form: 12 layers of 768, 12 heads of 64."""
    size: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    }
    if not small:
        size = {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 2048,
        }
    config = LlamaConfig(vocab_size=32_000, max_position_embeddings=length, tie_word_embeddings=True, **size)
    if flags is not None:
        config.asentmax = flags
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def sharpen(model: PreTrainedModel, factor: float) -> None:
    """Multiplies the query projections."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(factor)


def compile_parts(model: PreTrainedModel, parts: str) -> None:
    """Compile in place what `parts`, one of COMPILED, says."""
    for part in model.model.layers if parts == "layers" else [model]:
        part.compile(dynamic=False, mode="reduce-overhead" if parts == "graphs" else "default")


def median_step_seconds(model: PreTrainedModel, length: int, device: str, steps: int) -> tuple[float, float]:
    """(median seconds of a step after warm-up, peak memory in GiB) at batch 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device == "cuda")
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for step in range(steps + WARM_UP):
        ids = torch.randint(0, 32_000, (1, length), generator=generator).to(device)
        if device == "cuda":
            torch.cuda.synchronize()
        if step == WARM_UP and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return statistics.median(seconds), peak


def measured(
    methods: list[str], lengths: list[int], factors: list[float], steps: int, device: str, small: bool, parts: list[str]
) -> Iterator[dict[str, Any]]:
    """A row for each length, compiled part, method and factor."""
    reference: dict[tuple[int, str, float], float] = {}
    for length, compiled, method in product(lengths, parts, methods):
        torch._dynamo.reset()
        model = build(*METHODS[method], length, small)
        model.to(device).train()  # type: ignore[arg-type]  # transformers wraps Module.to
        if device == "cuda":
            compile_parts(model, compiled)
        sharpened = 1.0
        for factor in factors:
            sharpen(model, factor / sharpened)
            sharpened = factor
            seconds, peak = median_step_seconds(model, length, device, steps)
            yield {
                "length": length,
                "sharpen": factor,
                "method": method,
                "compiled": compiled,
                "step_ms": round(1e3 * seconds, 2),
                "tokens_per_second": round(length / seconds),
                "times_faster_than_sdpa": round(reference.setdefault((length, compiled, factor), seconds) / seconds, 3),
                "peak_gib": round(peak, 2),
            }
        del model


def main() -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768], help="tokens in the (one) sequence")
    parser.add_argument(
        "--sharpen", type=float, nargs="+", default=[16.0, 1.0], help="factors on the query projections"
    )
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS)[:3], help="sdpa comes first")
    parser.add_argument("--compile", choices=COMPILED, nargs="+", default=list(COMPILED), help="what is compiled")
    parser.add_argument("--steps", type=int, default=5, help=f"measured steps, after {WARM_UP} of warm-up")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no further row after so long")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script without a GPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.small:
        parser.error("no CUDA GPU here; add --small --lengths 64 to try the script (its times mean nothing)")
    torch.set_float32_matmul_precision("high")
    header = results_header(torch.device(device), [0])
    rows = []
    begin = time.perf_counter()
    settings = (arguments.lengths, arguments.sharpen, arguments.steps, device, arguments.small, arguments.compile)
    for row in measured(arguments.methods, *settings):
        rows.append(row)
        print(row, flush=True)
        arguments.out.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
        if time.perf_counter() - begin > arguments.seconds:
            print(f"stopped after {arguments.seconds:g} s")
            break


if __name__ == "__main__":
    main()
