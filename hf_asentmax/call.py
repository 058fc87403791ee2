r"""Call: one attention call with everything that decides its result, built and checked once.

Every backend computes this definition, for query i and the keys j that it sees:

.. math::
    z_{ij} = \mathrm{softcap}(\mathrm{scale}\, q_i^\top k_j) - m_h |i - j|, \quad
    p_i = \mathrm{mapping}(z_i), \quad o_i = \sum_j p_{ij} v_j

Queries align to the end of the keys: query i has the position of key i + kv_len - q_len.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .mappings import Mapping, check_alpha
from .masks import Masks

__all__ = ["Call", "Scoring"]


@dataclass(frozen=True)
class Scoring:
    """How products of queries and keys become scores, and how scores become weights.

    Attributes:
        scale: the factor on q k^T. None stands for 1/sqrt(head_dim), which `Call.checked` fills in.
        alpha: the alpha of alpha-entmax, from 1 (softmax) to 2 (sparsemax).
        mapping: a mapping from scores to weights that replaces alpha-entmax; only the eager backend supports one.
        softcap: c, for c tanh(score / c) before ALiBi.
        alibi_slopes: (heads,) float, the slope m_h per unit of distance; 0 for a head without ALiBi.
        key_norm_bound: (batch or 1, kv_heads) float, an upper bound on the norms of the keys. It saves work and does
            not change the result.
    """

    scale: float | None = None
    alpha: float = 1.5
    mapping: Mapping | None = None
    softcap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    key_norm_bound: torch.Tensor | None = None


@dataclass(frozen=True)
class Call:
    """One attention call. Make one with `Call.checked`.

    Attributes:
        query: (batch, heads, q_len, head_dim).
        key: (batch, kv_heads, kv_len, head_dim).
        value: (batch, kv_heads, kv_len, value_dim).
        masks: which keys each query may see.
        scoring: how scores and weights are computed.
        dropout: the probability of dropping a weight; only the eager backend supports it.
        return_weights: whether the weights are returned too; only the eager backend supports it.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    masks: Masks
    scoring: Scoring
    dropout: float = 0.0
    return_weights: bool = False

    @classmethod
    def checked(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        masks: Masks,
        scoring: Scoring,
        *,
        dropout: float = 0.0,
        return_weights: bool = False,
    ) -> Call:
        """The call, after checking every argument.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape or range; the message says what was expected,
                what came, and what to do.
        """
        check_alpha(scoring.alpha)
        _check_tensors(query, key, value)
        _check_scalars(masks, scoring)
        q_len, kv_len = query.shape[2], key.shape[2]
        if q_len > kv_len and (masks.is_causal or masks.sliding_window is not None or masks.cu_seqlens is not None):
            raise ValueError(
                f"a causal, windowed or packed query of length {q_len} needs at least as many keys, got {kv_len}; "
                "for fewer keys than queries pass is_causal=False and neither sliding_window nor cu_seqlens"
            )
        attention_mask = _checked_attention_mask(masks.attention_mask, query, kv_len)
        _check_alibi_slopes(scoring.alibi_slopes, query)
        _check_cu_seqlens(masks.cu_seqlens, query, kv_len)
        _check_key_start(masks.key_start, query)
        _check_key_norm_bound(scoring.key_norm_bound, key)
        scale = 1.0 / math.sqrt(query.shape[3]) if scoring.scale is None else scoring.scale
        return cls(
            query,
            key,
            value,
            replace(masks, attention_mask=attention_mask),
            replace(scoring, scale=scale, alpha=float(scoring.alpha)),
            dropout,
            return_weights,
        )

    @property
    def scale(self) -> float:
        """The factor on q k^T, which `checked` has filled in."""
        assert self.scoring.scale is not None
        return self.scoring.scale

    @property
    def needs_gradient(self) -> bool:
        """Whether a backward pass may follow."""
        tensors = (self.query, self.key, self.value)
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}; convert it first")
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must be (batch, heads, length, head_dim), got {tensor.ndim} dimensions: {tuple(tensor.shape)}"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                "query, key and value must have the same type and device, got "
                f"query {query.dtype} on {query.device}, {name} {tensor.dtype} on {tensor.device}"
            )
    batch, heads, _, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != head_dim or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            "expected query (batch, heads, q_len, head_dim), key (batch, kv_heads, kv_len, head_dim) and value "
            f"(batch, kv_heads, kv_len, value_dim), got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"query's heads must be a multiple of key's heads, got {heads} and {kv_heads}")
    if kv_len == 0:
        raise ValueError("key has length 0; attention needs at least one key")


