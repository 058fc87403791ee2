"""Times `generate` after a long prompt with ASEntmax beside the same model on transformers' SDPA.

    python -m recipes.benchmark.generate               needs a CUDA GPU; writes generate.json beside this file
    python -m recipes.benchmark.generate --sizes tiny --context 300 --new 12        tries the script without a GPU

The call is `model.generate(prompt, cache_implementation="static")`, greedy, in bfloat16, with one sequence.
transformers then compiles the decoding steps in mode reduce-overhead, that is into CUDA graphs. The prompt consists of
random tokens, and the weights are those of an untrained model. --sharpen multiplies the query projections: 16 makes
supports about as small as in a trained model.

    prompt_ms    the time to the first token
    step_ms      the wall-clock time of each further token
    gpu_ms       the part of it in which the GPU works, pauses of less than 10 us between kernels included
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
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from recipes.benchmark.models import METHODS, SIZES, build, sharpen
from recipes.common import default_device, results_header, write_json

ROUNDS = 3  # each measures all methods in turn
SETTLING = 4  # first tokens, which are not measured
GPU_STEPS = 5  # tokens whose kernels are recorded
PAUSE_US = 10.0  # in a longer pause between two kernels the GPU waits for Python
KERNELS = 12  # how many of a step's kernels the results list
COMPARED = list(METHODS)[:3]


class Stamps(LogitsProcessor):
    """Notes the time of every token, and profiles some of them. It returns the scores as they are."""

    def __init__(self, profiled: range = range(0)) -> None:
        self.times: list[float] = []
        self.profiler: torch.profiler.profile | None = None
        self._profiled = profiled

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.times and scores.is_cuda:
            torch.cuda.synchronize()  # the end of the prompt; later steps wait for the GPU by themselves
        if len(self.times) == self._profiled.start < self._profiled.stop:
            activities = [torch.profiler.ProfilerActivity.CUDA]
            self.profiler = torch.profiler.profile(activities=activities, acc_events=True)
            self.profiler.start()
        if self.profiler is not None and len(self.times) == self._profiled.stop:
            self.profiler.stop()
        self.times.append(time.perf_counter())
        return scores


class Generation:
    """Greedy generation from one prompt with one model, which is compiled by the first run."""

    def __init__(self, model: PreTrainedModel, context: int, new: int) -> None:
        self.model, self._new = model, new
        self._prompt = torch.randint(
            model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0)
        ).to(model.device)

    def run(self, stamps: Stamps) -> float:
        """Generates all new tokens. Returns the seconds to the first one."""
        start = time.perf_counter()
        generate: Any = self.model.generate
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
        """(seconds to the first token, median seconds for each further one)"""
        stamps = Stamps()
        first = self.run(stamps)
        return first, statistics.median(end - begin for begin, end in itertools.pairwise(stamps.times[SETTLING:]))

    def on_gpu(self, steps: int) -> dict[str, Any]:
        """The time that the GPU works for a token, the number of kernels, and the kernels that take most of it."""
        if self.model.device.type != "cuda":
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
    """The time that the spans cover, together with the pauses between them of at most PAUSE_US."""
    total, until = 0.0, None
    for start, end in sorted(spans):
        begin = start if until is None or start - until > PAUSE_US else until
        total += max(0.0, end - begin)
        until = end if until is None else max(until, end)
    return total


def prepare(size: str, context: int, new: int, device: torch.device) -> dict[str, Generation]:
    """A compiled model for each method."""
    torch._dynamo.reset()
    generations = {}
    for method in tqdm(COMPARED, desc="compiling", unit="model", leave=False):
        model = build(method, size, context + new, torch.bfloat16, device.type).eval()
        generations[method] = Generation(model, context, new)
        generations[method].seconds()
    return generations


def compare(generations: dict[str, Generation]) -> list[dict[str, Any]]:
    """Times all methods in turn, ROUNDS times, so that other work of the machine meets all of them alike."""
    rounds = [{name: generation.seconds() for name, generation in generations.items()} for _ in range(ROUNDS)]
    rows = []
    for method, generation in generations.items():
        prompts, steps = zip(*(seconds[method] for seconds in rounds), strict=True)
        ratios = [seconds[COMPARED[0]][1] / seconds[method][1] for seconds in rounds]
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


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["124M", "1B"])
    parser.add_argument("--context", type=int, nargs="+", default=[32768], help="tokens of the prompt (default 32768)")
    parser.add_argument("--new", type=int, default=64, help=f"tokens in each of {ROUNDS} rounds (default 64)")
    parser.add_argument("--sharpen", type=float, nargs="+", default=[16.0, 1.0], help="factors on query projections")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("generate.json"))
    parsed = parser.parse_args(arguments)
    if parsed.new < SETTLING + GPU_STEPS + 2:
        parser.error(f"--new must be at least {SETTLING + GPU_STEPS + 2}, got {parsed.new}")
    if parsed.sizes != ["tiny"] and not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, found none: add --sizes tiny --context 300 --new 12 to try the script")
    return parsed


@torch.no_grad()
def main(command: list[str] | None = None) -> None:
    """Runs the benchmark; see the module's description."""
    arguments = parse_arguments(command)
    device = default_device()
    torch.set_float32_matmul_precision("high")
    started = time.perf_counter()
    header = results_header(device, [0])
    rows: list[dict[str, Any]] = []
    cases = list(itertools.product(arguments.sizes, arguments.context))
    bar = tqdm(total=len(cases) * len(arguments.sharpen), desc="generating", unit="case", dynamic_ncols=True)
    for size, context in cases:
        generations: dict[str, Generation] = {}
        before = 1.0
        for factor in arguments.sharpen:
            if time.perf_counter() - started > arguments.seconds:
                tqdm.write(f"stopped after {arguments.seconds:g} s")
                return
            generations = generations or prepare(size, context, arguments.new, device)
            for generation in generations.values():
                sharpen(generation.model, factor / before)
            before = factor
            for row in compare(generations):
                rows.append({"size": size, "context": context, "sharpen": factor, **row})
                tqdm.write(str({name: value for name, value in rows[-1].items() if name != "kernels"}))
            write_json(arguments.out, {**header, "rows": rows})
            bar.update()
        generations.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    bar.close()


if __name__ == "__main__":
    main()
