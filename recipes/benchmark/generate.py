"""Tokens a second of `generate` at a long context: ASEntmax against the same model on transformers' sdpa.

    python recipes/benchmark/generate.py               # needs a CUDA GPU; writes generate.json beside this file
    python recipes/benchmark/generate.py --small --context 300 --new 4     # tries the script without a GPU

Static cache, bfloat16, greedy, batch 1. The cache is filled with random keys and values instead of a prompt's, which
costs the same to decode from, and the decoding steps are those that `generate` compiles: the model's forward in mode
reduce-overhead (CUDA graphs). Weights are those of a model at its start; --sharpen multiplies query projections, so
that supports are about as small as in a trained model. step_ms is the wall clock of a step, gpu_ms the time between
its first kernel's start and its last one's end: the difference is the host's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).parents[2]))

from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

import hf_asentmax  # noqa: F401  (registers the presets)
from recipes.common import results_header, write_json

ROUNDS = 3  # each measures all methods in turn
GPU_STEPS = 5  # steps whose time on the GPU is measured
KERNELS = 12  # of a step, those that take most of it, stand in the results
SIZES: dict[str, dict[str, Any]] = {
    "124M": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048},
    "1B": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
    },
}
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}
METHODS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "softmax, RoPE (sdpa)": ("sdpa", None),
    "ASEntmax, RoPE": ("asentmax", {}),
    "ASEntmax, NAPE": ("asentmax", {"positions": "nape"}),
}


def build(implementation: str, flags: dict[str, Any] | None, size: dict[str, Any], length: int) -> PreTrainedModel:
    """A Llama of a size, bfloat16."""
    config = LlamaConfig(vocab_size=32_000, max_position_embeddings=length, tie_word_embeddings=True, **size)
    if flags is not None:
        config.asentmax = flags
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.bfloat16).eval()


def filled_cache(model: PreTrainedModel, context: int, new: int) -> StaticCache:
    """A static cache that holds `context` random keys and values, and has room for `new` more."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=-(-(context + new) // 128) * 128)
    head_dim = config.hidden_size // config.num_attention_heads
    cache.early_initialization(1, config.num_key_value_heads, head_dim, model.dtype, model.device)
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        layer.keys[:, :, :context].normal_()
        layer.values[:, :, :context].normal_()
        layer.cumulative_length.fill_(context)
    return cache


class Decoding:
    """Greedy decoding of one model from a filled cache, step by step."""

    def __init__(self, model: PreTrainedModel, context: int, room: int, *, compiled: bool) -> None:
        self.device = model.device
        self._cache = filled_cache(model, context, room)
        self._token = torch.ones(1, 1, dtype=torch.long, device=self.device)
        model(self._token, past_key_values=self._cache, use_cache=True)  # uncompiled, as a prompt is
        self._step = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model

    def step(self) -> None:
        """One token, waited for, as `generate` does to see whether it has to stop."""
        logits = self._step(self._token, past_key_values=self._cache, use_cache=True).logits
        self._token = logits[:, -1].argmax(-1, keepdim=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, steps: int) -> list[float]:
        """Wall clock seconds of each step."""
        times = [time.perf_counter()]
        for _ in range(steps):
            self.step()
            times.append(time.perf_counter())
        return [end - begin for begin, end in itertools.pairwise(times)]

    def on_gpu(self, steps: int) -> dict[str, Any]:
        """Medians over steps: from a step's first kernel to its last one's end, and the kernels' own times by name."""
        if self.device.type != "cuda":
            return {"gpu_ms": None, "kernels": []}
        spans, busy = [], defaultdict(list)
        for _ in range(steps):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                self.step()
            kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
            ranges = [event.time_range for event in kernels]
            spans.append(max(one.end for one in ranges) - min(one.start for one in ranges))
            for event in kernels:
                busy[event.name[:60]].append(event.time_range.elapsed_us())
        totals = {name: (len(times) // steps, sum(times) / steps) for name, times in busy.items()}
        most = sorted(totals.items(), key=lambda item: -item[1][1])[:KERNELS]
        return {
            "gpu_ms": round(1e-3 * statistics.median(spans), 4),
            "kernels": [{"name": name, "calls": calls, "us": round(us, 1)} for name, (calls, us) in most],
        }


def compare(
    size: dict[str, Any], context: int, sharpen: float, device: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """All methods, a round each in turn, so that what else the host does meets all of them."""
    room = 8 + ROUNDS * arguments.new + GPU_STEPS
    torch._dynamo.reset()
    decodings: dict[str, Decoding] = {}
    for method, (implementation, flags) in METHODS.items():
        model = build(implementation, flags, size, context + room)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(sharpen)
        model.to(device)  # type: ignore[arg-type]  # transformers wraps Module.to
        decodings[method] = Decoding(model, context, room, compiled=arguments.compile and device == "cuda")
        decodings[method].seconds(4)
    rounds = [{name: decoding.seconds(arguments.new) for name, decoding in decodings.items()} for _ in range(ROUNDS)]
    reference, *_ = METHODS
    rows = []
    for method, decoding in decodings.items():
        medians = [statistics.median(seconds[method]) for seconds in rounds]
        ratios = [statistics.median(seconds[reference]) / statistics.median(seconds[method]) for seconds in rounds]
        rows.append(
            {
                "context": context,
                "sharpen": sharpen,
                "method": method,
                "step_ms": round(1e3 * statistics.median(medians), 4),
                "step_ms_rounds": [round(1e3 * median, 4) for median in medians],
                "tokens_per_second": round(1 / statistics.median(medians), 1),
                "times_faster_than_sdpa": round(statistics.median(ratios), 3),
                "times_faster_rounds": [round(ratio, 3) for ratio in ratios],
                **decoding.on_gpu(GPU_STEPS),
            }
        )
    return rows


@torch.no_grad()
def main() -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--context", type=int, nargs="+", default=[32768])
    parser.add_argument("--new", type=int, default=64, help=f"measured tokens in each of {ROUNDS} rounds")
    parser.add_argument("--sharpen", type=float, nargs="+", default=[16.0, 1.0], help="factors on query projections")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script without a GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no new case after so long")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("generate.json"))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.small:
        parser.error("no CUDA GPU here; add --small --context 300 --new 4 to try the script (its times mean nothing)")
    torch.set_float32_matmul_precision("high")
    started = time.perf_counter()
    header = results_header(torch.device(device), [0])
    rows: list[dict[str, Any]] = []
    for name, context, sharpen in itertools.product(arguments.sizes, arguments.context, arguments.sharpen):
        if time.perf_counter() - started > arguments.seconds:
            print("out of time")
            return
        size = SMALL if arguments.small else SIZES[name]
        for row in compare(size, context, sharpen, device, arguments):
            rows.append({"size": name, **row})
            print({name: value for name, value in rows[-1].items() if name != "kernels"}, flush=True)
            for kernel in row["kernels"]:
                print("   {us:8.1f} us in {calls:3} calls: {name}".format(**kernel), flush=True)
        write_json(arguments.output, {**header, "rows": rows})
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
