"""Mappings from attention scores to attention probabilities: softmax, alpha-entmax, top-k, adaptive temperature.

Every mapping works on the last dimension. A score of ``-inf`` marks a key that the query cannot see; its probability is
zero. A row without visible keys gives zeros and zero gradients.

Half-precision scores are mapped in float32, and the probabilities are returned in float32. float32 and float64 scores
keep their type. The kernels are tested against float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = [
    "Mapping",
    "adaptive_temperature",
    "adaptive_temperature_softmax",
    "check_alpha",
    "entmax",
    "entmax_threshold",
    "softmax",
    "top_k_softmax",
]

# Scores (..., kv_len), -inf where the key is not visible -> weights of the same shape.
Mapping = Callable[[torch.Tensor], torch.Tensor]

# Newton's method from below on a convex function. Rows of 65,536 scores (normal, near-uniform, sharp, geometric,
# linear, square-root, two-level) converge within 14 steps in float32 and float64, for alpha from 1.05 to 2. The extra
# steps cost nothing on a CPU, where the loop stops when no threshold moves.
_NEWTON_STEPS = {torch.float32: 16, torch.float64: 24}

# Below this alpha the power 1/(alpha-1) magnifies rounding: the weights are computed in float64, relative to softmax.
_NEAR_SOFTMAX = 1.05

# "Softmax is not enough (for sharp out-of-distribution)", Velickovic et al. 2024, appendix. Highest power first.
_ADAPTIVE_TEMPERATURE_POLYNOMIAL = (-0.037, 0.481, -2.3, 4.917, -1.791)


def _working_dtype(scores: torch.Tensor, alpha: float) -> torch.dtype:
    """float32 for half precision; float64 for alpha close to 1, where the power 1/(alpha-1) magnifies rounding."""
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating point, got {scores.dtype}; convert them first")
    if scores.dtype == torch.float64 or 1.0 < alpha < _NEAR_SOFTMAX:
        return torch.float64
    return torch.float32


def check_alpha(alpha: float) -> None:
    """Raise a ValueError unless alpha is a number from 1 to 2."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 1.0 <= alpha <= 2.0:
        raise ValueError(
            f"alpha must be a number from 1 (softmax) to 2 (sparsemax), got {alpha!r}; the method uses 1.5"
        )


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """Softmax, p_j = exp(z_j) / sum_k exp(z_k), with zeros for rows without visible keys.

    Args:
        scores: (..., kv_len) float; ``-inf`` marks keys that are not visible.

    Returns:
        (..., kv_len) probabilities, float32 (float64 for float64 scores).
    """
    scores = scores.to(_working_dtype(scores, 1.0))
    sees_no_key = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(sees_no_key, 0.0), dim=-1).masked_fill(sees_no_key, 0.0)


def entmax(scores: torch.Tensor, alpha: float = 1.5) -> torch.Tensor:
    r"""alpha-entmax (Peters, Niculae & Martins 2019): the sparse sibling of softmax.

    .. math:: p_j = [(\alpha - 1) z_j - \tau]_+^{1/(\alpha-1)}, \qquad \tau \text{ such that } \sum_j p_j = 1

    alpha = 1 is softmax, 1.5 is the value of the ASEntmax paper (section 2.2), and 2 is sparsemax. The gradient is
    dz = s * (dp - sum(s * dp) / sum(s)), with s = p^(2 - alpha) on the support. Gradients of higher order exist, and
    torch.func.grad and vmap apply.

    Args:
        scores: (..., kv_len) float; ``-inf`` marks keys that are not visible.
        alpha: from 1 to 2.

    Returns:
        (..., kv_len) probabilities with exact zeros, float32 (float64 for float64 scores).

    Raises:
        ValueError: alpha is outside [1, 2].
        TypeError: the scores are not floating point.
    """
    check_alpha(alpha)
    if alpha == 1.0:
        return softmax(scores)
    return _Entmax.apply(scores, float(alpha))


def _power(base: torch.Tensor, exponent: float) -> torch.Tensor:
    """base^exponent for base >= 0, with 0^0 = 0, so that keys outside the support do not count."""
    if exponent == 1.0:
        return base
    if exponent == 2.0:
        return base * base
    if exponent == 0.0:
        return (base > 0).to(base.dtype)
    return base.pow(exponent)


