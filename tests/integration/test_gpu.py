"""The plugin on a CUDA GPU: the same results as on the CPU, and features that need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reference import assert_close, relative_error
from tiny_models import generating_model, perturb_scalings, random_ids, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

IDS = random_ids(3, 24)
MASK = torch.ones_like(IDS)
MASK[0, :9] = 0
NAPE = {"positions": "nape"}


def test_logits_and_gradients_equal_the_cpus(family: str) -> None:
    model = generating_model(family, NAPE)

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
    model = generating_model(family, NAPE).cuda()
    inputs = {"attention_mask": MASK.cuda(), "max_new_tokens": 12, "do_sample": False}
    dynamic = model.generate(IDS.cuda(), **inputs)
    assert torch.equal(model.generate(IDS.cuda(), cache_implementation="static", **inputs), dynamic)


@pytest.mark.parametrize(
    ("family", "cache"),
    [
        ("llama", "offloaded"),
        ("mistral", "offloaded"),
        ("gemma2", "offloaded"),
        ("gpt_neox", "offloaded"),
        ("llama", "offloaded_static"),  # which transformers refuses to models of windows alone (Mistral)
        ("gemma2", "offloaded_static"),
        ("gpt_neox", "offloaded_static"),
    ],
)
def test_offloaded_caches(family: str, cache: str) -> None:
    """transformers moves offloaded layers in CUDA streams, so these caches need a GPU with any attention.

    Before 5.20 transformers reused the memory of layers that the attention might still read.
    """
    pytest.importorskip("transformers", minversion="5.20")
    model = generating_model(family, NAPE).cuda()
    inputs = {"attention_mask": MASK.cuda(), "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(IDS.cuda(), **inputs)
    out = model.generate(IDS.cuda(), cache_implementation=cache, disable_compile=True, **inputs)
    assert torch.equal(out, plain)


@pytest.mark.parametrize("backend", ["fp8", "quanto", "hqq"])
def test_quantized_caches(backend: str) -> None:
    settings: dict[str, Any] = {"backend": backend}
    if backend == "fp8":
        pytest.importorskip("transformers", minversion="5.23")
    else:
        pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
        settings |= {"q_group_size": 8, "residual_length": 4}
    if backend == "hqq":
        settings |= {"nbits": 8, "axis_key": 1, "axis_value": 1}
    model = generating_model(flags=NAPE).cuda()
    out = model.generate(
        IDS.cuda(),
        attention_mask=MASK.cuda(),
        max_new_tokens=12,
        do_sample=False,
        cache_implementation="quantized",
        cache_config=settings,
        return_dict_in_generate=True,
        output_logits=True,
    )
    mask = torch.cat([MASK, torch.ones(3, 12, dtype=torch.long)], 1).cuda()
    with torch.no_grad():
        full = model(out.sequences, attention_mask=mask, use_cache=False).logits[:, 23:-1]
    assert_close("logits", torch.stack(out.logits, 1), full, 0.1)


@pytest.mark.parametrize("compiled", [False, True])
def test_training_in_bf16_lowers_the_loss(compiled: bool) -> None:
    model = generating_model(flags=NAPE).cuda().train()
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


@pytest.mark.parametrize("scaling", ["asentmax", "ssmax", "learned"])
@pytest.mark.parametrize(
    ("length", "dtype"),
    [(91, torch.float32), (91, torch.bfloat16), (333, torch.float32), (333, torch.bfloat16), (1100, torch.float32)],
)
@pytest.mark.parametrize("window", [False, True])
def test_gradients_of_compiled_training(scaling: str, length: int, dtype: torch.dtype, window: bool) -> None:
    """torch.compile pads the strides of large tensors; see backends/triton/row_products.py."""
    flags = {"positions": "nape", "scaling": scaling}
    sizes = {"hidden_size": 512, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 32}
    model = tiny_model("llama", "asentmax", flags, max_position_embeddings=2048, **sizes).cuda().train()
    perturb_scalings(model)
    ids = random_ids(16, length).cuda()
    attention_mask = torch.ones_like(ids, dtype=torch.bool)
    attention_mask[0, :7] = False
    if window:  # on the first eight heads, in a mask per head
        back = torch.arange(length, device="cuda")[:, None] - torch.arange(length, device="cuda")
        seen = (back >= 0).expand(16, -1, -1).clone()
        seen[:8] &= back < 16
        attention_mask = seen[None].expand(len(ids), -1, -1, -1)

    def gradients(run: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            logits = run(ids, attention_mask=attention_mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        return list(torch.autograd.grad(loss, list(model.parameters())))

    exact, plain = gradients(model, torch.float32), gradients(model, dtype)
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False)
    for actual in (gradients(compiled, dtype), gradients(compiled, dtype)):
        for (name, _), one, other, right in zip(model.named_parameters(), actual, plain, exact, strict=True):
            # A compiled model rounds to bfloat16 at other places, but it must be as close to float32 as uncompiled.
            assert_close(name, one, right, 1e-3 if dtype == torch.float32 else 0.02 + 2 * relative_error(other, right))
