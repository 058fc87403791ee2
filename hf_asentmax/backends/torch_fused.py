r"""Softmax attention (alpha = 1) by PyTorch's own fused kernels, in memory linear in the length.

.. math::
    z_{ij} = \mathrm{softcap}(\mathrm{scale}\, q_i^\top k_j) - m_h |i - j|, \quad
    o_i = \sum_j \mathrm{softmax}_j(z_{ij})\, v_j

over the keys that query i sees; zeros, and zero gradients, for a query that sees none. ``eager.py`` is the definition.

- Plain causal or full attention is ``scaled_dot_product_attention``, which skips what lies behind a causal query.
- Short rows and few queries are the same function with a bias that holds ALiBi and every mask, made once a call.
- All else is FlexAttention: a query's keys are an interval (causality, window, packing), less padding or a free mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from ..call import Call
from ..masks import alibi_positions, query_positions, visible_keys
from .autocast import as_autocast
from .triton import entry as triton_entry

__all__ = ["attention", "unsupported_reason"]

_SHORT = 1024  # keys, or
_FEW = 64  # queries: up to here a bias is made, of at most _LARGEST_BIAS elements
_LARGEST_BIAS = 1 << 28
_BLOCK = 128  # queries, and keys, that FlexAttention skips together
_BEYOND = torch.iinfo(torch.int32).max  # a key after all
_FLEX_HEAD_DIMS = (16, 256)

_library = torch.library.Library("hf_asentmax", "FRAGMENT")
_library.define("materialized(Tensor a) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _contiguous_copy(a: torch.Tensor) -> torch.Tensor:
    """The operator `materialized`, for what FlexAttention takes from the graph that it is compiled in.

    Inductor folds reads of such tensors into FlexAttention's kernel, and the kernel takes lists of blocks for
    contiguous; but their layout may not be decided by then (an error of the compiler, torch 2.13), or be padded later
    (reads beyond their ends, torch 2.11; `kernels/row_products.py` has another case). An operator's result has the
    strides that it says.
    """
    return a.clone(memory_format=torch.contiguous_format)


_library.impl("materialized", _contiguous_copy, "CompositeExplicitAutograd")
torch.library.register_fake("hf_asentmax::materialized", _contiguous_copy, lib=_library)
_materialized = torch.ops.hf_asentmax.materialized


def unsupported_reason(call: Call) -> str | None:
    """Why PyTorch's fused kernels cannot run this call, and what to do about it; None if they can."""
    of_the_call = triton_entry.unsupported_call_reason("PyTorch's kernels", call)
    if of_the_call is not None:
        return of_the_call
    if call.scoring.alpha != 1.0:
        return f"PyTorch's attention is softmax, alpha = 1, got {call.scoring.alpha}; use backend='triton' or 'eager'"
    device = call.query.device
    if device.type != "cuda":
        return f"PyTorch's kernels are meant for a CUDA GPU, the tensors are on {device.type}; use backend='eager'"
    if _way(_prepared(call)) != "flex":
        return None
    low, high = _FLEX_HEAD_DIMS
    for head_dim in (call.query.shape[-1], call.value.shape[-1]):
        if not low <= head_dim <= high:
            return f"FlexAttention takes head dimensions from {low} to {high}, got {head_dim}; use backend='eager'"
    return triton_entry.unsupported_device_reason(device)


def attention(call: Call) -> torch.Tensor:
    """The call for alpha = 1, differentiable in query, key and value, on any device.

    Where unsupported_reason gives a reason, the result is still right, but neither fast nor in linear memory. In
    half precision the ALiBi of short rows and few queries is rounded to it, because the kernels take a bias of
    query's type only.

    Returns:
        (batch, heads, q_len, value_dim), of query's type (of autocast's type under autocast).
    """
    device_type = call.query.device.type
    query, key, value = as_autocast(call.query, call.key, call.value)
    call = _prepared(replace(call, query=query, key=key, value=value))
    way = _way(call)
    with torch.autocast(device_type, enabled=False):
        if way == "bare":
            return _bare(call)
        if way == "biased":
            return _biased(call)
        return _by_flex_attention(call)


def _prepared(call: Call) -> Call:
    """The call as the functions below take it: no `key_start`, constant slopes, one mask where the batch shares it."""
    masks = call.masks.with_key_start_in_mask(call.query.shape[0], call.key.shape[2])
    masks = replace(masks, attention_mask=_shared(masks.attention_mask))
    slopes = call.scoring.alibi_slopes
    scoring = replace(call.scoring, alibi_slopes=None if slopes is None else slopes.detach())
    return replace(call, masks=masks, scoring=scoring)


