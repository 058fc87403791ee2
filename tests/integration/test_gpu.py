"""The plugin on a CUDA GPU: the same results as on the CPU, and what only a GPU does (compiled static caches)."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from reference import assert_close
from tiny_models import perturb_scalings, random_ids, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

IDS = random_ids(3, 24)
MASK = torch.ones_like(IDS)
MASK[0, :9] = 0


def build(family: str = "llama") -> PreTrainedModel:
    model = tiny_model(family, "asentmax", {"positions": "nape"})
    perturb_scalings(model)
    model.generation_config.eos_token_id = None
    return model


def test_logits_and_gradients_equal_the_cpus(family: str) -> None:
    model = build(family)

    def run(device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.to(device)
        logits = model(IDS.to(device), attention_mask=MASK.to(device), use_cache=False).logits
        shown = logits[MASK.bool().to(device)]
        grads = torch.autograd.grad(shown.log_softmax(-1)[:, 5].sum(), list(model.parameters()))
        return shown.detach().cpu(), [grad.cpu() for grad in grads]

    (expected, expected_grads), (actual, grads) = run("cpu"), run("cuda")
    assert_close("logits", actual, expected, 1e-4)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert torch.allclose(grad, expected_grad, atol=1e-3 * float(expected_grad.abs().max()) + 1e-6)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_generation_with_a_compiled_static_cache(family: str) -> None:
    model = build(family).cuda()
    inputs = {"attention_mask": MASK.cuda(), "max_new_tokens": 12, "do_sample": False}
    dynamic = model.generate(IDS.cuda(), **inputs)
    assert torch.equal(model.generate(IDS.cuda(), cache_implementation="static", **inputs), dynamic)


def test_offloaded_cache() -> None:
    model = build().cuda()
    inputs = {"attention_mask": MASK.cuda(), "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(IDS.cuda(), **inputs)
    assert torch.equal(model.generate(IDS.cuda(), cache_implementation="offloaded", **inputs), plain)


@pytest.mark.parametrize("compiled", [False, True])
def test_training_in_bf16_lowers_the_loss(compiled: bool) -> None:
    model = build().cuda().train()
    step_model = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = step_model(IDS.cuda(), labels=IDS.cuda(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
