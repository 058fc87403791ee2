"""The definition of entmax attention in float64, independent of the package, and the comparison that tests use."""

from __future__ import annotations

import torch


def reference_entmax(scores: torch.Tensor, alpha: float) -> torch.Tensor:
    """alpha-entmax of the last dimension by bisection on tau, without gradients; rows of -inf give zeros."""
    scores = scores.double()
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    shifted = (alpha - 1) * scores.masked_fill(empty, 0.0)
    high = shifted.amax(-1, keepdim=True)
    low = high - 1.0
    for _ in range(80):
        middle = (low + high) / 2
        too_small = ((shifted - middle).clamp_min(0) ** (1 / (alpha - 1))).sum(-1, keepdim=True) < 1
        high = torch.where(too_small, middle, high)
        low = torch.where(too_small, low, middle)
    weights = (shifted - low).clamp_min(0) ** (1 / (alpha - 1))
    return (weights / weights.sum(-1, keepdim=True)).masked_fill(empty, 0.0)


def reference_visible(
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    *,
    is_causal: bool = True,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Which keys each query sees, (batch, heads, q_len, kv_len) bool, from the docstring of entmax_attention."""
    visible = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    for i in range(q_len):
        position = i + kv_len - q_len
        for j in range(kv_len):
            seen = not is_causal or j <= position
            seen = seen and (sliding_window is None or abs(position - j) < sliding_window)
            if bounds is not None:
                seen = seen and sum(b <= position for b in bounds) == sum(b <= j for b in bounds)
            visible[:, :, i, j] = seen
    if attention_mask is not None:
        mask = attention_mask.bool().cpu()
        visible &= mask[:, None, None, :] if mask.ndim == 2 else mask
    return visible


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    alpha: float = 1.5,
    scale: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    visible: torch.Tensor,
    grad_output: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None]:
    """The output, and (dq, dk, dv) for a grad_output by the closed form of entmax's gradient, in float64."""
    q, k, v = (t.detach().double().cpu().requires_grad_() for t in (query, key, value))
    groups = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        q_len, kv_len = q.shape[2], k.shape[2]
        distance = (torch.arange(q_len)[:, None] + kv_len - q_len - torch.arange(kv_len)[None]).abs()
        scores = scores - alibi_slopes.detach().double().cpu()[:, None, None] * distance
    scores = scores.masked_fill(~visible, -torch.inf)
    if alpha == 1.0:
        weights = torch.nan_to_num(torch.softmax(scores.detach(), -1))
        slope = weights
    else:
        weights = reference_entmax(scores.detach(), alpha)
        slope = torch.where(weights > 0, weights ** (2 - alpha), torch.zeros_like(weights))
    output = weights @ values
    if grad_output is None:
        return output.detach(), None
    do = grad_output.double().cpu()
    dweights = do @ values.detach().transpose(-1, -2)
    mean = (slope * dweights).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True).clamp_min(1e-300)
    dscores = slope * (dweights - mean)
    dscores = torch.where(visible, dscores, torch.zeros_like(dscores))
    dq, dk = torch.autograd.grad(scores, (q, k), dscores, retain_graph=True)
    (dv,) = torch.autograd.grad(output, v, do)
    return output.detach(), (dq, dk, dv)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN counts as infinite."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    norm = expected.norm()
    error = ((actual - expected).norm() / norm).item() if norm > 0 else actual.norm().item()
    return float("inf") if error != error else error


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Check that shapes are equal and that the relative error in the Frobenius norm is at most `tolerance`."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"
