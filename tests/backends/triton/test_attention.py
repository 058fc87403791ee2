"""Outputs and gradients of the kernels against the definition in float64, over a grid of calls."""

from __future__ import annotations

import pytest
import torch

from hf_asentmax import entmax_attention

from kernel_cases import GPU_CASES, SMALL_CASES, TOLERANCES, Case, definition, options, tensors
from reference import assert_close

GPU_ONLY = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
# The largest for the interpreter; the other cases have forward and backward passes and masks of every regime too.
SLOW = {"dense-alibi", "dense-alibi-full", "dense-free-all", "dense-grouped", "dense-half-guess", "dense-half-uniform"}


def check(case: Case, device: str) -> None:
    *inputs, grad = tensors(case, device)
    settings = options(case, device)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = entmax_attention(*leaves, backend="triton", **settings)
    actual = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
    expected = definition(inputs, grad, settings)
    tolerance = TOLERANCES[case.dtype]
    if case.kind == "huge":  # scores of several thousand: float32 itself resolves the differences to 1e-3
        tolerance = max(tolerance, 5e-4)
    for name, mine, reference in zip(("output", "dq", "dk", "dv"), actual, expected, strict=True):
        if name in ("dq", "dk") and case.kind in ("equal", "one"):  # sums of q_len terms that cancel but for rounding
            assert (mine - reference).norm() <= 30 * tolerance * expected[3].norm()
            continue
        assert_close(f"{case.name}: {name}", mine, reference, tolerance * (1 if name == "output" else 2))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.name in SLOW)) for case in SMALL_CASES],
)
def test_small(case: Case, device: str) -> None:
    check(case, device)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=GPU_ONLY) for case in GPU_CASES])
def test_on_gpu(case: Case) -> None:
    check(case, "cuda")
