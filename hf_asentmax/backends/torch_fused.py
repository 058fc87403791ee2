r"""Softmax attention (alpha = 1) by PyTorch's own fused kernels, in memory linear in the length.

.. math::
    z_{ij} = \mathrm{softcap}(\mathrm{scale}\, q_i^\top k_j) - m_h |i - j|, \quad
    o_i = \sum_j \mathrm{softmax}_j(z_{ij})\, v_j

The sum runs over the keys that query i sees. A query that sees no key gets zeros and sends zero gradients. The backend
`eager.py` is the definition. `kernel_for` chooses one of three kernels:

- "sdpa": ``scaled_dot_product_attention`` without a bias, for plain causal or full attention.
- "sdpa_with_bias": the same function with one additive bias that holds ALiBi and every mask, for short rows and few
  queries.
- "flex": ``flex_attention`` for everything else. Causality, window and packing give each query an interval of keys;
  padding and 4D masks are applied on top.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from ..call import Call
from ..masks import alibi_positions, query_positions, visible_keys
from .autocast import as_autocast
from .triton import support

__all__ = ["attention", "unsupported_reason"]

# A bias is used up to this many keys or this many queries, and only if it has at most this many elements.
_SHORT_KV_LEN = 1024
_FEW_QUERIES = 64
_MAX_BIAS_ELEMENTS = 1 << 28
_BLOCK_SIZE = 128  # FlexAttention skips blocks of this many queries by this many keys
_FLEX_HEAD_DIMS = (16, 256)
_AFTER_ALL_KEYS = torch.iinfo(torch.int32).max  # the interval's start for rows that pad the last block of queries

_library = torch.library.Library("hf_asentmax", "FRAGMENT")
_library.define("materialized(Tensor a) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _contiguous_copy(a: torch.Tensor) -> torch.Tensor:
    """The operator `materialized`: a contiguous copy of a tensor that FlexAttention reads inside a compiled graph.

    Inductor folds reads of such tensors into FlexAttention's kernel, which assumes that block lists are contiguous.
    Inductor may not have fixed their layout yet (a compiler error in torch 2.13), or may pad it later (reads beyond
    the end in torch 2.11). The result of an operator has exactly the strides that the operator declares.
    """
    return a.clone(memory_format=torch.contiguous_format)


_library.impl("materialized", _contiguous_copy, "CompositeExplicitAutograd")
torch.library.register_fake("hf_asentmax::materialized", _contiguous_copy, lib=_library)
_materialized = torch.ops.hf_asentmax.materialized


def unsupported_reason(call: Call) -> str | None:
    """Why PyTorch's fused kernels cannot run this call, and what to do instead; None if they can."""
    reason = support.unsupported_call_reason("PyTorch's kernels", call)
    if reason is not None:
        return reason
    if call.scoring.alpha != 1.0:
        return f"PyTorch's attention is softmax (alpha = 1), got {call.scoring.alpha}; use backend='triton' or 'eager'"
    device = call.query.device
    if device.type != "cuda":
        return f"PyTorch's kernels need a CUDA GPU here, the tensors are on {device.type}; use backend='eager'"
    if kernel_for(prepared(call)) != "flex":
        return None
    low, high = _FLEX_HEAD_DIMS
    for head_dim in (call.query.shape[-1], call.value.shape[-1]):
        if not low <= head_dim <= high:
            return f"FlexAttention takes head dimensions from {low} to {high}, got {head_dim}; use backend='eager'"
    return support.unsupported_device_reason(device)


def attention(call: Call) -> torch.Tensor:
    """Run a call with alpha = 1, differentiable in query, key and value, on any device.

    Where `unsupported_reason` gives a reason, the result is still correct, but slow and not in linear memory. In half
    precision "sdpa_with_bias" rounds ALiBi to that precision, because its kernels take a bias of query's type only.

    Returns:
        (batch, heads, q_len, value_dim), in query's type (autocast's type under autocast).
    """
    device_type = call.query.device.type
    query, key, value = as_autocast(call.query, call.key, call.value)
    call = prepared(replace(call, query=query, key=key, value=value))
    with torch.autocast(device_type, enabled=False):
        return _KERNELS[kernel_for(call)](call)


