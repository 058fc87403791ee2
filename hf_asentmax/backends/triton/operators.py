"""The kernels as one PyTorch operator: fake implementation for torch.compile, autograd formula, no graph break."""

from __future__ import annotations

from typing import Any

import torch

from ..autocast import as_autocast
from .common.launching import Launcher, run
from .common.row_ranges import RowRanges, row_ranges

__all__ = ["attention", "needs_gradient"]


def _problem(
    tensors: tuple[Any, ...],
    alpha: float,
    scale: float,
    is_causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    for_backward: bool = True,
    *,
    launcher: Launcher | None = None,
) -> Any:
    """The call whose tensors are the operator's, after `_with_unit_strides`."""
    from .common.problem import Problem

    query, key, value, slopes, *rest = tensors
    ranges = RowRanges(*rest)
    ranges = ranges._replace(key_valid=_as_bytes(ranges.key_valid), dense_mask=_as_bytes(ranges.dense_mask))
    options = (alpha, scale, is_causal, sliding_window, softcap)
    return Problem(query, key, value, *options, slopes, ranges, for_backward, launcher)


def _as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The bool mask as the kernels read it. Inside the operator: Inductor (torch 2.11) cannot compile the view."""
    return mask if mask is None else mask.view(torch.uint8)


def _unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _with_unit_strides(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operator's tensors, query, key and value with unit stride in their last dimension."""
    return (*(_unit_stride(tensor) for tensor in tensors[:3]), *tensors[3:])


def _rows_shape(query: torch.Tensor, value: torch.Tensor) -> tuple[int, int, int, int]:
    """(batch, q_len, heads, value_dim): of what the operator returns, no view, so that it may be changed in place.

    Heads are next to value_dim, as models merge them afterwards.
    """
    batch, heads, q_len, _ = query.shape
    return batch, q_len, heads, value.shape[3]


# Defined by hand: the wrappers of torch.library.custom_op take the host about 0.1 ms a call.
_library = torch.library.Library("hf_asentmax", "FRAGMENT")
_inputs = (
    "Tensor query, Tensor key, Tensor value, Tensor? slopes, Tensor? start, Tensor? stop, Tensor? key_valid, "
    "Tensor? has_holes, Tensor? dense_mask"
)
_options = "float alpha, float scale, bool is_causal, SymInt? sliding_window, float? softcap"
_library.define(
    f"entmax_attention({_inputs}, {_options}, bool for_backward) -> (Tensor, Tensor[])",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"entmax_attention_backward(Tensor grad, {_inputs}, Tensor[] state, {_options}) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_INPUTS = 9  # tensors among the arguments, and None where there is none


def _forward(*arguments: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(output, (batch, q_len, heads, value_dim); tensors of regimes.State, none if no backward pass will follow)"""
    from .planning import forward

    tensors, options = _with_unit_strides(arguments[:_INPUTS]), arguments[_INPUTS:]

    def body(launcher: Launcher) -> tuple[torch.Tensor, ...]:
        problem = _problem(tensors, *options, launcher=launcher)
        output = launcher.empty(_rows_shape(problem.query, problem.value), problem.query.dtype)
        state = forward(problem, output.transpose(1, 2))
        return output, *(state.tensors() if problem.for_backward else ())

    output, *state = run("forward", tensors, options, body)
    return output, state


def _forward_of_shapes(*arguments: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    from .planning import new_state

    problem = _problem(_with_unit_strides(arguments[:_INPUTS]), *arguments[_INPUTS:])
    state = new_state(problem).tensors() if problem.for_backward else []
    return problem.query.new_empty(_rows_shape(problem.query, problem.value)), state


def _backward(grad: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), laid out as query, key and value are; grad is as the operator's output."""
    from .planning import State, backward

    tensors = _with_unit_strides(arguments[:_INPUTS])
    grad = _unit_stride(grad)
    state, *options = arguments[_INPUTS:]

    def body(launcher: Launcher) -> tuple[torch.Tensor, ...]:
        problem = _problem(tensors, *options, launcher=launcher)
        return backward(problem, State(*state), grad.transpose(1, 2))

    query_grad, key_grad, value_grad = run("backward", (grad, *tensors, *state), options, body)
    return query_grad, key_grad, value_grad


def _backward_of_shapes(_: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(_unit_stride(tensor)) for tensor in arguments[:3])


class _Attention(torch.autograd.Function):
    """Output and state, flat; the gradients of query, key and value."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            output, state = torch.ops.hf_asentmax.entmax_attention.default(*arguments)
        ctx.save_for_backward(*arguments[:_INPUTS], *state)
        ctx.options = arguments[_INPUTS:-1]
        ctx.mark_non_differentiable(*state)
        ctx.set_materialize_grads(False)
        return output, *state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        grads: tuple[torch.Tensor | None, ...] = (None, None, None)
        if grad is not None:
            saved = ctx.saved_tensors
            backward = torch.ops.hf_asentmax.entmax_attention_backward.default
            grads = backward(grad, *saved[:_INPUTS], saved[_INPUTS:], *ctx.options)
        return (*grads, *(None,) * (len(ctx.needs_input_grad) - 3))


def _differentiable(*arguments: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    *_, for_backward = arguments
    if not for_backward:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.hf_asentmax.entmax_attention.default(*arguments)
    output, *state = _Attention.apply(*arguments)
    return output, state


_library.impl("entmax_attention", _forward, "CompositeExplicitAutograd")
_library.impl("entmax_attention", _differentiable, "Autograd")
_library.impl("entmax_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("hf_asentmax::entmax_attention", _forward_of_shapes, lib=_library)
torch.library.register_fake("hf_asentmax::entmax_attention_backward", _backward_of_shapes, lib=_library)


def needs_gradient(*tensors: torch.Tensor) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


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
    key_start: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """entmax_attention by the kernels; the arguments have been checked (see attention.entmax_attention)."""
    query, key, value = as_autocast(query, key, value)
    ranges = row_ranges(
        query.shape[2], key.shape[2], attention_mask=attention_mask, cu_seqlens=cu_seqlens, key_start=key_start
    )
    slopes = None if alibi_slopes is None else alibi_slopes.detach().to(torch.float32).contiguous()
    options = (alpha, scale, is_causal, sliding_window, softcap)
    for_backward = needs_gradient(query, key, value)
    operator = torch.ops.hf_asentmax.entmax_attention.default
    output, _ = operator(query, key, value, slopes, *ranges, *options, for_backward)
    return output.transpose(1, 2)
