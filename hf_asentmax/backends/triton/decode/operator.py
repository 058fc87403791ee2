"""Decoding as a PyTorch operator: a few queries against a long cache, without what a backward pass needs."""

from __future__ import annotations

from typing import Any

import torch

from ....call import Call
from ...autocast import as_autocast
from ..common.launching import Launcher, run
from ..operators import OperatorTensors, Options, options_of, output_shape, problem_of

__all__ = ["DECODE_FROM", "MOST_DECODE_ROWS", "decode_attention", "decodes"]

# Queries up to which, and keys from which, a call without gradients goes to the decoding kernels.
MOST_DECODE_ROWS = 16
DECODE_FROM = 256


def decodes(call: Call) -> bool:
    """Whether a call is one for the decoding kernels: a few queries, a long cache, no packing and no gradients."""
    return (
        call.query.shape[2] <= MOST_DECODE_ROWS
        and call.key.shape[2] > DECODE_FROM
        and call.masks.cu_seqlens is None
        and call.masks.key_start is None
        and not call.needs_gradient
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
    *numbers: Any,
) -> torch.Tensor:
    """(batch, q_len, heads, value_dim)"""
    from .launch import decode

    tensors = OperatorTensors(query, key, value, slopes, key_valid=key_valid, dense_mask=dense_mask)
    tensors, options = tensors.with_unit_strides(), Options(*numbers)

    def body(launcher: Launcher) -> tuple[torch.Tensor]:
        problem = problem_of(tensors, options, launcher=launcher)
        rows = launcher.empty(output_shape(problem.query, problem.value), problem.query.dtype)
        decode(problem, rows.transpose(1, 2), key_norm_bound)
        return (rows,)

    (rows,) = run("decode", (*tensors, key_norm_bound), options, body)
    return rows


def _decode_of_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(output_shape(query, value))


_library.impl("entmax_decode", _decode, "CompositeExplicitAutograd")
torch.library.register_fake("hf_asentmax::entmax_decode", _decode_of_shapes, lib=_library)


def decode_attention(call: Call) -> torch.Tensor:
    """A call by the decoding kernels, where `decodes`; they read the masks as they come.

    Returns:
        (batch, heads, q_len, value_dim), as `entry.attention`.
    """
    query, key, value = as_autocast(call.query, call.key, call.value)
    scoring, mask = call.scoring, call.masks.attention_mask
    key_valid = dense_mask = slopes = bound = None
    if mask is not None and mask.ndim == 2:
        key_valid = mask.contiguous()
    elif mask is not None and mask.shape[1] == query.shape[2] == 1:
        # A static cache's mask: its one row says of each key what a padding mask says, which costs less to read
        key_valid = mask[:, 0, 0].expand(query.shape[0], -1).contiguous()
    else:
        dense_mask = mask
    if scoring.alibi_slopes is not None:
        slopes = scoring.alibi_slopes.to(torch.float32).contiguous()
        if scoring.key_norm_bound is not None:
            bound = scoring.key_norm_bound.to(torch.float32).contiguous()
    operator = torch.ops.hf_asentmax.entmax_decode.default
    return operator(query, key, value, slopes, key_valid, dense_mask, bound, *options_of(call)).transpose(1, 2)