def prepared(call: Call) -> Call:
    """The call in the form that the kernels take: `key_start` in the mask, detached slopes, no expanded mask."""
    masks = call.masks.with_key_start_in_mask(call.query.shape[0], call.key.shape[2])
    masks = replace(masks, attention_mask=mask_without_expanded_batch(masks.attention_mask))
    slopes = call.scoring.alibi_slopes
    scoring = replace(call.scoring, alibi_slopes=None if slopes is None else slopes.detach())
    return replace(call, masks=masks, scoring=scoring)


def mask_without_expanded_batch(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """A 4D mask that was expanded over the batch, reduced to batch 1 so that one bias serves all; others unchanged."""
    if attention_mask is None or attention_mask.ndim == 2 or attention_mask.stride(0) != 0:
        return attention_mask
    return attention_mask[:1]


def kernel_for(call: Call) -> str:
    """The kernel that runs a prepared call: "sdpa", "sdpa_with_bias" or "flex"."""
    query, masks, scoring = call.query, call.masks, call.scoring
    heads, q_len, head_dim = query.shape[1:]
    kv_len, value_dim = call.key.shape[2], call.value.shape[3]
    attention_mask, alibi_slopes, softcap = masks.attention_mask, scoring.alibi_slopes, scoring.softcap
    options = (attention_mask, alibi_slopes, masks.cu_seqlens, masks.sliding_window, softcap)
    # PyTorch aligns causal queries to the start of the keys, so is_causal fits only q_len == kv_len or one query.
    plain = all(option is None for option in options) and (not masks.is_causal or q_len <= 1 or q_len == kv_len)
    # PyTorch has fused kernels for these head dimensions only.
    flash = query.dtype in (torch.bfloat16, torch.float16) and head_dim == value_dim <= 256
    if plain and (flash or (head_dim % 8 == 0 and value_dim % 8 == 0)):
        return "sdpa"
    if softcap is not None or (q_len > _FEW_QUERIES and kv_len > _SHORT_KV_LEN):
        return "flex"
    bias_batch = 1 if attention_mask is None else attention_mask.shape[0]
    one_mask_for_all_heads = attention_mask is None or attention_mask.ndim == 2 or attention_mask.shape[1] == 1
    bias_heads = 1 if alibi_slopes is None and one_mask_for_all_heads else heads
    return "sdpa_with_bias" if bias_batch * bias_heads * q_len * kv_len <= _MAX_BIAS_ELEMENTS else "flex"


def _sdpa(call: Call) -> torch.Tensor:
    """scaled_dot_product_attention without a bias."""
    query, key, value = call.query, call.key, call.value
    is_causal = call.masks.is_causal and query.shape[2] > 1
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # only one of PyTorch's kernels supports grouped heads itself
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=call.scale)


def _sdpa_with_bias(call: Call) -> torch.Tensor:
    """scaled_dot_product_attention with one additive bias for ALiBi and all masks."""
    query, key, value = call.query, call.key, call.value
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    groups = heads // kv_heads
    position = query_positions(q_len, kv_len, query.device)
    visible = visible_keys(position, kv_len, call.masks)
    # PyTorch's kernels disagree on rows of -inf only. Let such a row see all keys, and replace its output by zeros.
    may_be_empty = call.masks.attention_mask is not None and visible is not None
    sees_a_key = visible.any(dim=-1, keepdim=True) if visible is not None and may_be_empty else None
    shown = visible if visible is None or sees_a_key is None else visible | ~sees_a_key
    bias = shown if call.scoring.alibi_slopes is None else _alibi_bias(call, position, visible, shown)
    # The query heads that share a key head become rows of one head.
    if bias is not None and groups > 1 and bias.shape[1:3] != (1, 1):
        bias = bias.expand(-1, heads if bias.shape[1] > 1 else groups, q_len, -1)
        bias = bias.reshape(bias.shape[0], -1, groups * q_len, kv_len)
    rows = query.reshape(batch, kv_heads, groups * q_len, head_dim)
    output = scaled_dot_product_attention(rows, key, value, attn_mask=bias, scale=call.scale)
    output = output.reshape(batch, heads, q_len, value.shape[-1])
    return output if sees_a_key is None else torch.where(sees_a_key, output, 0.0)


