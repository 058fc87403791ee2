"""The decoding kernels inside models (in Triton's interpreter without a GPU), and the bound that caches carry."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

pytest.importorskip("triton")

from hf_asentmax.attention import attend
from hf_asentmax.backends.triton.common import launching
from hf_asentmax.backends.triton.decode import launch as decode_launch
from hf_asentmax.backends.triton.decode import operator as decode_op
from hf_asentmax.integration import forward
from hf_asentmax.integration.key_norms import key_norm_bound

from tiny_models import generating_model, lossless_quantized_cache, random_ids

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = random_ids(2, 18)


@pytest.fixture
def decode_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of the kernels, whether it had a bound. The kernels run from 13 keys on."""
    calls: list[bool] = []
    launching.forget()  # a recorded call of another test would be replayed without this function
    original = decode_launch.decode

    def counted(problem: Any, output: torch.Tensor, bound: torch.Tensor | None = None) -> None:
        calls.append(bound is not None)
        original(problem, output, bound)

    monkeypatch.setattr(decode_launch, "decode", counted)
    monkeypatch.setattr(decode_op, "DECODE_FROM", 12)
    monkeypatch.setattr(forward, "attend", partial(attend, backend="triton"))
    return calls


def build(family: str) -> PreTrainedModel:
    return generating_model(family, {"positions": "nape"}).to(DEVICE)


def eager_logits(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, **inputs: Any) -> torch.Tensor:
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(forward, "attend", partial(attend, backend="eager"))
        return model(use_cache=False, **inputs).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "dynamic"), ("llama", "static"), ("llama", "quantized"), ("gemma2", "dynamic"), ("gemma2", "static")],
)
def test_each_step_equals_the_full_forward(
    family: str, kind: str, decode_calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = build(family), IDS[:1].to(DEVICE)
    full = eager_logits(model, monkeypatch, input_ids=ids)
    cache: Any = None
    if kind != "dynamic":
        static = kind == "static"
        cache = StaticCache(config=model.config, max_cache_len=24) if static else lossless_quantized_cache(model)
    steps, start = [], 0
    with torch.no_grad():
        for size in (12, 1, 5):
            out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
            start += size
    assert torch.allclose(torch.cat(steps, 1), full, atol=1e-5)
    if family == "llama":
        # Plain caches keep the norms of their keys. A quantized cache would change the keys.
        assert decode_calls == [kind != "quantized"] * 4
    assert decode_calls


@pytest.mark.parametrize("cache", ["dynamic", pytest.param("static", marks=pytest.mark.slow)])
def test_left_padding(cache: str, decode_calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama"), IDS.to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    extra = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    out = model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, **extra)
    for _ in range(2):
        logits = eager_logits(model, monkeypatch, input_ids=ids, attention_mask=mask)
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert torch.equal(out, ids)
    assert decode_calls


@pytest.mark.skipif(DEVICE == "cpu", reason="slow in the interpreter")
@pytest.mark.gpu
def test_beams_and_assisted_decoding(decode_calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama"), IDS[:1].repeat(1, 2).to(DEVICE)
    settings = {"max_new_tokens": 4, "do_sample": False}
    runs: list[list[torch.Tensor]] = []
    for backend in ("triton", "eager"):
        monkeypatch.setattr(forward, "attend", partial(attend, backend=backend))
        beams = model.generate(ids, num_beams=3, **settings)
        runs.append([beams, model.generate(ids, prompt_lookup_num_tokens=3, **settings)])
    for mine, expected in zip(*runs, strict=True):
        assert torch.equal(mine, expected)
    assert decode_calls


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_compiled_static_cache_at_length(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA graphs and left padding, the tokens are those of the dynamic cache and of plain PyTorch."""
    model, ids = build(family), random_ids(3, 500).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :300] = 0
    mask[1, :7] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    dynamic = model.generate(ids, **settings)
    static = model.generate(ids, cache_implementation="static", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(forward, "attend", partial(attend, backend="eager"))
        eager = model.generate(ids, **settings)
    assert torch.equal(dynamic, eager)
    assert torch.equal(static, eager)


def _norms(key: torch.Tensor) -> torch.Tensor:
    return key.norm(dim=-1).amax((0, 2))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_the_bound_holds_every_key(kind: str) -> None:
    config = build("llama").config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=40)
    for size in (7, 1, 3, 1, 1):
        new = torch.randn(2, 2, size, 8) * torch.rand(()) * 5
        key, _ = cache.update(new, new, 0)
        bound = key_norm_bound(cache, 0, key, size)
        assert bound is not None and torch.all(bound >= _norms(key) - 1e-6)
    assert torch.allclose(bound[0], _norms(key))
    cache.reorder_cache(torch.tensor([1, 1]))
    new = torch.full((2, 2, 1, 8), 9.0)
    key, _ = cache.update(new, new, 0)
    bound = key_norm_bound(cache, 0, key, 1)
    assert bound is not None and torch.all(bound >= _norms(key))


def test_where_no_bound_can_be_kept_there_is_none() -> None:
    config = build("llama").config
    new = torch.randn(2, 2, 3, 8)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        key, _ = cache.update(new, new, 0)
        assert key_norm_bound(cache, 0, key, 3) is not None
    key, _ = cache.update(9 * new, new, 0)
    assert key_norm_bound(cache, 0, key, 3) is None  # with gradients enabled the record is dropped
    with torch.no_grad():
        key, _ = cache.update(new, new, 0)
        bound = key_norm_bound(cache, 0, key, 3)
        assert bound is not None and torch.allclose(bound[0], _norms(key))
        assert key_norm_bound(cache, 1, key, 3) is None
        assert key_norm_bound(None, 0, key, 3) is None
        others = [
            DynamicCache(config=build("mistral").config),
            StaticCache(config=build("mistral").config, max_cache_len=40),
            lossless_quantized_cache(build("llama")),
        ]
        for other in others:
            for _ in range(2):
                key, _ = other.update(new, new, 0)
                assert key_norm_bound(other, 0, key, 3) is None


@torch.no_grad()
def test_offloaded_layers_carry_no_bound() -> None:
    """The keys of an offloaded layer are on another device when the attention runs; here they are another tensor."""
    config, new = build("llama").config, torch.randn(2, 2, 3, 8)
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=40)):
        for _ in range(2):
            key, _ = cache.update(new, new, 0)
            cache.layers[0].keys = cache.layers[0].keys.clone()
            assert key_norm_bound(cache, 0, key, 3) is None