def _by_flex_attention(call: Call) -> torch.Tensor:
    query, key, value, scoring = call.query, call.key, call.value, call.scoring
    captured: list[torch.Tensor | None] = [*_key_interval(call), _flex_anchor(call), call.masks.attention_mask]
    flex: Callable[..., torch.Tensor] = _flex
    if torch.compiler.is_compiling():
        captured = [None if tensor is None else _materialized(tensor) for tensor in captured]
    elif query.device.type == "cuda":
        flex = _compiled_flex()
    # Numbers come as tensors: other ones would be another kernel
    per_head = query.new_ones(query.shape[1], dtype=torch.promote_types(query.dtype, torch.float32))
    numbers = [
        None if number is None else number * per_head for number in (call.scale, scoring.softcap, scoring.alibi_slopes)
    ]
    return flex(query, key, value, *captured, *numbers)


def _shared(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """A 4D mask that was expanded over the batch as one of batch 1, for one bias for all; others as they are."""
    if attention_mask is None or attention_mask.ndim == 2 or attention_mask.stride(0) != 0:
        return attention_mask
    return attention_mask[:1]


def _way(call: Call) -> str:
    """Which function below takes the call: "bare", "biased" or "flex"."""
    query, masks, scoring = call.query, call.masks, call.scoring
    heads, q_len, head_dim = query.shape[1:]
    kv_len, value_dim = call.key.shape[2], call.value.shape[3]
    attention_mask, alibi_slopes, softcap = masks.attention_mask, scoring.alibi_slopes, scoring.softcap
    limits = (attention_mask, alibi_slopes, masks.cu_seqlens, masks.sliding_window, softcap)
    bare = all(given is None for given in limits)
    # PyTorch aligns causal queries to the keys' start, and has fused kernels for these head dimensions alone
    bare = bare and (not masks.is_causal or q_len <= 1 or q_len == kv_len)
    flash = query.dtype in (torch.bfloat16, torch.float16) and head_dim == value_dim <= 256
    if bare and (flash or (head_dim % 8 == 0 and value_dim % 8 == 0)):
        return "bare"
    if softcap is not None or (q_len > _FEW and kv_len > _SHORT):
        return "flex"
    bias_batch = 1 if attention_mask is None else attention_mask.shape[0]
    heads_alike = attention_mask is None or attention_mask.ndim == 2 or attention_mask.shape[1] == 1
    bias_heads = 1 if alibi_slopes is None and heads_alike else heads
    return "biased" if bias_batch * bias_heads * q_len * kv_len <= _LARGEST_BIAS else "flex"


def _bare(call: Call) -> torch.Tensor:
    """scaled_dot_product_attention without a bias."""
    query, key, value = call.query, call.key, call.value
    is_causal = call.masks.is_causal and query.shape[2] > 1
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # only one of PyTorch's kernels takes grouped heads by itself
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=call.scale)


def _biased(call: Call) -> torch.Tensor:
    """scaled_dot_product_attention with one bias for ALiBi and all masks."""
    query, key, value = call.query, call.key, call.value
    attention_mask, slopes = call.masks.attention_mask, call.scoring.alibi_slopes
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    position = query_positions(q_len, kv_len, query.device)
    visible = visible_keys(position, kv_len, call.masks)
    # Kernels differ in what they make of a row of -inf: such a row sees all keys here, and its output is dropped
    sees_a_key = None if attention_mask is None or visible is None else visible.any(dim=-1, keepdim=True)
    shown = visible if sees_a_key is None or visible is None else visible | ~sees_a_key
    bias = shown
    if slopes is not None:
        anchor = position if attention_mask is None else alibi_positions(position, visible)
        distance = (anchor[..., None] - torch.arange(kv_len, device=key.device)).abs()
        numbers = torch.promote_types(query.dtype, torch.float32)
        bias = (-slopes.to(numbers)[:, None, None] * distance.to(numbers)).to(query.dtype)
        if shown is not None:
            bias = bias.masked_fill(~shown, -torch.inf)
        bias = bias.reshape((1,) * (4 - bias.ndim) + tuple(bias.shape))
    groups = heads // kv_heads
    # The queries that share a key head are rows of one head
    if bias is not None and groups > 1 and bias.shape[1:3] != (1, 1):
        bias = bias.expand(-1, heads if bias.shape[1] > 1 else groups, q_len, -1)
        bias = bias.reshape(bias.shape[0], -1, groups * q_len, kv_len)
    rows = query.reshape(batch, kv_heads, groups * q_len, head_dim)
    output = scaled_dot_product_attention(rows, key, value, attn_mask=bias, scale=call.scale)
    output = output.reshape(batch, heads, q_len, value.shape[-1])
    return output if sees_a_key is None else torch.where(sees_a_key, output, 0.0)


