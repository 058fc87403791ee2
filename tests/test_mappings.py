"""Properties of the mappings: those of alpha-entmax, and that softmax does not have them."""

from __future__ import annotations

import functools
from decimal import Decimal, localcontext

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from hf_asentmax.mappings import adaptive_temperature_softmax, entmax, entmax_threshold, softmax, top_k_softmax

from reference import assert_close, reference_entmax

ALPHAS = (1.25, 1.5, 1.75, 2.0)
rows = arrays(np.float64, st.integers(1, 40), elements=st.floats(-20, 20, width=32))
alphas = st.sampled_from((1.05, *ALPHAS))


@given(rows, alphas)
@settings(max_examples=150, deadline=None)
def test_is_the_definition(row: np.ndarray, alpha: float) -> None:
    scores = torch.from_numpy(row)
    assert torch.allclose(entmax(scores, alpha), reference_entmax(scores, alpha), atol=1e-9)


@given(rows, st.sampled_from((1.0, 1.05, *ALPHAS)))
@settings(max_examples=100, deadline=None)
def test_sums_to_one_and_ignores_a_constant(row: np.ndarray, alpha: float) -> None:
    scores = torch.from_numpy(row)
    weights = entmax(scores, alpha)
    assert bool((weights >= 0).all())
    assert torch.allclose(weights.sum(), torch.ones((), dtype=torch.float64))
    assert torch.allclose(entmax(scores + 17.25, alpha), weights, atol=1e-9)


@given(rows, st.sampled_from(ALPHAS), st.floats(0, 10))
@settings(max_examples=100, deadline=None)
def test_a_key_at_or_below_the_threshold_changes_nothing(row: np.ndarray, alpha: float, below: float) -> None:
    """Lemma 1 of the paper: more irrelevant keys do not change the weights. Softmax's weights do change."""
    scores = torch.from_numpy(row)
    tau, maximum = entmax_threshold(scores, alpha)
    irrelevant = (tau / (alpha - 1.0) + maximum - below).reshape(1)
    longer = torch.cat([scores, irrelevant])
    before, after = entmax(scores, alpha), entmax(longer, alpha)
    assert torch.allclose(after[:-1], before, atol=1e-9)
    assert after[-1] <= 1e-9
    assert bool((softmax(longer)[:-1] < softmax(scores)).all())


def test_exact_zeros_where_softmax_has_none() -> None:
    scores = torch.tensor([3.0, 2.5, 0.0, -1.0])
    assert (entmax(scores, 1.5) == 0).tolist() == [False, False, True, True]
    assert (softmax(scores) > 0).all()


