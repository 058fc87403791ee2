"""Powers of alpha-entmax: whole exponents by multiplications, and scores so far apart that a power leaves float32."""

from __future__ import annotations

import math

import pytest
import torch

from hf_asentmax import entmax_attention

from reference import assert_close

LENGTH, HEAD_DIM = 300, 16


def one_high_key(height: float, queries: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """query, key, value with random scores, except for one key whose score is `height` above the rest for every query.

    No sample of evenly spaced or nearest keys holds that key.
    """
    torch.manual_seed(0)
    query = torch.randn(1, 1, queries, HEAD_DIM)
    key, value = torch.randn(1, 1, LENGTH, HEAD_DIM), torch.randn(1, 1, LENGTH, HEAD_DIM)
    largest = min(height, 1e4)  # float16 holds it
    query[..., 0], key[..., 0] = math.sqrt(HEAD_DIM) * height / largest, 0.0
    key[0, 0, 101, 0] = largest
    return [tensor.to(device=device, dtype=dtype) for tensor in (query, key, value)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("alpha", "height"), [(1.05, 2e3), (1.05, 1e5), (1.125, 2e5), (1.125, 1e6)])
def test_a_key_far_above_the_sample(alpha: float, height: float, dtype: torch.dtype, device: str) -> None:
    # With slopes the kernel guesses from a sample; slope 0 is that of NAPE's heads without ALiBi
    slopes = torch.zeros(1, device=device)
    results = []
    for kind, backend in ((dtype, "triton"), (torch.float64, "eager")):
        inputs = [t.to(kind).requires_grad_() for t in one_high_key(height, LENGTH, dtype, device)]
        output = entmax_attention(*inputs, alpha=alpha, alibi_slopes=slopes, backend=backend)
        results.append([output.detach(), *torch.autograd.grad(output.sum(), inputs)])
    assert all(tensor.isfinite().all() for tensor in results[0])
    ours, definition = (result[0].double() for result in results)
    # Rows from 101 on give all their weight to the one key; float32 rounds away the scores of the rows before
    assert (ours - definition)[:, :, 101:].norm() < 1e-3 * definition[:, :, 101:].norm()


@pytest.mark.parametrize(("alpha", "height"), [(1.05, 1e5), (1.05, 1e10), (1.125, 1e12)])
def test_decoding_with_a_key_far_above(alpha: float, height: float, device: str) -> None:
    query, key, value = one_high_key(height, 1, torch.float32, device)
    output = entmax_attention(query, key, value, alpha=alpha, backend="triton")
    torch.testing.assert_close(output[0, 0, 0], value[0, 0, 101], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "exponent"), [*((60, exponent) for exponent in range(2, 21)), (150, 3), (150, 4), (150, 8)]
)
def test_whole_exponents(length: int, exponent: int, device: str) -> None:
    """alpha = 1 + 1/exponent, in the short and the dense kernels: output and gradients against float64."""
    torch.manual_seed(0)
    alpha = 1 + 1 / exponent
    exact = [torch.randn(1, 2, length, 16, dtype=torch.float64, device=device).requires_grad_() for _ in range(3)]
    grad = torch.randn(1, 2, length, 16, dtype=torch.float64, device=device)
    single = [tensor.detach().float().requires_grad_() for tensor in exact]
    expected = entmax_attention(*exact, alpha=alpha, backend="eager")
    output = entmax_attention(*single, alpha=alpha, backend="triton")
    results = [output, *torch.autograd.grad(output, single, grad.float())]
    wanted = [expected, *torch.autograd.grad(expected, exact, grad)]
    for name, ours, definition in zip(("output", "dq", "dk", "dv"), results, wanted, strict=True):
        assert_close(name, ours, definition, 2e-5)
