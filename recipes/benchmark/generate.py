"""Tokens a second of `generate` at a long context: ASEntmax against the same model on transformers' sdpa.

    python recipes/benchmark/generate.py               # needs a CUDA GPU; writes generate.json beside this file
    python recipes/benchmark/generate.py --small --context 300 --new 4     # tries the script without a GPU

Static cache, bfloat16, greedy, batch 1. The cache is filled with random keys and values instead of a prompt's, which
costs the same to decode from, and the decoding steps are those that `generate` compiles: the model's forward in mode
reduce-overhead (CUDA graphs). Weights are those of a model at its start; --sharpen multiplies query projections, so
that supports are about as small as in a trained model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

import hf_asentmax  # noqa: F401  (registers the presets)
from recipes.common import results_header, write_json

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


def seconds_a_step(model: PreTrainedModel, context: int, new: int, *, compiled: bool) -> list[float]:
    """Host and device seconds of each decoding step, after three of warm-up and one uncompiled, as a prompt is."""
    device = model.device
    cache = filled_cache(model, context, new + 4)
    model(torch.ones(1, 1, dtype=torch.long, device=device), past_key_values=cache, use_cache=True)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model
    token = torch.ones(1, 1, dtype=torch.long, device=device)
    seconds = []
    for index in range(new + 3):
        begin = time.perf_counter()
        logits = step(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if index >= 3:
            seconds.append(time.perf_counter() - begin)
    return seconds


@torch.no_grad()
def main() -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--context", type=int, nargs="+", default=[32768])
    parser.add_argument("--new", type=int, default=64, help="measured tokens")
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
    for name in arguments.sizes:
        for context in arguments.context:
            for sharpen in arguments.sharpen:
                reference = None
                for method, (implementation, flags) in METHODS.items():
                    if time.perf_counter() - started > arguments.seconds:
                        print("out of time")
                        return
                    torch._dynamo.reset()
                    model = build(implementation, flags, SMALL if arguments.small else SIZES[name], context + 1024)
                    for layer in model.model.layers:
                        layer.self_attn.q_proj.weight.mul_(sharpen)
                    model.to(device)  # type: ignore[arg-type]  # transformers wraps Module.to
                    steps = seconds_a_step(
                        model, context, arguments.new, compiled=arguments.compile and device == "cuda"
                    )
                    median = statistics.median(steps)
                    reference = reference or median
                    row = {
                        "size": name,
                        "context": context,
                        "sharpen": sharpen,
                        "method": method,
                        "step_ms": round(1e3 * median, 4),
                        "tokens_per_second": round(1 / median, 1),
                        "times_faster_than_sdpa": round(reference / median, 3),
                    }
                    rows.append(row)
                    print(row, flush=True)
                    write_json(arguments.output, {**header, "rows": rows})
                    del model
                    if device == "cuda":
                        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
