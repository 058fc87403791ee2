"""The same call over and over gives the same bits, whatever memory it is given: no race, nothing read unwritten."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from hf_asentmax import entmax_attention

from kernel_cases import TOLERANCES, Case, definition, options, tensors
from reference import assert_close

NAMES = ("output", "dq", "dk", "dv")
# Lengths of the synthetic recipe's training runs: one program holds a head, rows stay in registers, dense tiles.
SHAPES = {"head": 91, "short": 131, "dense": 300}
LAUNCHES = {
    "head": {"short_forward", "short_backward"},
    "short": {"short_forward", "dense_backward"},
    "dense": {"dense_forward", "dense_backward"},
}


def repeated(case: Case, device: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients of `times` calls are those of the first, between calls that fill free memory with NaN.

    They are the definition's, and made by the launches that LAUNCHES names.
    """
    planning = pytest.importorskip("hf_asentmax.backends.triton.planning", reason="needs Triton")
    chosen = set()

    def recording(function: Callable[..., None]) -> Callable[..., None]:
        def recorded(*args: object, **more: object) -> None:
            chosen.add(function.__name__)
            function(*args, **more)

        return recorded

    for name in ("short_forward", "short_backward", "dense_forward", "dense_backward"):
        monkeypatch.setattr(planning, name, recording(getattr(planning, name)))
    *inputs, grad = tensors(case, device)
    settings = options(case, device)
    expected = definition(inputs, grad, settings)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    chance = random.Random(0)

    def run() -> list[torch.Tensor]:
        output = entmax_attention(*leaves, backend="triton", **settings)
        return [output, *torch.autograd.grad(output, leaves, grad)]

    first = run()
    assert chosen == LAUNCHES[case.name]
    for name, one, reference in zip(NAMES, first, expected, strict=True):
        assert_close(name, one, reference, TOLERANCES[case.dtype] * (1 if name == "output" else 2))
    for _ in range(times):
        sizes = [int(tensor.numel() * chance.uniform(0.1, 2.0)) for tensor in first]
        junk = [torch.full((size,), float("nan"), dtype=case.dtype, device=device) for size in sizes]
        del junk[:: chance.choice((1, 2))]
        again = run()
        for name, one, other in zip(NAMES, first, again, strict=True):
            assert torch.equal(one, other), f"{name} differs from the first call's"


def case_of(name: str, **sizes: int) -> Case:
    return Case(name, q_len=SHAPES[name], kind="sharp", alibi=True, dtype=torch.bfloat16, strided=True, **sizes)


@pytest.mark.parametrize("name", SHAPES)
def test_calls_repeat(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated(case_of(name), device, 1, monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", SHAPES)
def test_calls_of_a_training_run_repeat(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated(case_of(name, batch=512, heads=8), "cuda", 200, monkeypatch)
