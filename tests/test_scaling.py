"""The length scalings against numbers computed by hand (in the comments), as modules and inside a model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_asentmax.integration.forward import asentmax_attention_forward
from hf_asentmax.mappings import adaptive_temperature, adaptive_temperature_softmax
from hf_asentmax.scaling import (
    AsentmaxScaling,
    LearnedScaling,
    LengthScaling,
    SSMaxScaling,
    build_scaling,
)

from tiny_models import tiny_model


def counts(*values: int) -> torch.Tensor:
    """The number of visible keys of each query, (1, 1, q_len)."""
    return torch.tensor(values)[None, None]


def assert_numbers(actual: torch.Tensor, expected: list[float], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        actual.detach().double().flatten(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


# --- SSMax: s log n


def test_ssmax_numbers():
    scaling = SSMaxScaling(2)
    with torch.no_grad():
        scaling.s.copy_(torch.tensor([1.0, 0.43]))
    factor = scaling(torch.empty(1, 4, 8), counts(1, 2, 10, 100))
    assert factor.shape == (1, 2, 4)
    assert_numbers(factor[0, 0], [0.0, 0.693147, 2.302585, 4.605170])  # log 1, log 2, log 10, log 100
    assert_numbers(factor[0, 1], [0.0, 0.298053, 0.990112, 1.980223])  # 0.43 times those


# --- ASEntmax: delta + softplus(.) log(1 + n)^(gamma_range tanh(.))


@pytest.mark.parametrize(
    ("beta_bias", "gamma_bias", "gamma_range", "delta", "visible", "expected"),
    [
        # gamma = 0: 1 + log 2 at any length
        (0.0, 0.0, 2.0, 1.0, 1, 1.693147),
        (0.0, 0.0, 2.0, 1.0, 1000, 1.693147),
        # softplus(1) = 1.313262, 2 tanh(0.5) = 0.924234, log(10)^0.924234 = 2.161583: 1 + 1.313262 * 2.161583
        (1.0, 0.5, 2.0, 1.0, 9, 3.838726),
        # log(10)^-0.924234 = 0.462624
        (1.0, -0.5, 2.0, 1.0, 9, 1.607546),
        # 3 tanh(0.5) = 1.386351, log(10)^1.386351 = 3.178032
        (1.0, 0.5, 3.0, 1.0, 9, 5.173588),
        # tanh(0.5) = 0.462117, log(10)^0.462117 = 1.470232, no constant
        (1.0, 0.5, 1.0, 0.0, 9, 1.930800),
        # softplus(-2) = 0.126928, 2 tanh(1) = 1.523188, log(100)^1.523188 = 10.238774
        (-2.0, 1.0, 2.0, 1.0, 99, 2.299588),
    ],
)
def test_asentmax_numbers(
    beta_bias: float, gamma_bias: float, gamma_range: float, delta: float, visible: int, expected: float
):
    scaling = AsentmaxScaling(1, 4, delta, gamma_range)
    with torch.no_grad():
        scaling.beta_bias.fill_(beta_bias)
        scaling.gamma_bias.fill_(gamma_bias)
    assert_numbers(scaling(torch.randn(1, 1, 4), counts(visible)), [expected])


def test_asentmax_projects_the_layers_input():
    """x = (1, 2): w_beta x + b = 0.5 + 0.5 - 0.5 = 0.5 and w_gamma x + b = 1 - 1 + 0.25 = 0.25."""
    scaling = AsentmaxScaling(2, 2, 1.0, 2.0)
    with torch.no_grad():
        scaling.beta_weight.copy_(torch.tensor([[0.5, 0.25], [0.0, 0.0]]))
        scaling.beta_bias.copy_(torch.tensor([-0.5, 0.0]))
        scaling.gamma_weight.copy_(torch.tensor([[1.0, -0.5], [0.0, 0.0]]))
        scaling.gamma_bias.copy_(torch.tensor([0.25, 0.0]))
    factor = scaling(torch.tensor([[[1.0, 2.0]]]), counts(9))
    # softplus(0.5) = 0.974077, 2 tanh(0.25) = 0.489837, log(10)^0.489837 = 1.504623: 1 + 0.974077 * 1.504623
    assert_numbers(factor, [2.465618, 1.693147])


def test_asentmax_follows_each_query_and_row():
    scaling = AsentmaxScaling(3, 8, 1.0, 2.0)
    with torch.no_grad():
        for parameter in scaling.parameters():
            parameter.normal_()
    inputs, visible = torch.randn(2, 5, 8), torch.randint(1, 50, (2, 1, 5))
    factor = scaling(inputs, visible)
    assert factor.shape == (2, 3, 5)
    for row in range(2):
        for query in range(5):
            alone = scaling(inputs[row : row + 1, query : query + 1], visible[row : row + 1, :, query : query + 1])
            torch.testing.assert_close(factor[row, :, query], alone[0, :, 0])


# --- learned: delta + beta_h log(1 + n)^gamma_h


@pytest.mark.parametrize(
    ("beta", "gamma", "delta", "visible", "expected"),
    [
        (0.5, 0.1, 1.0, 9, 1.543490),  # log(10)^0.1 = 1.086980
        (0.25, -1.0, 1.0, 99, 1.054287),  # 0.25 / 4.605170
        (0.5, 2.0, 0.0, 1, 0.240227),  # 0.5 * 0.693147^2
    ],
)
def test_learned_numbers(beta: float, gamma: float, delta: float, visible: int, expected: float):
    scaling = LearnedScaling(1, delta)
    with torch.no_grad():
        scaling.beta.fill_(beta)
        scaling.gamma.fill_(gamma)
    assert_numbers(scaling(torch.empty(1, 1, 4), counts(visible)), [expected])


# --- adaptive temperature (Velickovic et al. 2024)


def test_adaptive_temperature_numbers():
    """-0.037 H^4 + 0.481 H^3 - 2.3 H^2 + 4.917 H - 1.791, e.g. H = 2: -0.592 + 3.848 - 9.2 + 9.834 - 1.791 = 2.099."""
    entropy = torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 4.3], dtype=torch.float64)
    expected = [1.27, 1.8455625, 2.099, 2.1968125, 2.25, 2.389, 2.4184033]
    assert_numbers(adaptive_temperature(entropy), expected, 1e-7)


def test_adaptive_temperature_is_off_where_the_row_is_sharp():
    """H <= 0.5 is 1 by definition; the polynomial itself stays below 1 up to H = 0.85."""
    assert_numbers(adaptive_temperature(torch.tensor([0.0, 0.3, 0.5, 0.6, 0.8])), [1.0] * 5)


def test_adaptive_temperature_grows_with_entropy_and_never_falls_below_one():
    """The polynomial increases with entropy. With the coefficients reversed it would fall to -262 at H = 4.3."""
    entropy = torch.linspace(0.5, 4.3, 400, dtype=torch.float64)
    factor = adaptive_temperature(entropy)
    assert factor.min() >= 1.0
    assert (factor.diff() >= 0).all()
    assert (factor[entropy > 0.9].diff() > 0).all()
    assert factor[-1] > 2.4
    reversed_polynomial = sum(c * entropy**power for power, c in enumerate((-0.037, 0.481, -2.3, 4.917, -1.791)))
    assert not (reversed_polynomial.clamp_min(1.0).diff() >= 0).all(), "this test could not tell the orders apart"


@given(st.floats(0, 12))
def test_adaptive_temperature_never_softens(entropy: float):
    assert adaptive_temperature(torch.tensor(entropy)).item() >= 1.0


def test_adaptive_temperature_softmax_numbers():
    """softmax(1.5, 1, 0.5, 0, -0.5) has H = 1.394285, P(H) = 1.757363; softmax of 1.757363 times the scores."""
    scores = torch.tensor([1.5, 1.0, 0.5, 0.0, -0.5])
    assert_numbers(adaptive_temperature_softmax(scores), [0.591986, 0.245870, 0.102117, 0.042412, 0.017615])
    # softmax(2, 1, 0) has H = 0.832396, P(H) = 0.968: below 1, so plain softmax
    assert_numbers(adaptive_temperature_softmax(torch.tensor([2.0, 1.0, 0.0])), [0.665241, 0.244728, 0.090031])


# --- start, types, shapes


ALL_SCALINGS = {
    "ssmax": lambda: SSMaxScaling(4),
    "asentmax": lambda: AsentmaxScaling(4, 8, 1.0, 2.0),
    "learned": lambda: LearnedScaling(4, 1.0),
}


def test_start_of_ssmax_is_one():
    assert SSMaxScaling(4).s.tolist() == [1.0] * 4


def test_start_of_asentmax_is_zero_and_independent_of_length():
    scaling = AsentmaxScaling(4, 8, 1.0, 2.0)
    assert all((parameter == 0).all() for parameter in scaling.parameters())
    factor = scaling(torch.randn(1, 3, 8), counts(1, 64, 65536))
    assert_numbers(factor, [1 + math.log(2)] * 12)


def test_start_of_learned_has_the_authors_distributions():
    scaling = LearnedScaling(4000, 1.0)
    assert scaling.beta.min() >= 0.1 and scaling.beta.max() <= 1.0
    assert abs(scaling.beta.mean().item() - 0.55) < 0.02
    assert abs(scaling.gamma.mean().item()) < 0.01 and abs(scaling.gamma.std().item() - 0.1) < 0.01


@pytest.mark.parametrize("name", ALL_SCALINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_factor_is_float32_at_least(name: str, dtype: torch.dtype):
    """A long row's factor in half precision would be off by up to 0.4%."""
    scaling = ALL_SCALINGS[name]().to(dtype)
    factor = scaling(torch.randn(2, 3, 8, dtype=dtype), torch.tensor([[[70001, 70002, 70003]]]))
    assert factor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert factor.shape in ((1, 4, 3), (2, 4, 3))
    assert torch.isfinite(factor).all()


