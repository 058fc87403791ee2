"""Token by token equals one full forward, with every cache and way of generating that runs on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StaticCache

from tiny_models import PRESETS, perturb_scalings, random_ids, tiny_model

NEW = 10
IDS = random_ids(3, 12)
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
MASK[1, :2] = 0


def build(family: str, flags: Any = None, preset: str = "asentmax") -> PreTrainedModel:
    model = tiny_model(family, preset, flags)
    perturb_scalings(model)
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, positions: bool = False) -> torch.Tensor:
    """Greedy decoding by full forwards, without any cache."""
    for _ in range(NEW):
        position_ids = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if positions else {}
        last = model(ids, attention_mask=mask, use_cache=False, **position_ids).logits[:, -1]
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "sliding": {"cache_implementation": "sliding_window", "disable_compile": True},
    "chunked prefill": {"prefill_chunk_size": 5},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("cache", CACHES)
def test_greedy(family: str, cache: str) -> None:
    model = build(family, {"positions": "nape"})
    out = model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=False, **CACHES[cache])
    assert torch.equal(out, greedy(model, IDS, MASK))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_every_preset_with_the_models_own_positions(family: str, preset: str) -> None:
    model = build(family, {"top_k": 4} if preset == "topk_softmax" else None, preset)
    out = model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, greedy(model, IDS, MASK, positions=True))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_logits_of_each_step_equal_the_full_forward(family: str, kind: str) -> None:
    model = build(family, {"positions": "nape"})
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


def test_beams() -> None:
    """A beam's score is the log-probability that full forwards give its tokens."""
    model = build("llama", {"positions": "nape"})
    out = model.generate(
        IDS,
        attention_mask=MASK,
        max_new_tokens=6,
        num_beams=3,
        do_sample=False,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    mask = torch.cat([MASK, torch.ones(3, 6, dtype=torch.long)], 1)
    with torch.no_grad():
        log_probabilities = model(out.sequences, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    chosen = log_probabilities[:, 11:-1].gather(-1, out.sequences[:, 12:, None])[..., 0].sum(-1)
    assert torch.allclose(chosen, out.sequences_scores, atol=1e-4)
    one_best = model.generate(IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        greedy_probabilities = model(one_best, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    greedy_score = greedy_probabilities[:, 11:-1].gather(-1, one_best[:, 12:, None])[..., 0].sum(-1)
    assert bool((out.sequences_scores >= greedy_score - 1e-4).all())


def test_sampling_is_seeded_and_batched_rows_do_not_mix() -> None:
    model = build("llama", {"positions": "nape"})
    torch.manual_seed(3)
    first = model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=True, top_k=1)
    assert torch.equal(first, greedy(model, IDS, MASK))  # the only token left to sample
    draws = []
    for _ in range(2):
        torch.manual_seed(4)
        draws.append(model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=True))
    assert torch.equal(*draws)


def test_assisted_decoding() -> None:
    model = build("llama", {"positions": "nape"})
    ids = torch.cat([IDS[:1], IDS[:1], IDS[:1]], 1)
    plain = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=3), plain)


def test_static_cache_compiled() -> None:
    model = build("llama", {"positions": "nape"})
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    cache = StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        model(IDS[:1, :8], past_key_values=cache, use_cache=True)
        outs = [compiled(IDS[:1, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(8, 12)]
        full = model(IDS[:1], use_cache=False).logits
    assert torch.allclose(torch.cat(outs, 1), full[:, 8:], atol=5e-6)


def test_continuous_batching_is_refused() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="not supported for continuous batching|can.t be switched"):
        model.generate_batch([[3, 4, 5], [6, 7]], max_new_tokens=2)
