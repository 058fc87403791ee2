"""Generating token by token equals one full forward, for every cache and method that runs on a CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import Cache, CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from hf_asentmax.integration import forward

from tiny_models import FAMILIES, PRESETS, generating_model, lossless_quantized_cache, random_ids, tiny_model

NEW = 10
NAPE = {"positions": "nape"}
WINDOWED = ("mistral", "gemma2", "gemma3_text")
UNWINDOWED = tuple(family for family in FAMILIES if family not in WINDOWED)
IDS = random_ids(3, 12)
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
MASK[1, :2] = 0
# One row that repeats itself, with left padding, because assisted decoding takes a batch of 1
ROW = IDS[:1].repeat(1, 2)
ROW_MASK = torch.ones_like(ROW)
ROW_MASK[0, :3] = 0


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, positions: bool = False) -> torch.Tensor:
    """Greedy decoding by full forwards, without any cache."""
    for _ in range(NEW):
        position_ids = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if positions else {}
        last = model(ids, attention_mask=mask, use_cache=False, **position_ids).logits[:, -1]
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


def largest_error(model: PreTrainedModel, ids: torch.Tensor = IDS, mask: torch.Tensor = MASK, **settings: Any) -> float:
    """The largest difference between the logits of greedy decoding and of one full forward over its output."""
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    mask = torch.cat([mask, torch.ones_like(mask[:, :1]).expand(-1, NEW)], 1)
    with torch.no_grad():
        full = model(out.sequences, attention_mask=mask, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    steps = torch.stack(out.logits, 1)
    assert steps.shape == full.shape
    return float((steps - full).abs().max())


def softmax_error(family: str, settings: Callable[[PreTrainedModel], dict[str, Any]]) -> Exception | None:
    """The error, if any, that transformers raises for this generation with its own softmax attention."""
    model = tiny_model(family)
    try:
        model.generate(ROW, attention_mask=ROW_MASK, max_new_tokens=NEW, do_sample=False, **settings(model))
    except Exception as error:
        return error
    return None


def skip_what_softmax_cannot_do(family: str, settings: Callable[[PreTrainedModel], dict[str, Any]]) -> None:
    error = softmax_error(family, settings)
    if error is not None:
        pytest.skip(f"transformers {transformers.__version__} can't do this with softmax either: {error!r}")


CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "sliding": {"cache_implementation": "sliding_window", "disable_compile": True},
    "chunked prefill": {"prefill_chunk_size": 5},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("cache", CACHES)
def test_greedy(family: str, cache: str) -> None:
    model = generating_model(family, NAPE)
    out = model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=False, **CACHES[cache])
    assert torch.equal(out, greedy(model, IDS, MASK))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_every_preset_with_the_models_own_positions(family: str, preset: str) -> None:
    model = generating_model(family, {"top_k": 4} if preset == "topk_softmax" else None, preset)
    out = model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, greedy(model, IDS, MASK, positions=True))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_logits_of_each_step_equal_the_full_forward(family: str, kind: str) -> None:
    model = generating_model(family, NAPE)
    ids = random_ids(2, 17)
    cache = StaticCache(config=model.config, max_cache_len=32) if kind == "static" else None
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        steps, start = [], 0
        for size in (5, 1, 1, 4, 1, 1, 1, 3):  # a prompt, single tokens, chunks
            out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
            start += size
    assert start == 17
    assert torch.allclose(torch.cat(steps, 1), full, atol=5e-6)


# Caches that a user makes and passes. The one without a config keeps all keys of a sliding window.
MADE: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "without a config": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=40),
    "quantized": lossless_quantized_cache,
}
FAMILY_AND_CACHE = [
    (family, kind) for family in FAMILIES for kind in MADE if not (kind == "quantized" and family in WINDOWED)
]


@pytest.mark.parametrize(("family", "kind"), FAMILY_AND_CACHE)
def test_a_cache_that_goes_on_from_an_earlier_turn(family: str, kind: str) -> None:
    model = generating_model(family, NAPE)
    cache = MADE[kind](model)
    settings = {"max_new_tokens": 3, "do_sample": False, "past_key_values": cache, "disable_compile": True}
    first = model.generate(IDS, attention_mask=MASK, **settings)
    ids = torch.cat([first, random_ids(3, 4, seed=1)], 1)
    mask = torch.cat([MASK, torch.ones(3, 7, dtype=torch.long)], 1)
    assert largest_error(model, ids, mask, past_key_values=cache, disable_compile=True) < 5e-6


@pytest.mark.parametrize(("family", "kind"), FAMILY_AND_CACHE)
def test_the_scaling_counts_the_visible_keys(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With left padding, the count of each query in prompts, steps and chunks follows its row and layer's window."""
    model = generating_model(family, NAPE)
    counts: list[torch.Tensor] = []
    original = forward.visible_count

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        counts.append(original(*args, **kwargs))
        return counts[-1]

    monkeypatch.setattr(forward, "visible_count", recorded)
    cache, start = MADE[kind](model), 0
    with torch.no_grad():
        for size in (6, 1, 1, 3, 1):
            end = start + size
            model(IDS[:, start:end], attention_mask=MASK[:, :end], past_key_values=cache, use_cache=True)
            start = end
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * 2
    position = torch.arange(start)
    for layer in range(2):
        window = model.config.sliding_window if types[layer] == "sliding_attention" or family == "mistral" else start
        seen = (position <= position[:, None]) & (position[:, None] - position < window)
        expected = (MASK[:, None] * seen).sum(-1)
        actual = torch.cat([count[:, 0].expand(3, -1) for count in counts[layer::2]], 1)
        assert torch.equal(actual[MASK.bool()], expected[MASK.bool()])


