"""The same call over and over gives the same bits, whatever memory it is given: no race, nothing read unwritten."""

from __future__ import annotations

import random

import pytest
import torch

from hf_asentmax import entmax_attention

from kernel_cases import TOLERANCES, Case, definition, options, tensors
from reference import assert_close

NAMES = ("output", "dq", "dk", "dv")
# The attention of the synthetic recipe's training runs: a head a program, rows in registers, dense tiles.
SHAPES = {"single": 91, "short": 131, "dense": 300}


def repeated(case: Case, device: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients of `times` calls are those of the first, between calls that fill free memory with NaN.

    They are the definition's, and made by the kernels that the case is named after.
    """
    dense_launch = pytest.importorskip("hf_asentmax.backends.triton.dense.launch", reason="needs Triton")
    plain, chosen = dense_launch.regime, set()
    monkeypatch.setattr(dense_launch, "regime", lambda problem: chosen.add(plain(problem)) or plain(problem))
    *inputs, grad = tensors(case, device)
    settings = options(case, device)
    expected = definition(inputs, grad, settings)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    chance = random.Random(0)

    def run() -> list[torch.Tensor]:
        output = entmax_attention(*leaves, backend="triton", **settings)
        return [output, *torch.autograd.grad(output, leaves, grad)]

    first = run()
    assert chosen == {case.name}
    for name, one, reference in zip(NAMES, first, expected, strict=True):
        assert_close(name, one, reference, TOLERANCES[case.dtype] * (1 if name == "output" else 2))
    for _ in range(times):
        sizes = [int(tensor.numel() * chance.uniform(0.1, 2.0)) for tensor in first]
        junk = [torch.full((size,), float("nan"), dtype=case.dtype, device=device) for size in sizes]
        del junk[:: chance.choice((1, 2))]
        again = run()
        for name, one, other in zip(NAMES, first, again, strict=True):
            assert torch.equal(one, other), f"{name} differs from the first call's"


def case_of(regime: str, **sizes: int) -> Case:
    return Case(regime, q_len=SHAPES[regime], kind="sharp", alibi=True, dtype=torch.bfloat16, strided=True, **sizes)


@pytest.mark.parametrize("regime", SHAPES)
def test_calls_repeat(regime: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated(case_of(regime), device, 2, monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("regime", SHAPES)
def test_calls_of_a_training_run_repeat(regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated(case_of(regime, batch=512, heads=8), "cuda", 200, monkeypatch)