def test_inputs_of_another_type_than_the_parameters():
    """Under autocast the layer's input may be in half precision and the parameters in float32, or the reverse."""
    for parameters, inputs in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        factor = ALL_SCALINGS["asentmax"]().to(parameters)(torch.randn(1, 2, 8, dtype=inputs), counts(3, 4))
        assert_numbers(factor, [1.693147] * 8)


@pytest.mark.parametrize("name", ALL_SCALINGS)
def test_one_key_and_no_key_stay_finite(name: str):
    """log 1 = 0 under a negative power would be infinite, and so would its gradient."""
    scaling = ALL_SCALINGS[name]()
    with torch.no_grad():
        for parameter in scaling.parameters():
            parameter.fill_(-2.0)
    factor = scaling(torch.ones(1, 2, 8), counts(0, 1))
    factor.sum().backward()
    assert torch.isfinite(factor).all()
    assert all(torch.isfinite(p.grad).all() for p in scaling.parameters() if p.grad is not None)


def test_gradients_reach_beta_and_gamma_from_the_start():
    scaling = ALL_SCALINGS["asentmax"]()
    scaling(torch.randn(1, 3, 8), counts(5, 6, 7)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in scaling.parameters())


@pytest.mark.parametrize("name", ALL_SCALINGS)
def test_gradcheck(name: str):
    scaling = ALL_SCALINGS[name]().double()
    with torch.no_grad():
        for parameter in scaling.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    inputs = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=name == "asentmax")
    visible = torch.tensor([[[1, 5, 9]], [[2, 2, 300]]])

    def factor(inputs: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        named = dict(zip((n for n, _ in scaling.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(scaling, named, (inputs, visible))

    assert torch.autograd.gradcheck(factor, (inputs, *scaling.parameters()))


def test_build_scaling():
    kinds = {"ssmax": SSMaxScaling, "asentmax": AsentmaxScaling, "learned": LearnedScaling}
    for name in ("none", "ssmax", "asentmax", "learned", "adaptive_temperature"):
        built = build_scaling(name, num_heads=2, hidden_size=4, delta=1.0, gamma_range=2.0)
        assert built is None if name not in kinds else type(built) is kinds[name]
        assert built is None or (isinstance(built, LengthScaling) and built.num_heads == 2)


def test_repr_says_the_constants():
    assert "num_heads=4, delta=1.0, gamma_range=2.0" in repr(ALL_SCALINGS["asentmax"]())


# --- inside a model: the weights that one attention layer gives, read off with one-hot values


def attention_weights(
    name: str, scores: list[float], flags: dict[str, object] | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The weights (heads, q_len, kv_len) of a Llama attention in eval mode where all queries have these scores."""
    model = tiny_model("llama", name, flags, num_key_value_heads=4)
    module = model.model.layers[0].self_attn
    length = len(scores)
    query = torch.zeros(1, 4, length, 8)
    query[..., 0] = 1.0
    key = torch.zeros(1, 4, length, 8)
    key[..., 0] = torch.tensor(scores)
    value = torch.eye(length).expand(1, 4, length, length)
    with torch.no_grad():
        output, _ = asentmax_attention_forward(
            module, query, key, value, mask, scaling=1.0, asentmax_hidden_states=torch.randn(1, length, 32)
        )
    return output[0].transpose(0, 1)


def test_ssmax_in_a_model():
    """softmax(log(n) z) has weights n^z: n = 2: (2, 1)/3; n = 3: (3, 1, 9)/13."""
    weights = attention_weights("ssmax", [1.0, 0.0, 2.0])
    for head in weights:
        assert_numbers(head[0], [1, 0, 0])
        assert_numbers(head[1], [2 / 3, 1 / 3, 0])
        assert_numbers(head[2], [3 / 13, 1 / 13, 9 / 13])


def test_ssmax_counts_visible_keys_not_positions():
    """The first key is padding: the last query sees 2 keys, (2^0, 2^2)/5."""
    mask = torch.tensor([[False, False, False], [False, True, False], [False, True, True]])[None, None]
    weights = attention_weights("ssmax", [1.0, 0.0, 2.0], mask=mask)
    assert_numbers(weights[0, 0], [0, 0, 0])
    assert_numbers(weights[0, 1], [0, 1, 0])
    assert_numbers(weights[0, 2], [0, 1 / 5, 4 / 5])


def test_asentmax_in_a_model():
    """The initial factor is 1.693147, so the halved scores are (0.846574, 0, 1.693147), and 0 is outside the support.

    For two keys at distance d = 0.423287 from their mean m, m - tau = sqrt(1/2 - d^2) = 0.566417 and
    p = (0.566417 -+ 0.423287)^2.
    """
    weights = attention_weights("asentmax", [1.0, 0.0, 2.0])
    for head in weights:
        assert_numbers(head[2], [0.020486, 0.0, 0.979514])
        assert head[2, 1] == 0


def test_adaptive_temperature_in_a_model():
    weights = attention_weights("adaptive_temperature", [1.5, 1.0, 0.5, 0.0, -0.5])
    for head in weights:
        assert_numbers(head[4], [0.591986, 0.245870, 0.102117, 0.042412, 0.017615])


def test_only_the_heads_without_alibi_are_scaled_under_nape():
    """2 ALiBi heads, slopes 1 and 1/2, unscaled softmax; 2 NoPE heads with SSMax: (3, 1, 9)/13."""
    weights = attention_weights("ssmax", [1.0, 0.0, 2.0], {"positions": "nape"})
    assert_numbers(weights[0, 2], torch.softmax(torch.tensor([1.0 - 2, 0.0 - 1, 2.0]), 0).tolist())
    assert_numbers(weights[1, 2], torch.softmax(torch.tensor([1.0 - 1, 0.0 - 0.5, 2.0]), 0).tolist())
    for head in weights[2:]:
        assert_numbers(head[2], [3 / 13, 1 / 13, 9 / 13])


def test_a_mask_per_head_counts_per_head():
    """Also under NAPE, where only the last heads are scaled."""
    mask = torch.ones(3, 3, dtype=torch.bool).tril().expand(1, 4, 3, 3).clone()
    mask[0, 3, :, 0] = False
    mask[0, 1, 2, 1] = False
    for flags in (None, {"positions": "nape"}):
        weights = attention_weights("ssmax", [1.0, 0.0, 2.0], flags, mask)
        assert_numbers(weights[2, 2], [3 / 13, 1 / 13, 9 / 13])
        assert_numbers(weights[3, 2], [0, 1 / 5, 4 / 5])