def _alibi_bias(
    call: Call, position: torch.Tensor, visible: torch.Tensor | None, shown: torch.Tensor | None
) -> torch.Tensor:
    """-m_h |i - j|, and -inf where `shown` is false: (batch or 1, heads, q_len, kv_len) in query's type."""
    slopes, query, kv_len = call.scoring.alibi_slopes, call.query, call.key.shape[2]
    assert slopes is not None
    anchor = position if call.masks.attention_mask is None else alibi_positions(position, visible)
    distance = (anchor[..., None] - torch.arange(kv_len, device=query.device)).abs()
    dtype = torch.promote_types(query.dtype, torch.float32)
    bias = (-slopes.to(dtype)[:, None, None] * distance.to(dtype)).to(query.dtype)
    if shown is not None:
        bias = bias.masked_fill(~shown, -torch.inf)
    return bias.reshape((1,) * (4 - bias.ndim) + tuple(bias.shape))


def _flex(call: Call) -> torch.Tensor:
    """FlexAttention, compiled on a GPU."""
    query, scoring = call.query, call.scoring
    captured: list[torch.Tensor | None] = [*key_interval(call), _alibi_anchor(call), call.masks.attention_mask]
    flex: Callable[..., torch.Tensor] = flex_attention_on_intervals
    if torch.compiler.is_compiling():
        captured = [None if tensor is None else _materialized(tensor) for tensor in captured]
    elif query.device.type == "cuda":
        flex = _compiled_flex()
    # Numbers are passed as tensors: FlexAttention would compile another kernel for each new Python number.
    per_head = query.new_ones(query.shape[1], dtype=torch.promote_types(query.dtype, torch.float32))
    numbers = [
        None if number is None else number * per_head for number in (call.scale, scoring.softcap, scoring.alibi_slopes)
    ]
    return flex(query, call.key, call.value, FlexInputs(*captured, *numbers))  # type: ignore[arg-type]


_KERNELS: dict[str, Callable[[Call], torch.Tensor]] = {"sdpa": _sdpa, "sdpa_with_bias": _sdpa_with_bias, "flex": _flex}


@functools.cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention_on_intervals)