def entmax_threshold(scores: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The threshold tau of alpha-entmax, and the row maximum that it is relative to.

    With u_j = (alpha-1)(z_j - max z) and p = 1/(alpha-1), tau solves ||[u - tau]_+||_p = 1. The norm is convex and
    decreasing in tau, and at least 1 at tau = -1. Newton's method from there rises to the root and never passes it.

    Args:
        scores: (..., kv_len) float32 or float64, ``-inf`` for keys that are not visible.
        alpha: from 1.05 to 2. Closer to 1 rounding of tau decides the weights; see `_weights_near_softmax`.

    Returns:
        (tau, maximum), each (..., 1), with p_j = [(alpha-1)(z_j - maximum) - tau]_+^(1/(alpha-1)). The maximum is 0
        for rows without visible keys.
    """
    exponent = 1.0 / (alpha - 1.0)
    maximum = scores.amax(dim=-1, keepdim=True)
    maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
    shifted = (scores - maximum) * (alpha - 1.0)
    tau = torch.full_like(maximum, -1.0)
    stop_early = scores.device.type == "cpu" and not torch.compiler.is_compiling()
    tolerance = torch.finfo(scores.dtype).eps
    for _ in range(_NEWTON_STEPS[scores.dtype]):
        above = (shifted - tau).clamp_min(0.0)
        lower = _power(above, exponent - 1.0)
        total = (lower * above).sum(dim=-1, keepdim=True)
        norm = total.pow(1.0 / exponent)
        # (norm - 1) / |d norm / d tau|. A row without visible keys has total 0 and does not move.
        step = (norm - 1.0) * total / (norm * lower.sum(dim=-1, keepdim=True))
        step = torch.where(total > 0, step, torch.zeros_like(step)).clamp_min(0.0)
        tau = tau + step
        if stop_early and bool((step <= tolerance).all()):
            break
    return tau, maximum


def _weights_near_softmax(scores: torch.Tensor, alpha: float) -> torch.Tensor:
    r"""Unnormalised weights of alpha-entmax in a form whose limit for alpha -> 1 is softmax, to the last digit.

    With e = alpha - 1 and tau = e c - 1, where c is relative to the row maximum,

    .. math:: p_j = [1 + e (z_j - \max z - c)]_+^{1/e} = \exp(\mathrm{log1p}(e (z_j - \max z - c)) / e)

    and for e -> 0 this is exp(z_j - max z - c), c = log sum_j exp(z_j - max z). The steps in c are those of
    `entmax_threshold`, divided by e. Their limit is log(total), with which softmax takes one step.

    Args:
        scores: (..., kv_len) float64, ``-inf`` for keys that are not visible.
        alpha: in (1, `_NEAR_SOFTMAX`). For a larger alpha tau may be close to 0, and e c - 1 would round it away.

    Returns:
        (..., kv_len), zero for rows without visible keys.
    """
    excess = alpha - 1.0
    maximum = scores.amax(dim=-1, keepdim=True)
    shifted = scores - maximum.masked_fill(maximum == -torch.inf, 0.0)
    offset = torch.zeros_like(maximum)
    stop_early = scores.device.type == "cpu" and not torch.compiler.is_compiling()
    tolerance = torch.finfo(scores.dtype).eps
    for _ in range(_NEWTON_STEPS[scores.dtype]):
        logarithm = torch.log1p((excess * (shifted - offset)).clamp_min(-1.0))  # of the base; -inf off the support
        total = torch.exp(logarithm / excess).sum(dim=-1, keepdim=True)
        slope = torch.exp(logarithm * ((1.0 - excess) / excess)).sum(dim=-1, keepdim=True)
        step = -torch.expm1(-excess * total.log()) / excess * total / slope
        step = torch.where(total > 0, step, torch.zeros_like(step)).clamp_min(0.0)
        offset = offset + step
        if stop_early and bool((step <= tolerance * (1.0 + offset)).all()):
            break
    return torch.exp(torch.log1p((excess * (shifted - offset)).clamp_min(-1.0)) / excess)


class _Entmax(torch.autograd.Function):
    """alpha-entmax for alpha in (1, 2]. Only the probabilities are saved for the backward pass.

    The backward pass consists of differentiable operations on the probabilities, which depend on the scores through
    this function, so gradients of any order exist.
    """

    @staticmethod
    def forward(scores: torch.Tensor, alpha: float) -> torch.Tensor:
        dtype = _working_dtype(scores, alpha)
        output_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        working = scores.to(dtype)
        if alpha < _NEAR_SOFTMAX:
            weights = _weights_near_softmax(working, alpha)
        else:
            tau, maximum = entmax_threshold(working, alpha)
            weights = _power(((working - maximum) * (alpha - 1.0) - tau).clamp_min(0.0), 1.0 / (alpha - 1.0))
        total = weights.sum(dim=-1, keepdim=True)
        return (weights / torch.where(total > 0, total, torch.ones_like(total))).to(output_dtype)

    @staticmethod
    def setup_context(
        ctx: torch.autograd.function.FunctionCtx, inputs: tuple[torch.Tensor, float], output: torch.Tensor
    ) -> None:
        scores, alpha = inputs
        ctx.save_for_backward(output)
        ctx.alpha = alpha  # type: ignore[attr-defined]
        ctx.scores_dtype = scores.dtype  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[no-untyped-def]
        (probabilities,) = ctx.saved_tensors
        slope = _slope(probabilities, ctx.alpha)
        total = slope.sum(dim=-1, keepdim=True)
        mean = (slope * grad).sum(dim=-1, keepdim=True) / torch.where(total > 0, total, torch.ones_like(total))
        return (slope * (grad - mean)).to(ctx.scores_dtype), None

    @staticmethod
    def vmap(
        info: object, in_dims: tuple[int | None, None], scores: torch.Tensor, alpha: float
    ) -> tuple[torch.Tensor, int]:
        """The mapping works on the last dimension, so a mapped dimension is one more leading dimension."""
        dim = in_dims[0]
        assert dim is not None
        return _Entmax.apply(scores.movedim(dim, 0), alpha), 0


def _slope(probabilities: torch.Tensor, alpha: float) -> torch.Tensor:
    """s = p^(2 - alpha) on the support, else 0. Off the support its derivative is 0 too."""
    if alpha == 2.0:
        return (probabilities > 0).to(probabilities.dtype)
    on_support = probabilities > 0
    inside = torch.where(on_support, probabilities, torch.ones_like(probabilities))
    slope = inside.sqrt() if alpha == 1.5 else inside.pow(2.0 - alpha)
    return torch.where(on_support, slope, torch.zeros_like(slope))


def top_k_softmax(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Softmax over each row's k largest scores; all other keys get exactly zero.

    Args:
        scores: (..., kv_len) float; ``-inf`` marks keys that are not visible.
        k: how many keys each row keeps. A row with fewer visible keys keeps all of them.

    Returns:
        (..., kv_len) probabilities, float32 (float64 for float64 scores).

    Raises:
        ValueError: k is not a whole number of at least 1.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"top_k must be a whole number of at least 1, got {k!r}")
    if k >= scores.shape[-1]:
        return softmax(scores)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(k, dim=-1).indices, True)
    return softmax(scores.masked_fill(~kept, -torch.inf))


def adaptive_temperature(entropy: torch.Tensor) -> torch.Tensor:
    """The factor on the scores that Velickovic et al. 2024 fitted to a softmax row's entropy.

    theta(H) = max(1, -0.037 H^4 + 0.481 H^3 - 2.3 H^2 + 4.917 H - 1.791) where H > 0.5, else 1. The polynomial grows
    up to H = 4.4 and falls beyond it, outside the range of the fit. This is the original definition, unchanged. (The
    ASEntmax authors' code applies the coefficients in the opposite order.)

    Args:
        entropy: float of any shape, in nats.

    Returns:
        The factor, at least 1, of the same shape.
    """
    polynomial = torch.zeros_like(entropy)
    for coefficient in _ADAPTIVE_TEMPERATURE_POLYNOMIAL:
        polynomial = polynomial * entropy + coefficient
    return torch.where(entropy > 0.5, polynomial.clamp_min(1.0), torch.ones_like(entropy))


def adaptive_temperature_softmax(scores: torch.Tensor) -> torch.Tensor:
    """softmax(theta(H) z), where H is the entropy of softmax(z): sharpening at inference (Velickovic et al. 2024).

    Args:
        scores: (..., kv_len) float; ``-inf`` marks keys that are not visible.

    Returns:
        (..., kv_len) probabilities, float32 (float64 for float64 scores).
    """
    scores = scores.to(_working_dtype(scores, 1.0))
    entropy = torch.special.entr(softmax(scores)).sum(dim=-1, keepdim=True)
    return softmax(scores * adaptive_temperature(entropy))