def test_hand_computed() -> None:
    # alpha = 2: the mean of the two largest minus 1/2 is the threshold, (1.0 + 0.6 - 1) / 2 = 0.3
    assert torch.allclose(entmax(torch.tensor([1.0, 0.6, 0.0]), 2.0), torch.tensor([0.7, 0.3, 0.0]))
    # alpha = 1.5: z' = (0.4, 0), tau with (0.4 - tau)^2 + tau^2 = 1: tau = 0.2 - sqrt(0.46)
    tau = 0.2 - 0.46**0.5
    expected = torch.tensor([(0.4 - tau) ** 2, tau**2])
    assert torch.allclose(entmax(torch.tensor([0.8, 0.0]), 1.5), expected)


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_agrees_with_the_entmax_package(alpha: float) -> None:
    package = pytest.importorskip("entmax")
    scores = torch.randn(64, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    scores.requires_grad_()
    theirs = (package.entmax15 if alpha == 1.5 else package.sparsemax)(scores)
    ours = entmax(scores, alpha)
    grad = torch.randn_like(ours)
    assert_close("weights", ours, theirs, 1e-12)
    assert torch.equal(ours > 0, theirs > 0)
    (ours_grad,) = torch.autograd.grad(ours, scores, grad)
    (theirs_grad,) = torch.autograd.grad(theirs, scores, grad)
    assert_close("gradient", ours_grad, theirs_grad, 1e-10)


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_gradcheck(alpha: float) -> None:
    # well apart, so that finite differences do not cross the edge of the support
    scores = torch.tensor([[0.0, 0.9, 1.3, -3.0], [2.0, 1.7, 1.1, 0.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: entmax(z, alpha), (scores,), eps=1e-7, atol=1e-5)


SCORES = torch.tensor([[0.0, 0.9, 1.3, -3.0], [2.0, 1.7, 1.1, 0.2]], dtype=torch.float64)
NEAR_ONE = (1.0 + 2.0**-52, 1.0 + 1e-12, 1.0 + 1e-9, 1.0 + 1e-6, 1.0001, 1.001, 1.01, 1.0499)


def weights_in_60_digits(row: list[float], alpha: float) -> list[Decimal]:
    """The definition by bisection on tau in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        excess = Decimal(alpha) - 1
        shifted = [excess * (Decimal(score) - Decimal(max(row))) for score in row]

        def weights(tau: Decimal) -> list[Decimal]:
            return [((u - tau).ln() / excess).exp() if u > tau else Decimal(0) for u in shifted]

        low, high = Decimal(-1), -((-excess * Decimal(len(row)).ln()).exp())  # of one key, and of equal keys
        for _ in range(150):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(weights(middle)) >= 1 else (low, middle)
        return weights(low)


@pytest.mark.parametrize("alpha", [*NEAR_ONE, 1.0501])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_alpha_close_to_one(alpha: float, dtype: torch.dtype) -> None:
    """Annealing in steps gives an alpha a rounding error above 1."""
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    for row in ([0.5, -1.25, 3.0, 2.75, -8.0, 0.0], [0.0] * 5, [200.0, 0.0, -30.0]):
        scores = torch.tensor(row, dtype=dtype, requires_grad=True)
        exact = torch.tensor([float(weight) for weight in weights_in_60_digits(row, alpha)], dtype=torch.float64)
        weights = entmax(scores, alpha)
        assert (weights - exact).abs().max() <= tolerance
        upstream = torch.linspace(-1, 2, len(row), dtype=torch.float64)
        (grad,) = torch.autograd.grad(weights, scores, upstream.to(dtype))
        slope = torch.where(exact > 0, exact ** (2 - alpha), 0.0)
        assert (grad - slope * (upstream - (slope * upstream).sum() / slope.sum())).abs().max() <= 4 * tolerance


def test_alpha_close_to_one_in_long_rows_and_without_keys() -> None:
    scores = torch.randn(3, 50_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    scores[1, 100:] = -torch.inf
    scores[2] = -torch.inf
    for alpha in (1 + 1e-12, 1 + 1e-9):
        assert (entmax(scores, alpha) - softmax(scores)).abs().max() <= 100 * (alpha - 1)
        assert bool((entmax(scores, alpha)[2] == 0).all())
    below, above = entmax(scores, 1.05 - 1e-13), entmax(scores, 1.05)
    assert torch.allclose(below, above, rtol=1e-9, atol=1e-13), "the two forms agree where they meet"


@pytest.mark.parametrize("alpha", [1.0, 1.0 + 1e-9, 1.01, 1.25, 1.5, 2.0])
def test_second_gradients(alpha: float) -> None:
    scores = SCORES.clone()
    scores[0, 0] = -torch.inf
    visible = scores > -torch.inf
    leaf = SCORES.clone().requires_grad_()

    def mapped(z: torch.Tensor) -> torch.Tensor:
        return entmax(z.masked_fill(~visible, -torch.inf), alpha)

    assert torch.autograd.gradgradcheck(mapped, (leaf,), eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("alpha", [1.01, 1.25, 1.5, 2.0])
def test_second_gradients_of_rows_without_keys_are_zero(alpha: float) -> None:
    scores = torch.full((1, 3), -torch.inf, requires_grad=True)
    (first,) = torch.autograd.grad((entmax(scores, alpha) ** 2).sum(), scores, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), scores)
    assert bool((first == 0).all()) and bool((second == 0).all())


@pytest.mark.parametrize("alpha", [1.01, 1.5, 2.0])
def test_functional_transforms(alpha: float) -> None:
    def loss(row: torch.Tensor) -> torch.Tensor:
        return (entmax(row, alpha) * torch.arange(row.shape[-1])).sum()

    leaf = SCORES.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(torch.func.grad(loss)(SCORES), expected)
    assert torch.allclose(torch.func.vmap(torch.func.grad(loss))(SCORES), expected), "gradients per sample"
    by_column = torch.func.vmap(lambda z: entmax(z, alpha), in_dims=1)(SCORES.T.contiguous())
    assert torch.allclose(by_column, entmax(SCORES, alpha))
    hessian = torch.func.jacrev(torch.func.jacrev(loss))(SCORES[0])
    assert torch.allclose(hessian, torch.autograd.functional.hessian(loss, SCORES[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [1.0, 1.05, *ALPHAS])
def test_extreme_rows_stay_finite_and_right(dtype: torch.dtype, alpha: float) -> None:
    inf = float("inf")
    scores = torch.tensor(
        [
            [1e4, 0.0, -1e4, 1.0],
            [-1e4, -1e4, -1e4, -1e4],
            [1e4, 1e4, 1e4, 1e4],
            [-inf, -inf, 3.0, -inf],
            [-inf, -inf, -inf, -inf],
            [0.0, -inf, 0.0, -inf],
        ],
        dtype=dtype,
        requires_grad=True,
    )
    expected = torch.tensor([[1.0, 0, 0, 0], [0.25] * 4, [0.25] * 4, [0, 0, 1.0, 0], [0.0] * 4, [0.5, 0, 0.5, 0]])
    weights = entmax(scores, alpha)
    assert weights.dtype == torch.float32
    assert torch.allclose(weights, expected, atol=1e-5)
    (grad,) = torch.autograd.grad((weights * torch.arange(4.0)).sum(), scores)
    assert bool(torch.isfinite(grad).all())
    assert bool((grad[4] == 0).all()), "a row that sees no key must send no gradient"
    assert bool((grad[scores == -inf] == 0).all())


@pytest.mark.parametrize("kind", ["normal", "near-uniform", "sharp", "linear", "two-level"])
@pytest.mark.parametrize("alpha", [1.05, *ALPHAS])
def test_long_rows_in_float32(kind: str, alpha: float) -> None:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(2, 8_000, dtype=torch.float64, generator=generator)
    scores = {
        "normal": normal,
        "near-uniform": normal * 0.05,
        "sharp": normal * 8,
        "linear": -torch.linspace(0, 2, 8_000, dtype=torch.float64)[None],
        "two-level": torch.cat([torch.zeros(1, 1), torch.full((1, 7_999), -1.9)], -1).double(),
    }[kind]
    assert_close("float64", entmax(scores, alpha), reference_entmax(scores, alpha), 1e-9)
    assert_close("float32", entmax(scores.float(), alpha), reference_entmax(scores.float(), alpha), 1e-5)


def test_the_compiled_mapping_is_the_same() -> None:
    scores = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)).masked_fill(
        torch.eye(50)[:8] > 0, -torch.inf
    )
    for alpha in (1.01, 1.5):
        compiled = torch.compile(functools.partial(entmax, alpha=alpha), fullgraph=True, backend="aot_eager")
        results = []
        for function in (compiled, functools.partial(entmax, alpha=alpha)):
            leaf = scores.clone().requires_grad_()
            weights = function(leaf)
            results.append((weights, *torch.autograd.grad(weights.square().sum(), leaf)))
        assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*results, strict=True))


def test_top_k() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, -torch.inf]])
    assert torch.allclose(top_k_softmax(scores, 2), softmax(torch.tensor([[-torch.inf, 3.0, 2.0, -torch.inf]])))
    assert torch.equal(top_k_softmax(scores, 3), softmax(scores))
    assert torch.equal(top_k_softmax(scores, 9), softmax(scores))
    assert (top_k_softmax(torch.full((1, 5), -torch.inf), 2) == 0).all()
    equal = top_k_softmax(torch.zeros(1, 6), 2)
    assert (equal > 0).sum() == 2, "k keys, also among equals"


def test_adaptive_temperature_sharpens_only_spread_rows() -> None:
    spread, sharp = torch.zeros(1, 64), torch.tensor([[9.0, 0.0, 0.0]])
    spread[0, 0] = 1.0
    assert adaptive_temperature_softmax(spread)[0, 0] > softmax(spread)[0, 0]
    assert torch.allclose(adaptive_temperature_softmax(sharp), softmax(sharp))


@pytest.mark.parametrize("alpha", [0.9, 2.1, float("nan"), "1.5", True, None])
def test_bad_alpha(alpha: object) -> None:
    with pytest.raises(ValueError, match="alpha must be a number from 1"):
        entmax(torch.zeros(3), alpha)  # type: ignore[arg-type]


def test_integer_scores_are_refused() -> None:
    with pytest.raises(TypeError, match="floating point, got torch.int64"):
        entmax(torch.arange(4), 1.5)


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_bad_k(k: object) -> None:
    with pytest.raises(ValueError, match="top_k must be a whole number"):
        top_k_softmax(torch.zeros(3), k)  # type: ignore[arg-type]
