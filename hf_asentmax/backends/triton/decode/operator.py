"""Decoding as a PyTorch operator: a few queries against a long cache, without what a backward pass needs."""

from __future__ import annotations

from typing import Any

import torch

from ...autocast import as_autocast
from ..common.launching import Launcher, run
from ..operators import _problem, _rows_shape, _with_unit_strides, needs_gradient

__all__ = ["DECODE_FROM", "MOST_DECODE_ROWS", "decode_attention", "decodes"]

# Queries up to which, and keys from which, a call without gradients goes to the decoding kernels.
MOST_DECODE_ROWS = 16
DECODE_FROM = 256


def decodes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    key_start: torch.Tensor | None = None,
) -> bool:
    """Whether a call is one for the decoding kernels."""
    q_len, kv_len = query.shape[2], key.shape[2]
    return (
        q_len <= MOST_DECODE_ROWS
        and kv_len > DECODE_FROM
        and cu_seqlens is None
        and key_start is None
        and not needs_gradient(query, key, value)
    )


_library = torch.library.Library("hf_asentmax", "FRAGMENT")
_library.define(
    "entmax_decode(Tensor query, Tensor key, Tensor value, Tensor? slopes, Tensor? key_valid, Tensor? dense_mask, "
    "Tensor? key_norm_bound, float alpha, float scale, bool is_causal, SymInt? sliding_window, float? softcap) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor | None,
    key_valid: torch.Tensor | None,
    dense_mask: torch.Tensor | None,
    key_norm_bound: torch.Tensor | None,
    *options: Any,
) -> torch.Tensor:
    """(batch, q_len, heads, value_dim)"""
    from .launch import decode

    tensors = _with_unit_strides((query, key, value, slopes, None, None, key_valid, None, dense_mask))

    def body(launcher: Launcher) -> tuple[torch.Tensor]:
        problem = _problem(tensors, *options, launcher=launcher)
        rows = launcher.empty(_rows_shape(problem.query, problem.value), problem.query.dtype)
        decode(problem, rows.transpose(1, 2), key_norm_bound)
        return (rows,)

    (rows,) = run("decode", (*tensors, key_norm_bound), options, body)
    return rows


def _decode_of_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(_rows_shape(query, value))


_library.impl("entmax_decode", _decode, "CompositeExplicitAutograd")
torch.library.register_fake("hf_asentmax::entmax_decode", _decode_of_shapes, lib=_library)


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    alpha: float,
    scale: float,
    is_causal: bool,
    attention_mask: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sliding_window: int | None,
    softcap: float | None,
    key_norm_bound: torch.Tensor | None,
) -> torch.Tensor:
    """entmax_attention by the decoding kernels, where `decodes`; masks are read as they come, by the kernels."""
    query, key, value = as_autocast(query, key, value)
    key_valid = dense_mask = slopes = bound = None
    if attention_mask is not None and attention_mask.ndim == 2:
        key_valid = attention_mask.contiguous()
    elif attention_mask is not None and attention_mask.shape[1] == query.shape[2] == 1:
        # A static cache's mask: one row for all heads says of each key what a padding mask says, and costs less to read
        key_valid = attention_mask[:, 0, 0].expand(query.shape[0], -1).contiguous()
    else:
        dense_mask = attention_mask
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(torch.float32).contiguous()
        bound = None if key_norm_bound is None else key_norm_bound.to(torch.float32).contiguous()
    options = (alpha, scale, is_causal, sliding_window, softcap)
    operator = torch.ops.hf_asentmax.entmax_decode.default
    return operator(query, key, value, slopes, key_valid, dense_mask, bound, *options).transpose(1, 2)
