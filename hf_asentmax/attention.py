"""The public attention function, and the choice of the backend that runs a call."""

from __future__ import annotations

import warnings

import torch

from .backends import eager, torch_fused
from .backends.triton import entry as triton_entry
from .call import Call, Scoring
from .masks import Masks

__all__ = ["BACKENDS", "attend", "entmax_attention"]

BACKENDS = ("auto", "eager", "torch", "triton")


def entmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    alpha: float = 1.5,
    scale: float | None = None,
    is_causal: bool = True,
    attention_mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    sliding_window: int | None = None,
    key_start: torch.Tensor | None = None,
    softcap: float | None = None,
    key_norm_bound: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Attention with alpha-entmax instead of softmax: irrelevant keys get a weight of exactly zero.

    .. math::
        z_{ij} = \mathrm{scale}\, q_i^\top k_j - m_h |i - j|, \quad
        p_{ij} = [(\alpha-1) z_{ij} - \tau_i]_+^{1/(\alpha-1)}, \quad o_i = \sum_j p_{ij} v_j

    The sums run over the keys that query i sees, and the threshold tau_i makes each row of weights sum to 1
    ("Long-Context Generalization with Sparse Attention", section 2; alpha-entmax: Peters, Niculae & Martins 2019).
    Queries align to the end of the keys: query i has the position of key i + kv_len - q_len. A query sees a key if
    every given mask allows it. A query that sees no key gets zeros and sends zero gradients.

    Args:
        query: (batch, heads, q_len, head_dim), float.
        key: (batch, kv_heads, kv_len, head_dim), in query's type and on its device. heads is a multiple of kv_heads.
        value: (batch, kv_heads, kv_len, value_dim), in query's type and on its device.
        alpha: from 1 (softmax) to 2 (sparsemax).
        scale: the factor on q k^T, by default 1/sqrt(head_dim).
        is_causal: whether a query sees no key after its own position.
        attention_mask: (batch, kv_len) bool or integer, true (non-zero) where the key is not padding; or
            (batch or 1, heads or 1, q_len or 1, kv_len) bool, true where the query sees the key.
        alibi_slopes: (heads,) float >= 0, ALiBi's slope m_h per unit of distance; 0 for a head without ALiBi.
        cu_seqlens: (sequences + 1,) int32 or int64, the boundaries of sequences packed into one row of batch 1, from 0
            to kv_len. A query sees its own sequence only.
        sliding_window: a query sees only keys at a distance below this number.
        key_start: (batch or 1, q_len) int32, the first key that each query may see. It describes documents packed into
            the rows of a batch, or windows of any kind, in memory linear in the length.
        softcap: c, for c tanh(score / c) before ALiBi (Gemma 2).
        key_norm_bound: (batch or 1, kv_heads) float, an upper bound on the norms of the keys, kept with a cache.
            With it, decoding skips keys that ALiBi puts too far away to have a weight. A valid bound does not change
            the result; a bound that is too small makes it wrong.
        backend: "eager" (plain PyTorch, any device, also float64); "triton" (CUDA kernels for alpha >= 1.05); "torch"
            (PyTorch's fused softmax for alpha = 1 on a GPU: scaled_dot_product_attention or FlexAttention); or "auto":
            triton or torch where they can run the call, otherwise eager, with one warning on a GPU.

    Returns:
        (batch, heads, q_len, value_dim), in query's type.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or range; the message says what was expected.
        NotImplementedError: backend="triton" or "torch" cannot run this call; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    masks = Masks(is_causal, attention_mask, sliding_window, cu_seqlens, key_start)
    scoring = Scoring(scale, alpha, None, softcap, alibi_slopes, key_norm_bound)
    output, _ = attend(Call.checked(query, key, value, masks, scoring), backend)
    return output


def attend(call: Call, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a checked call with a backend.

    Args:
        call: a call from `Call.checked`.
        backend: as for `entmax_attention`.

    Returns:
        The output (batch, heads, q_len, value_dim) in query's type, and the weights (batch, heads, q_len, kv_len) if
        the call asks for them, else None.

    Raises:
        NotImplementedError: backend="triton" or "torch" cannot run this call.
    """
    chosen = backend if backend != "auto" else _fastest(call)
    if chosen == "eager":
        return eager.attention(call)
    kernels = triton_entry if chosen == "triton" else torch_fused
    reason = kernels.unsupported_reason(call)
    if reason is None:
        return kernels.attention(call), None
    if backend != "auto":
        raise NotImplementedError(f"backend={backend!r} cannot run this call: {reason}")
    _warn_once(f"hf_asentmax runs this attention in plain PyTorch (slow, memory square in the length): {reason}")
    return eager.attention(call)


def _fastest(call: Call) -> str:
    """The backend that "auto" tries first."""
    if call.query.device.type != "cuda":
        return "eager"
    return "torch" if call.scoring.alpha == 1.0 else "triton"


_already_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _already_warned:
        _already_warned.add(message)
        warnings.warn(message, UserWarning, stacklevel=4)
