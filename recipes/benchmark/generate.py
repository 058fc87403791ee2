"""Tokens a second of `generate` at a long context: ASEntmax against the same model on transformers' sdpa.

    python -m recipes.benchmark.generate               # needs a CUDA GPU; writes generate.json beside this file
    python -m recipes.benchmark.generate --small --context 300 --new 12     # tries the script without a GPU

`model.generate(prompt, cache_implementation="static")`, bfloat16, greedy, batch 1: transformers compiles its decoding
steps in mode reduce-overhead (CUDA graphs). The prompt is random tokens. Weights are those of a model at its start;
--sharpen multiplies query projections, so that supports are about as small as in a trained model. prompt_ms is the time
to the first token, step_ms the wall clock of each further one, gpu_ms what the GPU works in a step (pauses below 10 us
between kernels counted in): the rest of step_ms is the host's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from tqdm import tqdm

from transformers import AutoModelForCausalLM, LlamaConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

import hf_asentmax  # noqa: F401  (registers the presets)
from recipes.common import results_header, write_json

ROUNDS = 3  # each measures all methods in turn
SETTLING = 4  # first tokens that aren't measured
GPU_STEPS = 5  # steps whose time on the GPU is measured
PAUSE_US = 10.0  # a longer one between two kernels is the host's
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


def build(
    implementation: str, flags: dict[str, Any] | None, size: dict[str, Any], length: int, device: str = "cpu"
) -> PreTrainedModel:
    """A Llama of a size, bfloat16."""
    config = LlamaConfig(
        vocab_size=32_000, max_position_embeddings=length, tie_word_embeddings=True, eos_token_id=None, **size
    )
    if flags is not None:
        config.asentmax = flags
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.bfloat16).eval()


class Stamps(LogitsProcessor):
    """Reads the clock at every token, and lets the profiler look at a few of them; leaves the scores alone."""

    def __init__(self, profiled: range = range(0)) -> None:
        self.times: list[float] = []
        self.profiler: torch.profiler.profile | None = None
        self._profiled = profiled

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.times and scores.is_cuda:
            torch.cuda.synchronize()  # the prompt's end; later steps wait for the GPU by themselves
        if len(self.times) == self._profiled.start < self._profiled.stop:
            activities = [torch.profiler.ProfilerActivity.CUDA]
            self.profiler = torch.profiler.profile(activities=activities, acc_events=True)
            self.profiler.start()
        if self.profiler is not None and len(self.times) == self._profiled.stop:
            self.profiler.stop()
        self.times.append(time.perf_counter())
        return scores


class Generation:
    """Greedy generation from one prompt with one model."""

    def __init__(self, model: PreTrainedModel, context: int, new: int) -> None:
        self._model, self._new = model, new
        self._prompt = torch.randint(
            model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0)
        ).to(model.device)

    def sharpen(self, factor: float) -> None:
        """Multiplies the query projections, in place: what is compiled stays."""
        for layer in self._model.model.layers:
            layer.self_attn.q_proj.weight.mul_(factor)

    def run(self, stamps: Stamps) -> float:
        """All new tokens; seconds to the first one."""
        start = time.perf_counter()
        generate: Any = self._model.generate
        generate(
            self._prompt,
            attention_mask=torch.ones_like(self._prompt),
            max_new_tokens=self._new,
            do_sample=False,
            cache_implementation="static",
            logits_processor=LogitsProcessorList([stamps]),
        )
        return stamps.times[0] - start

    def seconds(self) -> tuple[float, float]:
        """Seconds to the first token, and the median of those between the further ones."""
        stamps = Stamps()
        first = self.run(stamps)
        return first, statistics.median(end - begin for begin, end in itertools.pairwise(stamps.times[SETTLING:]))

    def on_gpu(self, steps: int) -> dict[str, Any]:
        """What the GPU does in a step: the time that it works, and the kernels' own times by name."""
        if self._model.device.type != "cuda":
            return {"gpu_ms": None, "kernels": []}
        stamps = Stamps(range(SETTLING, SETTLING + steps))
        self.run(stamps)
        assert stamps.profiler is not None
        kernels = [event for event in stamps.profiler.events() if event.device_type == DeviceType.CUDA]
        busy = defaultdict(list)
        for event in kernels:
            busy[event.name[:60]].append(event.time_range.elapsed_us())
        totals = {name: (len(times) / steps, sum(times) / steps) for name, times in busy.items()}
        most = sorted(totals.items(), key=lambda item: -item[1][1])[:KERNELS]
        worked = _worked_us([(event.time_range.start, event.time_range.end) for event in kernels])
        return {
            "gpu_ms": round(1e-3 * worked / steps, 4),
            "launches": round(len(kernels) / steps),
            "kernels": [{"name": name, "calls": round(calls, 1), "us": round(us, 1)} for name, (calls, us) in most],
        }