# The tolerance for the logits of these models (up to about 0.4) when keys and values are rounded to so many bits
QUANTIZERS: dict[str, tuple[str | None, dict[str, Any], float]] = {
    "fp8": (None, {"backend": "fp8"}, 0.02),
    "quanto": ("optimum.quanto", {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 4}, 0.02),
    "hqq": (
        "hqq",
        {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 8, "residual_length": 4},
        0.001,
    ),
}


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_quantized_caches(family: str, quantizer: str) -> None:
    package, cache_config, tolerance = QUANTIZERS[quantizer]
    if package is not None:
        pytest.importorskip(package)

    def settings(model: PreTrainedModel) -> dict[str, Any]:
        return {"cache_implementation": "quantized", "cache_config": dict(cache_config)}  # `generate` may consume it

    skip_what_softmax_cannot_do(family, settings)
    model = generating_model(family, NAPE)
    assert 0.0 < largest_error(model, **settings(model)) < tolerance  # 0 would mean that the cache was not quantized
    assert largest_error(model, prefill_chunk_size=5, **settings(model)) < tolerance


@pytest.mark.parametrize("residual_length", [1, 4, 128])
@pytest.mark.parametrize("family", UNWINDOWED)
def test_quantized_caches_change_nothing_but_the_rounding(family: str, residual_length: int) -> None:
    model = generating_model(family, NAPE)
    assert largest_error(model, past_key_values=lossless_quantized_cache(model, residual_length)) < 5e-6


BEAM_CACHES: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    "dynamic": lambda model: {},
    "static": lambda model: {"cache_implementation": "static", "disable_compile": True},
    "quantized": lambda model: {"past_key_values": lossless_quantized_cache(model)},
}


