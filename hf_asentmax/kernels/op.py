"""The kernels as one PyTorch operator: fake implementation for torch.compile, autograd formula, no graph break."""

from __future__ import annotations

from typing import Any

import torch

from .row_ranges import RowRanges, row_ranges

__all__ = ["attention"]


def _problem(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor | None,
    ranges: RowRanges,
    alpha: float,
    scale: float,
    is_causal: bool,
    sliding_window: int | None,
    softcap: float | None,
) -> Any:
    from .problem import Problem

    query, key, value = (_unit_stride(tensor) for tensor in (query, key, value))
    ranges = ranges._replace(key_valid=_as_bytes(ranges.key_valid), dense_mask=_as_bytes(ranges.dense_mask))
    return Problem(query, key, value, alpha, scale, is_causal, sliding_window, softcap, slopes, ranges)


def _as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The bool mask as the kernels read it. Inside the operator: Inductor (torch 2.11) cannot compile the view."""
    return mask if mask is None else mask.view(torch.uint8)


def _unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _new_output(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(batch, heads, q_len, value_dim) with heads next to head_dim, as models merge them afterwards."""
    batch, heads, q_len, _ = query.shape
    return query.new_empty(batch, q_len, heads, value.shape[3]).transpose(1, 2)


@torch.library.custom_op("hf_asentmax::entmax_attention", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor | None,
    start: torch.Tensor | None,
    stop: torch.Tensor | None,
    key_valid: torch.Tensor | None,
    has_holes: torch.Tensor | None,
    dense_mask: torch.Tensor | None,
    alpha: float,
    scale: float,
    is_causal: bool,
    sliding_window: int | None,
    softcap: float | None,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor,
]:  # fmt: skip
    """(output, *state): see regimes.State."""
    from .regimes import forward

    ranges = RowRanges(start, stop, key_valid, has_holes, dense_mask)
    problem = _problem(query, key, value, slopes, ranges, alpha, scale, is_causal, sliding_window, softcap)
    output = _new_output(query, value)
    return output, *forward(problem, output)


@_forward.register_fake
def _(query, key, value, slopes, start, stop, key_valid, has_holes, dense_mask, alpha, scale, *options):
    from .regimes import new_state

    ranges = RowRanges(start, stop, key_valid, has_holes, dense_mask)
    state = new_state(_problem(query, key, value, slopes, ranges, alpha, scale, *options))
    return _new_output(query, value), *state


@torch.library.custom_op("hf_asentmax::entmax_attention_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor | None,
    start: torch.Tensor | None,
    stop: torch.Tensor | None,
    key_valid: torch.Tensor | None,
    has_holes: torch.Tensor | None,
    dense_mask: torch.Tensor | None,
    tau: torch.Tensor,
    mean_value: torch.Tensor,
    block_map: torch.Tensor,
    listed: torch.Tensor,
    offsets: torch.Tensor,
    counts: torch.Tensor,
    column_counts: torch.Tensor,
    overflow: torch.Tensor,
    alpha: float,
    scale: float,
    is_causal: bool,
    sliding_window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), laid out as query, key and value are."""
    from .regimes import State, backward

    ranges = RowRanges(start, stop, key_valid, has_holes, dense_mask)
    problem = _problem(query, key, value, slopes, ranges, alpha, scale, is_causal, sliding_window, softcap)
    state = State(tau, mean_value, block_map, listed, offsets, counts, column_counts, overflow)
    return backward(problem, state, _unit_stride(grad))


@_backward.register_fake
def _(grad, query, key, value, *rest):
    return tuple(torch.empty_like(_unit_stride(tensor)) for tensor in (query, key, value))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:9], *output[1:])
    ctx.options = inputs[9:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    grads: tuple[torch.Tensor | None, ...] = (None, None, None)
    if grad is not None:
        grads = _backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, *(None,) * (len(ctx.needs_input_grad) - 3))


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    alpha: float,
    scale: float,
    is_causal: bool,
    attention_mask: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """entmax_attention by the kernels; the arguments have been checked (see attention.entmax_attention)."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    ranges = row_ranges(query.shape[2], key.shape[2], attention_mask=attention_mask, cu_seqlens=cu_seqlens)
    slopes = None if alibi_slopes is None else alibi_slopes.detach().to(torch.float32).contiguous()
    output = _forward(query, key, value, slopes, *ranges, alpha, scale, is_causal, sliding_window, softcap)
    return output[0]