def _is_number(value: object, low: float, high: float) -> bool:
    """Whether value is a number strictly between low and high. NaN is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low < value < high


def _check_scalars(masks: Masks, scoring: Scoring) -> None:
    scale, softcap = scoring.scale, scoring.softcap
    is_causal, sliding_window = masks.is_causal, masks.sliding_window
    if scale is not None and not _is_number(scale, -math.inf, math.inf):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be True or False, got {is_causal!r}")
    if sliding_window is not None and not (isinstance(sliding_window, int) and _is_number(sliding_window, 0, math.inf)):
        raise ValueError(f"sliding_window must be a whole number of at least 1, got {sliding_window!r}")
    if softcap is not None and not _is_number(softcap, 0, math.inf):
        raise ValueError(f"softcap must be a finite number above 0, got {softcap!r}")


def _values_can_be_read(tensor: torch.Tensor) -> bool:
    """Whether reading a tensor's values is cheap: it synchronises with a GPU, and it breaks a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _kind(value: object) -> str:
    """A tensor's type, or the class of anything else, for an error message."""
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def _checked_attention_mask(mask: torch.Tensor | None, query: torch.Tensor, kv_len: int) -> torch.Tensor | None:
    """The mask as bool after checking its type, shape and device; a 4D mask is expanded to all batches and queries."""
    if mask is None:
        return None
    batch, heads, q_len, _ = query.shape

    def expected() -> str:  # formatted only for an error: a compiled graph would otherwise depend on these lengths
        return (
            f"attention_mask must be a padding mask ({batch}, {kv_len}), bool or integer, or a bool mask "
            f"({batch} or 1, {heads} or 1, {q_len} or 1, {kv_len})"
        )

    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{expected()}, got {type(mask).__name__}")
    if mask.ndim == 2:
        fits = tuple(mask.shape) == (batch, kv_len)
    else:
        fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
        fits = fits and mask.shape[2] in (1, q_len) and mask.shape[3] == kv_len
    if not fits:
        raise ValueError(f"{expected()}, got {tuple(mask.shape)}")
    if mask.is_floating_point() or (mask.ndim == 4 and mask.dtype != torch.bool):
        raise TypeError(f"{expected()}, got {mask.dtype}; convert an additive mask first: mask == 0")
    if mask.device != query.device:
        raise ValueError(f"attention_mask must be on query's device {query.device}, got {mask.device}")
    if mask.ndim == 4 and (mask.shape[0] != batch or mask.shape[2] != q_len):
        mask = mask.expand(batch, -1, q_len, -1)
    return mask.to(torch.bool)


def _check_alibi_slopes(slopes: torch.Tensor | None, query: torch.Tensor) -> None:
    if slopes is None:
        return
    heads, device = query.shape[1], query.device
    if not isinstance(slopes, torch.Tensor) or not slopes.is_floating_point():
        raise TypeError(f"alibi_slopes must be a floating point tensor of shape (heads,), got {_kind(slopes)}")
    if tuple(slopes.shape) != (heads,):
        raise ValueError(f"alibi_slopes must have one slope per head, ({heads},), got {tuple(slopes.shape)}")
    if slopes.device != device:
        raise ValueError(f"alibi_slopes must be on query's device {device}, got {slopes.device}")
    if _values_can_be_read(slopes) and not bool(((slopes >= 0) & (slopes < torch.inf)).all()):
        raise ValueError(f"alibi_slopes must be finite and at least 0, got {slopes.tolist()}")


def _check_key_norm_bound(bound: torch.Tensor | None, key: torch.Tensor) -> None:
    if bound is None:
        return
    batch, kv_heads = key.shape[:2]
    if not isinstance(bound, torch.Tensor) or not bound.is_floating_point():
        raise TypeError(f"key_norm_bound must be a floating point tensor, got {_kind(bound)}")
    if tuple(bound.shape) not in ((batch, kv_heads), (1, kv_heads)):
        raise ValueError(
            f"key_norm_bound must have one norm per key head, ({batch} or 1, {kv_heads}), got {tuple(bound.shape)}"
        )
    if bound.device != key.device:
        raise ValueError(f"key_norm_bound must be on key's device {key.device}, got {bound.device}")


def _check_key_start(key_start: torch.Tensor | None, query: torch.Tensor) -> None:
    if key_start is None:
        return
    batch, _, q_len, _ = query.shape
    if not isinstance(key_start, torch.Tensor) or key_start.dtype != torch.int32:
        raise TypeError(f"key_start must be an int32 tensor of shape (batch or 1, q_len), got {_kind(key_start)}")
    if key_start.ndim != 2 or key_start.shape[0] not in (1, batch) or key_start.shape[1] != q_len:
        raise ValueError(
            f"key_start must be (batch or 1, q_len) = ({batch} or 1, {q_len}), got {tuple(key_start.shape)}"
        )
    if key_start.device != query.device:
        raise ValueError(f"key_start must be on query's device {query.device}, got {key_start.device}")


def _check_cu_seqlens(cu_seqlens: torch.Tensor | None, query: torch.Tensor, kv_len: int) -> None:
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"cu_seqlens must be an int32 or int64 tensor of shape (sequences + 1,), got {_kind(cu_seqlens)}"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must be (sequences + 1,), with at least 2 boundaries, got {tuple(cu_seqlens.shape)}"
        )
    if query.shape[0] != 1 or query.shape[2] != kv_len:
        raise ValueError(
            "cu_seqlens describes sequences packed into batch 1, with as many queries as keys, got "
            f"batch {query.shape[0]}, q_len {query.shape[2]}, kv_len {kv_len}"
        )
    if cu_seqlens.device != query.device:
        raise ValueError(f"cu_seqlens must be on query's device {query.device}, got {cu_seqlens.device}")
    if _values_can_be_read(cu_seqlens):
        steps = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != kv_len or bool((steps < 0).any()):
            raise ValueError(f"cu_seqlens must increase from 0 to kv_len = {kv_len}, got {cu_seqlens.tolist()}")