def _key_interval(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """(start, stop), each (q_len,) int32: causality, window and packing let query i see start_i <= j < stop_i."""
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


def _flex_anchor(call: Call) -> torch.Tensor | None:
    """Where ALiBi's distances are measured from: (q_len,), or (batch or 1, 1 or heads, q_len) int32 with a 4D mask."""
    if call.scoring.alibi_slopes is None:
        return None
    masks, kv_len = call.masks, call.key.shape[2]
    position = query_positions(call.query.shape[2], kv_len, call.query.device)
    if masks.attention_mask is not None and masks.attention_mask.ndim == 4:
        position = alibi_positions(position, visible_keys(position, kv_len, replace(masks, cu_seqlens=None)))
    return position.to(torch.int32)


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    anchor: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    scale: torch.Tensor,
    softcap: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> torch.Tensor:
    """FlexAttention.

    Args:
        start, stop: from `_key_interval`; anchor: from `_flex_anchor`.
        attention_mask: bool, (batch, kv_len) or (batch or 1, 1 or heads, q_len, kv_len).
        scale, softcap, slopes: (heads,) float.
    """
    some, every = _blocks(start, stop, key.shape[2], attention_mask)
    # Out here: in the functions below, which become part of a kernel, every index is a tensor
    mask_of = None if attention_mask is None or attention_mask.ndim == 2 else _by_batch_and_head(attention_mask)
    anchor_of = None if anchor is None or anchor.ndim == 1 else _by_batch_and_head(anchor)

    def shows(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        within = (k >= start[q]) & (k < stop[q])
        if attention_mask is None:
            return within
        return within & (attention_mask[b, k] if mask_of is None else mask_of(b, h, q, k))

    def score(
        product: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        product = product * scale[h]
        if softcap is not None:
            product = softcap[h] * torch.tanh(product / softcap[h])
        if slopes is None or anchor is None:
            return product
        position = anchor[q] if anchor_of is None else anchor_of(b, h, q)
        return product - slopes[h] * (position - k).abs()

    partly = some & ~every
    by_query = (*_listed(partly), *_listed(every))
    by_key = (*_listed(partly.mT), *_listed(every.mT))
    lengths = query.shape[2], key.shape[2]
    mask = BlockMask(lengths, *by_query, *by_key, BLOCK_SIZE=(_BLOCK, _BLOCK), mask_mod=shows)
    grouped = query.shape[1] != key.shape[1]
    return flex_attention(
        query,
        key,
        value,
        score_mod=score,
        block_mask=mask,
        scale=1.0,
        enable_gqa=grouped,
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},  # its kernel for few queries compiles not for all sizes
    )


def _by_batch_and_head(tensor: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Elements of a (batch or 1, heads or 1, ...) tensor by batch, head and the rest; without what has size 1."""
    by_batch, by_head = (size > 1 for size in tensor.shape[:2])
    if not by_head:
        tensor = tensor[:, 0]
    if not by_batch:
        tensor = tensor[0]

    def element(b: torch.Tensor, h: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return tensor[(*((b,) if by_batch else ()), *((h,) if by_head else ()), *rest)]

    return element


@functools.cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    return torch.compile(_flex)


def _blocks(
    start: torch.Tensor, stop: torch.Tensor, kv_len: int, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of _BLOCK x _BLOCK where some query may see some key, and where every query surely sees every key.

    Made from the queries' intervals: PyTorch's create_block_mask would build the whole (q_len, kv_len) mask.

    Returns:
        two bool (batch or 1, heads or 1, query blocks, key blocks); every implies some.
    """
    q_len = start.shape[0]
    more_queries, more_keys = -q_len % _BLOCK, -kv_len % _BLOCK
    first = torch.arange(0, kv_len, _BLOCK, device=start.device)
    last = first + (_BLOCK - 1)
    # Queries beyond the end see nothing; keys beyond the end are seen by none. (A length as pad's value is one more
    # kernel for each length.)
    starts, stops = pad(start, (0, more_queries), value=_BEYOND), pad(stop, (0, more_queries), value=0)
    starts, stops = starts.reshape(-1, _BLOCK, 1), stops.reshape(-1, _BLOCK, 1)
    some = ((first < stops.amax(dim=1)) & (last >= starts.amin(dim=1)))[None, None]
    every = ((first >= starts.amax(dim=1)) & (last < stops.amin(dim=1)))[None, None]
    if attention_mask is None:
        return some, every
    if attention_mask.ndim == 2:
        keys = pad(attention_mask, (0, more_keys)).reshape(attention_mask.shape[0], 1, 1, -1, _BLOCK)
        return some & keys.any(dim=-1), every & keys.all(dim=-1)
    batch, heads = attention_mask.shape[:2]
    tiles = pad(attention_mask, (0, more_keys, 0, more_queries)).reshape(
        batch, heads, (q_len + more_queries) // _BLOCK, _BLOCK, (kv_len + more_keys) // _BLOCK, _BLOCK
    )
    return some & tiles.any(dim=5).any(dim=3), every & tiles.all(dim=5).all(dim=3)


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each row has, and their indices first: (..., rows) and (..., rows, blocks) int32."""
    order = torch.argsort(blocks.to(torch.int32), dim=-1, descending=True, stable=True)
    return _materialized(blocks.sum(dim=-1).to(torch.int32)), _materialized(order.to(torch.int32))
