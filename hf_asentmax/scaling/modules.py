"""Length scalings: a factor on each query's scores that depends on how many keys the query sees.

The factor multiplies the query, so neither the mappings nor the kernels know about it.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["AsentmaxScaling", "LearnedScaling", "LengthScaling", "SSMaxScaling", "build_scaling"]


class LengthScaling(nn.Module):
    """The base class of the scalings with parameters: one factor per query and head.

    The parameters are plain tensors and not ``nn.Linear``, so that quantizers and "all-linear" adapters ignore them.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def reset_parameters(self) -> None:
        """Set the parameters to their initial values, in place."""
        raise NotImplementedError

    def forward(self, hidden_states: torch.Tensor, visible_count: torch.Tensor) -> torch.Tensor:
        """The factor of each query and head.

        Args:
            hidden_states: (batch, q_len, hidden_size), the attention's (normalised) input.
            visible_count: (batch or 1, heads or 1, q_len) int, the number of keys that each query sees.

        Returns:
            (batch or 1, num_heads, q_len), float32 (float64 for float64 parameters).
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


def _log_count(visible_count: torch.Tensor, offset: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.log((visible_count.clamp_min(1) + offset).to(dtype))


def _factor_dtype(parameter: torch.Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _softplus(inputs: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)). torch.compile assumes wrong strides for the gradient of torch's own softplus."""
    return torch.logaddexp(inputs, inputs.new_zeros(()))


def _projected(
    inputs: torch.Tensor, weights: tuple[torch.Tensor, ...], biases: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """inputs @ weight.T + bias for each weight, in few kernels, because launches dominate at this size.

    For one row (decoding) this is a sum of products, which torch.compile fuses with the operations after it; a library
    product would take three kernels for each weight. For more rows it is one product for all weights.
    """
    if inputs.shape[1] == 1:
        dtype = torch.promote_types(weights[0].dtype, torch.float32)
        row = inputs.to(dtype)[:, :, None]
        return tuple((row * weight.to(dtype)).sum(dim=-1) + bias for weight, bias in zip(weights, biases, strict=True))
    return nn.functional.linear(inputs, torch.cat(weights), torch.cat(biases)).chunk(len(weights), dim=-1)


class SSMaxScaling(LengthScaling):
    r"""SSMax: s_h log n_i, one learned s per head ("Scalable-Softmax is superior for attention", Nakanishi 2025).

    s starts at 1. (The ASEntmax authors' code draws it from N(1, 0.01).)
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__(num_heads)
        self.s = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.s)

    def forward(self, hidden_states: torch.Tensor, visible_count: torch.Tensor) -> torch.Tensor:
        dtype = _factor_dtype(self.s)
        return self.s.to(dtype)[:, None] * _log_count(visible_count, 0, dtype)


class AsentmaxScaling(LengthScaling):
    r"""ASEntmax: delta + beta_i (log(1 + n_i))^{gamma_i} (ICLR 2026, section 3).

    .. math::
        \beta_i = \mathrm{softplus}(W_\beta x_i + b_\beta), \qquad
        \gamma_i = \mathrm{gamma\_range} \cdot \tanh(W_\gamma x_i + b_\gamma)

    The logarithm is of 1 + n_i, as in the authors' code, because log 1 = 0 has no negative powers.

    **Initial values.** All projections and biases are zero. Then beta = log 2 and gamma = 0, every score is multiplied
    by delta + log 2 at any length, and beta and gamma both receive gradients from the first step. With alpha = 1.5,
    which multiplies scores by alpha - 1 = 1/2, this is nearly neutral. The paper does not state initial values. With
    the default of the authors' code (normal, 0.02), an independent group left MQMTAR's loss plateau in 0 of 10 runs;
    with zero projections, in 3 of 3.
    """

    def __init__(self, num_heads: int, hidden_size: int, delta: float, gamma_range: float) -> None:
        super().__init__(num_heads)
        self.delta = delta
        self.gamma_range = gamma_range
        self.beta_weight = nn.Parameter(torch.empty(num_heads, hidden_size))
        self.beta_bias = nn.Parameter(torch.empty(num_heads))
        self.gamma_weight = nn.Parameter(torch.empty(num_heads, hidden_size))
        self.gamma_bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def forward(self, hidden_states: torch.Tensor, visible_count: torch.Tensor) -> torch.Tensor:
        dtype = _factor_dtype(self.beta_weight)
        inputs = hidden_states.to(self.beta_weight.dtype)
        beta, gamma = _projected(
            inputs, (self.beta_weight, self.gamma_weight), (self.beta_bias, self.gamma_bias)
        )  # fmt: skip
        beta, gamma = _softplus(beta.to(dtype)), torch.tanh(gamma.to(dtype))
        beta, gamma = beta.transpose(1, 2), self.gamma_range * gamma.transpose(1, 2)
        return self.delta + beta * _log_count(visible_count, 1, dtype).pow(gamma)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, delta={self.delta}, gamma_range={self.gamma_range}"


class LearnedScaling(LengthScaling):
    r"""The paper's ablation: delta + beta_h (log(1 + n_i))^{gamma_h}, with one learned pair per head.

    beta is drawn from U(0.1, 1) and gamma from N(0, 0.1), as in the authors' code.
    """

    def __init__(self, num_heads: int, delta: float) -> None:
        super().__init__(num_heads)
        self.delta = delta
        self.beta = nn.Parameter(torch.empty(num_heads))
        self.gamma = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.beta, 0.1, 1.0)
        nn.init.normal_(self.gamma, 0.0, 0.1)

    def forward(self, hidden_states: torch.Tensor, visible_count: torch.Tensor) -> torch.Tensor:
        dtype = _factor_dtype(self.beta)
        beta, gamma = self.beta.to(dtype)[:, None], self.gamma.to(dtype)[:, None]
        return self.delta + beta * _log_count(visible_count, 1, dtype).pow(gamma)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, delta={self.delta}"


def build_scaling(
    scaling: str, *, num_heads: int, hidden_size: int, delta: float | None, gamma_range: float | None
) -> LengthScaling | None:
    """The module of a scaling, or None for scalings without parameters (`none`, `adaptive_temperature`)."""
    if scaling == "ssmax":
        return SSMaxScaling(num_heads)
    if scaling == "asentmax":
        assert delta is not None and gamma_range is not None
        return AsentmaxScaling(num_heads, hidden_size, delta, gamma_range)
    if scaling == "learned":
        assert delta is not None
        return LearnedScaling(num_heads, delta)
    return None