@pytest.mark.parametrize("cache", BEAM_CACHES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_beams(family: str, cache: str) -> None:
    """A beam's score is the log-probability that full forwards give its tokens."""
    if cache == "quantized" and family in WINDOWED:
        pytest.skip("transformers has no quantized cache for sliding windows")
    model = generating_model(family, NAPE)
    settings: dict[str, Any] = {
        "attention_mask": MASK,
        "max_new_tokens": 6,
        "num_beams": 3,
        "do_sample": False,
        "length_penalty": 0.0,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    skip_what_softmax_cannot_do(family, lambda model: {"num_beams": 3, **BEAM_CACHES[cache](model)})
    out = model.generate(IDS, **BEAM_CACHES[cache](model), **settings)
    mask = torch.cat([MASK, torch.ones(3, 6, dtype=torch.long)], 1)
    with torch.no_grad():
        log_probabilities = model(out.sequences, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    chosen = log_probabilities[:, 11:-1].gather(-1, out.sequences[:, 12:, None])[..., 0].sum(-1)
    assert torch.allclose(chosen, out.sequences_scores, atol=1e-4)
    assert torch.equal(out.sequences, model.generate(IDS, use_cache=False, **settings).sequences)


def test_sampling_is_seeded_and_batched_rows_do_not_mix() -> None:
    model = generating_model("llama", NAPE)
    torch.manual_seed(3)
    first = model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=True, top_k=1)
    assert torch.equal(first, greedy(model, IDS, MASK))  # top_k=1 leaves one token to sample
    draws = []
    for _ in range(2):
        torch.manual_seed(4)
        draws.append(model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=True))
    assert torch.equal(*draws)


ASSISTED: dict[str, Callable[[str], dict[str, Any]]] = {
    "prompt lookup": lambda family: {"prompt_lookup_num_tokens": 3},
    "an assistant that is often wrong": lambda family: {"assistant_model": generating_model(family, seed=5)},
    "an assistant that is always right": lambda family: {"assistant_model": generating_model(family, NAPE)},
    "a softmax assistant": lambda family: {"assistant_model": tiny_model(family, "eager", seed=3)},
    "the model's first layer": lambda family: {"assistant_early_exit": 1},
}


@pytest.mark.parametrize("method", ASSISTED)
def test_assisted_decoding(family: str, method: str) -> None:
    """Several candidates are checked at a time, and the cache is cropped after wrong ones."""
    if method == "the model's first layer":
        pytest.importorskip("transformers", minversion="5.23")  # older versions fail to crop the skipped layers
    skip_what_softmax_cannot_do(family, lambda model: ASSISTED[method](family))
    model = generating_model(family, NAPE)
    assert largest_error(model, ROW, ROW_MASK, **ASSISTED[method](family)) < 5e-6


def test_weights_of_each_step() -> None:
    model = generating_model("llama", NAPE)
    assert largest_error(model, output_attentions=True) < 5e-6


def test_guidance() -> None:
    """Classifier-free guidance keeps two caches."""
    model = generating_model("llama", NAPE)
    settings = {"max_new_tokens": NEW, "do_sample": False, "guidance_scale": 1.5}
    expected = model.generate(IDS[2:], use_cache=False, **settings)
    assert torch.equal(model.generate(IDS[2:], **settings), expected)


# Generation that transformers refuses for any attention, or cannot do without a GPU
LIMITS: dict[str, tuple[str, Callable[[PreTrainedModel], dict[str, Any]]]] = {
    "offloaded": ("llama", lambda model: {"cache_implementation": "offloaded"}),
    "offloaded static": (
        "llama",
        lambda model: {"cache_implementation": "offloaded_static", "disable_compile": True},
    ),
    "a static cache with candidates": (
        "llama",
        lambda model: {"cache_implementation": "static", "prompt_lookup_num_tokens": 3},
    ),
    "a quantized cache with candidates": (
        "llama",
        lambda model: {"past_key_values": lossless_quantized_cache(model), "prompt_lookup_num_tokens": 3},
    ),
    "a quantized window": (
        "mistral",
        lambda model: {"cache_implementation": "quantized", "cache_config": {"backend": "hqq"}},
    ),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_what_transformers_cannot_do_fails_as_for_softmax(limit: str) -> None:
    """The same error as for softmax, or correct results if transformers learns to do it."""
    family, settings = LIMITS[limit]
    model = generating_model(family, NAPE)
    error = softmax_error(family, settings)
    if error is None:
        assert largest_error(model, ROW, ROW_MASK, **settings(model)) < 5e-6
    else:
        with pytest.raises(type(error), match=re.escape(str(error))):
            largest_error(model, ROW, ROW_MASK, **settings(model))


@pytest.mark.slow
def test_generate_with_a_compiled_static_cache() -> None:
    """`generate` compiles by default on a GPU, and here on a CPU."""
    compiled: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    model = generating_model("gemma2", NAPE)
    assert largest_error(model, cache_implementation="static", compile_config=config) < 5e-6
    assert compiled


@pytest.mark.slow
def test_static_cache_compiled() -> None:
    """With Inductor, the default backend of torch.compile."""
    model = generating_model("llama", NAPE, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    cache = StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        model(IDS[:1, :8], past_key_values=cache, use_cache=True)
        outs = [compiled(IDS[:1, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(8, 12)]
        full = model(IDS[:1], use_cache=False).logits
    assert torch.allclose(torch.cat(outs, 1), full[:, 8:], atol=5e-6)


def test_compiled_decoding_counts_visible_keys_once_for_all_layers() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = generating_model("llama")
    cache = StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        model(IDS[:1, :8], past_key_values=cache, use_cache=True)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        out = compiled(IDS[:1, 8:9], past_key_values=cache, use_cache=True).logits
        full = model(IDS[:1, :9], use_cache=False).logits
    assert torch.allclose(out, full[:, 8:], atol=5e-6)
    (graph,) = graphs
    sums = [node for node in graph.graph.nodes if node.target == "sum"]
    counts = [node for node in sums if node.meta["example_value"].dtype == torch.int64]
    assert model.config.num_hidden_layers > 1 and len(counts) == 1


def test_continuous_batching_is_refused() -> None:
    model, prompts = generating_model("llama"), [[3, 4, 5], [6, 7]]
    settings = model.generation_config.to_dict()
    message = "expects one of transformers' own .* got LlamaForCausalLM with .*'asentmax'.* Use generate()"
    with pytest.raises(NotImplementedError, match=message):
        model.generate_batch(prompts, max_new_tokens=2)
    with pytest.raises(NotImplementedError, match=message):
        model.generate(IDS, max_new_tokens=2, cache_implementation="paged")
    with pytest.raises(NotImplementedError, match=message):
        model.init_continuous_batching()
    assert model.generation_config.to_dict() == settings
    manager = tiny_model("llama", "sdpa").init_continuous_batching()  # other models pass through
    manager.destroy()