def key_interval(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The interval start_i <= j < stop_i of keys that causality, window and packing let query i see.

    Returns:
        (start, stop), each (q_len,) int32.
    """
    masks, kv_len = call.masks, call.key.shape[2]
    sliding_window, cu_seqlens = masks.sliding_window, masks.cu_seqlens
    position = query_positions(call.query.shape[2], kv_len, call.query.device)
    start, stop = torch.zeros_like(position), torch.full_like(position, kv_len)
    if masks.is_causal:
        stop = position + 1
    if sliding_window is not None:
        start = torch.maximum(start, position - (sliding_window - 1))
        stop = torch.minimum(stop, position + sliding_window)
    if cu_seqlens is not None:
        boundaries = cu_seqlens.to(torch.int64)
        sequence = torch.bucketize(position, boundaries, right=True)
        start = torch.maximum(start, boundaries[sequence - 1])
        stop = torch.minimum(stop, boundaries[sequence])
    return start.to(torch.int32), stop.to(torch.int32)


def _alibi_anchor(call: Call) -> torch.Tensor | None:
    """The position that ALiBi's distances are measured from, or None without ALiBi.

    Returns:
        int32, (q_len,), or (batch or 1, 1 or heads, q_len) with a 4D mask.
    """
    if call.scoring.alibi_slopes is None:
        return None
    masks, kv_len = call.masks, call.key.shape[2]
    position = query_positions(call.query.shape[2], kv_len, call.query.device)
    if masks.attention_mask is not None and masks.attention_mask.ndim == 4:
        position = alibi_positions(position, visible_keys(position, kv_len, replace(masks, cu_seqlens=None)))
    return position.to(torch.int32)


class FlexInputs(NamedTuple):
    """The tensors that FlexAttention's mask and score functions read.

    Attributes:
        start, stop: (q_len,) int32, from `key_interval`.
        anchor: from `_alibi_anchor`.
        attention_mask: bool, (batch, kv_len) or (batch or 1, 1 or heads, q_len, kv_len).
        scale, softcap, slopes: (heads,) float.
    """

    start: torch.Tensor
    stop: torch.Tensor
    anchor: torch.Tensor | None
    attention_mask: torch.Tensor | None
    scale: torch.Tensor
    softcap: torch.Tensor | None
    slopes: torch.Tensor | None


def flex_attention_on_intervals(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, inputs: FlexInputs
) -> torch.Tensor:
    """flex_attention over each query's interval of keys.

    Args:
        query, key, value: as in `Call`.
        inputs: what the mask and score functions read.

    Returns:
        (batch, heads, q_len, value_dim).
    """
    start, stop, anchor, attention_mask, scale, softcap, slopes = inputs
    visible, full = block_masks(start, stop, key.shape[2], attention_mask)
    # These are made outside mask_mod and score_mod, which become part of a kernel, where every index is a tensor.
    mask_of = None if attention_mask is None or attention_mask.ndim == 2 else _by_batch_and_head(attention_mask)
    anchor_of = None if anchor is None or anchor.ndim == 1 else _by_batch_and_head(anchor)

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        within = (k >= start[q]) & (k < stop[q])
        if attention_mask is None:
            return within
        return within & (attention_mask[b, k] if mask_of is None else mask_of(b, h, q, k))

    def score_mod(
        product: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        product = product * scale[h]
        if softcap is not None:
            product = softcap[h] * torch.tanh(product / softcap[h])
        if slopes is None or anchor is None:
            return product
        position = anchor[q] if anchor_of is None else anchor_of(b, h, q)
        return product - slopes[h] * (position - k).abs()

    partial = visible & ~full
    by_query = (*_block_list(partial), *_block_list(full))
    by_key = (*_block_list(partial.mT), *_block_list(full.mT))
    lengths = query.shape[2], key.shape[2]
    block_mask = BlockMask(lengths, *by_query, *by_key, BLOCK_SIZE=(_BLOCK_SIZE, _BLOCK_SIZE), mask_mod=mask_mod)
    return flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=1.0,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},  # its kernel for few queries does not compile for all sizes
    )


def _by_batch_and_head(tensor: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A function (b, h, *rest) that reads a (batch or 1, heads or 1, ...) tensor; an index into size 1 is ignored."""
    by_batch, by_head = (size > 1 for size in tensor.shape[:2])
    if not by_head:
        tensor = tensor[:, 0]
    if not by_batch:
        tensor = tensor[0]

    def element(b: torch.Tensor, h: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return tensor[(*((b,) if by_batch else ()), *((h,) if by_head else ()), *rest)]

    return element


def block_masks(
    start: torch.Tensor, stop: torch.Tensor, kv_len: int, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks of queries by keys FlexAttention computes, and which of them need no mask.

    They are made from the queries' intervals. PyTorch's create_block_mask would build the whole (q_len, kv_len) mask.

    Returns:
        (visible, full), each bool (batch or 1, heads or 1, query blocks, key blocks): some query may see some key of
        the block; every query sees every key of the block. Full blocks are visible.
    """
    q_len = start.shape[0]
    more_queries, more_keys = -q_len % _BLOCK_SIZE, -kv_len % _BLOCK_SIZE
    first = torch.arange(0, kv_len, _BLOCK_SIZE, device=start.device)
    last = first + (_BLOCK_SIZE - 1)
    # The rows that pad the last block see no key. A constant pads `start`, because kv_len as the value would compile
    # another kernel for each length.
    starts, stops = pad(start, (0, more_queries), value=_AFTER_ALL_KEYS), pad(stop, (0, more_queries), value=0)
    starts, stops = starts.reshape(-1, _BLOCK_SIZE, 1), stops.reshape(-1, _BLOCK_SIZE, 1)
    visible = ((first < stops.amax(dim=1)) & (last >= starts.amin(dim=1)))[None, None]
    full = ((first >= starts.amax(dim=1)) & (last < stops.amin(dim=1)))[None, None]
    if attention_mask is None:
        return visible, full
    if attention_mask.ndim == 2:
        keys = pad(attention_mask, (0, more_keys)).reshape(attention_mask.shape[0], 1, 1, -1, _BLOCK_SIZE)
        return visible & keys.any(dim=-1), full & keys.all(dim=-1)
    batch, heads = attention_mask.shape[:2]
    tiles = pad(attention_mask, (0, more_keys, 0, more_queries))
    tiles = tiles.reshape(batch, heads, starts.shape[0], _BLOCK_SIZE, first.shape[0], _BLOCK_SIZE)
    return visible & tiles.any(dim=5).any(dim=3), full & tiles.all(dim=5).all(dim=3)


def _block_list(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FlexAttention's sparse format of a block mask.

    Returns:
        The number of blocks in each row, (..., rows) int32, and the indices (..., rows, blocks) int32, listed ones
        first.
    """
    order = torch.argsort(blocks.to(torch.int32), dim=-1, descending=True, stable=True)
    return _materialized(blocks.sum(dim=-1).to(torch.int32)), _materialized(order.to(torch.int32))