def _worked_us(spans: list[tuple[float, float]]) -> float:
    """How long of the time some span covers, or a pause too short to be the host's."""
    total, until = 0.0, None
    for start, end in sorted(spans):
        begin = start if until is None or start - until > PAUSE_US else until
        total += max(0.0, end - begin)
        until = end if until is None else max(until, end)
    return total


def prepare(size: dict[str, Any], context: int, new: int, device: str) -> dict[str, Generation]:
    """Every method's model, its decoding compiled."""
    torch._dynamo.reset()
    generations = {}
    for method, (implementation, flags) in tqdm(METHODS.items(), desc="compiling", unit="model", leave=False):
        generations[method] = Generation(build(implementation, flags, size, context + new, device), context, new)
        generations[method].seconds()
    return generations


def compare(generations: dict[str, Generation]) -> list[dict[str, Any]]:
    """All methods, a round each in turn, so that what else the host does meets all of them."""
    rounds = [{name: generation.seconds() for name, generation in generations.items()} for _ in range(ROUNDS)]
    reference, *_ = METHODS
    rows = []
    for method, generation in generations.items():
        prompts, steps = zip(*(seconds[method] for seconds in rounds), strict=True)
        ratios = [seconds[reference][1] / seconds[method][1] for seconds in rounds]
        rows.append(
            {
                "method": method,
                "prompt_ms": round(1e3 * statistics.median(prompts), 1),
                "step_ms": round(1e3 * statistics.median(steps), 4),
                "step_ms_rounds": [round(1e3 * step, 4) for step in steps],
                "tokens_per_second": round(1 / statistics.median(steps), 1),
                "times_faster_than_sdpa": round(statistics.median(ratios), 3),
                "times_faster_rounds": [round(ratio, 3) for ratio in ratios],
                **generation.on_gpu(GPU_STEPS),
            }
        )
    return rows


@torch.no_grad()
def main() -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--context", type=int, nargs="+", default=[32768])
    parser.add_argument("--new", type=int, default=64, help=f"tokens in each of {ROUNDS} rounds")
    parser.add_argument("--sharpen", type=float, nargs="+", default=[16.0, 1.0], help="factors on query projections")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script without a GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no new case after so long")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("generate.json"))
    arguments = parser.parse_args()
    if arguments.new < SETTLING + GPU_STEPS + 2:
        parser.error(f"--new must be at least {SETTLING + GPU_STEPS + 2}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.small:
        parser.error("no CUDA GPU here; add --small --context 300 --new 12 to try the script (its times mean nothing)")
    torch.set_float32_matmul_precision("high")
    started = time.perf_counter()
    header = results_header(torch.device(device), [0])
    rows: list[dict[str, Any]] = []
    for name, context in itertools.product(arguments.sizes, arguments.context):
        generations: dict[str, Generation] = {}
        before = 1.0
        for sharpen in arguments.sharpen:
            if time.perf_counter() - started > arguments.seconds:
                print("out of time")
                return
            generations = generations or prepare(
                SMALL if arguments.small else SIZES[name], context, arguments.new, device
            )
            for generation in generations.values():
                generation.sharpen(sharpen / before)
            before = sharpen
            for row in compare(generations):
                rows.append({"size": name, "context": context, "sharpen": sharpen, **row})
                print({name: value for name, value in rows[-1].items() if name != "kernels"}, flush=True)
                for kernel in row["kernels"]:
                    print("   {us:8.1f} us in {calls:3} calls: {name}".format(**kernel), flush=True)
            write_json(arguments.output, {**header, "rows": rows})
        generations.clear()
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
