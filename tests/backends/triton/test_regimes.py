"""Lists and dense tiles side by side in one call: rows with a small support and rows with a large one."""

from __future__ import annotations

import pytest
import torch

from hf_asentmax import entmax_attention

from kernel_cases import TOLERANCES, Case, definition, options, tensors
from reference import assert_close


def mixed(case: Case, device: str) -> list[torch.Tensor]:
    """The case's tensors with every second block of 128 queries near-uniform."""
    query, key, value, grad = tensors(case, device)
    block = torch.arange(case.q_len, device=device) // 128
    query = query * torch.where(block % 2 == 1, 0.01, 4.0).to(query.dtype)[:, None]
    return [query, key, value, grad]


def check_mixed(case: Case, device: str) -> torch.Tensor:
    """Compares output and gradients with the definition; returns the overflow flags of the row blocks."""
    from hf_asentmax.backends.triton import planning

    flags = []
    plain = planning.lists_forward

    def recording(*args: object, **more: object) -> object:
        lists = plain(*args, **more)  # type: ignore[arg-type]
        flags.append(lists.overflow)
        traced = planning.new_state(args[0])  # type: ignore[arg-type]
        assert [(t.shape, t.dtype) for t in traced[3:]] == [(t.shape, t.dtype) for t in lists]  # type: ignore[attr-defined]
        return lists

    planning.lists_forward = recording  # type: ignore[assignment]
    try:
        *inputs, grad = mixed(case, device)
        settings = options(case, device)
        leaves = [tensor.requires_grad_() for tensor in inputs]
        output = entmax_attention(*leaves, backend="triton", **settings)
        results = [output, *torch.autograd.grad(output, leaves, grad)]
    finally:
        planning.lists_forward = plain
    expected = definition(inputs, grad, settings)
    for name, mine, exact in zip(("output", "dq", "dk", "dv"), results, expected, strict=True):
        assert_close(name, mine, exact, TOLERANCES[case.dtype] * (1 if name == "output" else 2))
    with torch.no_grad():  # lists without weights, no mean values, no block map
        alone = entmax_attention(*inputs, backend="triton", **settings)
    assert_close("output without a backward pass", alone, expected[0], TOLERANCES[case.dtype])
    return flags[0]


@pytest.mark.slow
def test_both_regimes_in_one_call(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_asentmax.backends.triton import planning

    monkeypatch.setattr(planning, "LISTS_FROM", 128)
    flags = check_mixed(Case("mixed", q_len=256, kv_len=290, heads=1, head_dim=16), device)
    assert flags.any() and not flags.all()


@pytest.mark.slow
def test_the_backward_pass_follows_the_forward_pass(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another choice in between changes nothing: what the forward pass kept decides."""
    from hf_asentmax.backends.triton import planning
    from hf_asentmax.backends.triton.common import launching

    monkeypatch.setattr(planning, "LISTS_FROM", 128)
    *inputs, grad = mixed(Case("mixed", q_len=256, kv_len=290, heads=1, head_dim=16), device)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    on = entmax_attention(*leaves, backend="triton")
    expected = torch.autograd.grad(on, leaves, grad, retain_graph=True)
    monkeypatch.setattr(planning, "LISTS_FROM", 1024)
    for name, mine, wanted in zip(("dq", "dk", "dv"), torch.autograd.grad(on, leaves, grad), expected, strict=True):
        assert_close(name, mine, wanted, 1e-6)
    launching.forget()
    off = entmax_attention(*leaves, backend="triton")
    monkeypatch.setattr(planning, "LISTS_FROM", 128)
    for name, mine, wanted in zip(("dq", "dk", "dv"), torch.autograd.grad(off, leaves, grad), expected, strict=True):
        assert_close(name, mine, wanted, 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "case",
    [
        Case("mixed-causal", q_len=7000, head_dim=64, dtype=torch.bfloat16),
        Case("mixed-alibi", q_len=2500, head_dim=64, dtype=torch.bfloat16, alibi=True, batch=2, mask="left"),
        Case("mixed-grouped", q_len=2200, heads=4, kv_heads=2, head_dim=128, dtype=torch.float16),
        Case("mixed-packed", q_len=3100, head_dim=80, dtype=torch.bfloat16, packed=(0, 100, 1200, 3100)),
        Case("mixed-exact", q_len=2200, head_dim=32),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_both_regimes_on_gpu(case: Case, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_asentmax.backends.triton import planning

    monkeypatch.setattr(planning, "LISTS_FROM", 2048)
    torch.use_deterministic_algorithms(deterministic)
    try:
        flags = check_mixed(case, "cuda")
        if deterministic:
            runs = []
            for _ in range(2):
                *inputs, grad = mixed(case, "cuda")
                leaves = [tensor.requires_grad_() for tensor in inputs]
                output = entmax_attention(*leaves, backend="triton", **options(case, "cuda"))
                runs.append([output, *torch.autograd.grad(output, leaves, grad)])
            assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert flags.any() and not flags.all()
