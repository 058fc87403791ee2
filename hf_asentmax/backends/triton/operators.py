"""The kernels as one PyTorch operator, with a fake implementation for torch.compile and an autograd formula.

The operator's arguments are flat, as PyTorch wants them: the tensors of `OperatorTensors`, then the numbers of
`Options`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...call import Call
from ..autocast import as_autocast
from .common.launching import Launcher, run
from .common.row_ranges import RowRanges, row_ranges

if TYPE_CHECKING:
    from .common.problem import Problem

__all__ = ["OperatorTensors", "Options", "attention", "options_of", "output_shape", "problem_of", "unit_stride"]


class OperatorTensors(NamedTuple):
    """The tensors of the operator's arguments: query, key, value, ALiBi's slopes, and the fields of RowRanges."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    slopes: torch.Tensor | None = None
    start: torch.Tensor | None = None
    stop: torch.Tensor | None = None
    key_valid: torch.Tensor | None = None
    has_holes: torch.Tensor | None = None
    dense_mask: torch.Tensor | None = None

    def with_unit_strides(self) -> OperatorTensors:
        """The same, query, key and value with unit stride in their last dimension."""
        query, key, value = (unit_stride(tensor) for tensor in self[:3])
        return self._replace(query=query, key=key, value=value)


class Options(NamedTuple):
    """The numbers among the operator's arguments, as in `entmax_attention`."""

    alpha: float
    scale: float
    is_causal: bool
    sliding_window: int | None
    softcap: float | None


def options_of(call: Call) -> Options:
    """The options of a call."""
    masks, scoring = call.masks, call.scoring
    return Options(scoring.alpha, call.scale, masks.is_causal, masks.sliding_window, scoring.softcap)


def problem_of(
    tensors: OperatorTensors, options: Options, for_backward: bool = True, launcher: Launcher | None = None
) -> Problem:
    """The call as the launches see it; the tensors have unit strides."""
    from .common.problem import Problem

    query, key, value, slopes, *rest = tensors
    ranges = RowRanges(*rest)
    ranges = ranges._replace(key_valid=_as_bytes(ranges.key_valid), dense_mask=_as_bytes(ranges.dense_mask))
    return Problem(query, key, value, *options, slopes, ranges, for_backward, launcher)


def _as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The bool mask as the kernels read it. Inside the operator: Inductor (torch 2.11) cannot compile the view."""
    return mask if mask is None else mask.view(torch.uint8)


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if its last dimension has another stride than 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def output_shape(query: torch.Tensor, value: torch.Tensor) -> tuple[int, int, int, int]:
    """(batch, q_len, heads, value_dim), the shape of what the operators return.

    Heads are next to value_dim, because models merge them afterwards. The output is no view, so that it may be changed
    in place.
    """
    batch, heads, q_len, _ = query.shape
    return batch, q_len, heads, value.shape[3]


# Defined by hand, because the wrappers of torch.library.custom_op cost the host about 0.1 ms a call.
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
_INPUTS = len(OperatorTensors._fields)


def _forward(*arguments: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(output (batch, q_len, heads, value_dim), tensors of planning.State: none if no backward pass will follow)."""
    from .planning import forward

    *numbers, for_backward = arguments[_INPUTS:]
    tensors, options = OperatorTensors(*arguments[:_INPUTS]).with_unit_strides(), Options(*numbers)

    def body(launcher: Launcher) -> tuple[torch.Tensor, ...]:
        problem = problem_of(tensors, options, for_backward, launcher)
        output = launcher.empty(output_shape(problem.query, problem.value), problem.query.dtype)
        state = forward(problem, output.transpose(1, 2))
        return output, *(state.tensors() if for_backward else ())

    output, *state = run("forward", tensors, (*options, for_backward), body)
    return output, state


def _forward_of_shapes(*arguments: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    from .planning import new_state

    *numbers, for_backward = arguments[_INPUTS:]
    tensors = OperatorTensors(*arguments[:_INPUTS]).with_unit_strides()
    problem = problem_of(tensors, Options(*numbers), for_backward)
    state = new_state(problem).tensors() if for_backward else []
    return problem.query.new_empty(output_shape(problem.query, problem.value)), state


def _backward(grad: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), laid out as query, key and value are; grad is laid out as the operator's output."""
    from .planning import State, backward

    tensors = OperatorTensors(*arguments[:_INPUTS]).with_unit_strides()
    grad = unit_stride(grad)
    state, *numbers = arguments[_INPUTS:]
    options = Options(*numbers)

    def body(launcher: Launcher) -> tuple[torch.Tensor, ...]:
        problem = problem_of(tensors, options, launcher=launcher)
        return backward(problem, State(*state), grad.transpose(1, 2))

    query_grad, key_grad, value_grad = run("backward", (grad, *tensors, *state), options, body)
    return query_grad, key_grad, value_grad


def _backward_of_shapes(_: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(unit_stride(tensor)) for tensor in arguments[:3])


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
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: what follows would be detached from the graph without a word
            raise NotImplementedError(
                "the kernels have no second gradients, which create_graph=True asks for; call entmax_attention with "
                "backend='eager', or run the model on a CPU"
            )
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


def attention(call: Call) -> torch.Tensor:
    """A call by the dense, lists and short kernels, where `support.unsupported_reason` gave None.

    Returns:
        (batch, heads, q_len, value_dim), as `entry.attention`.
    """
    query, key, value = as_autocast(call.query, call.key, call.value)
    slopes = call.scoring.alibi_slopes
    slopes = None if slopes is None else slopes.detach().to(torch.float32).contiguous()
    tensors = OperatorTensors(query, key, value, slopes, *row_ranges(query.shape[2], key.shape[2], call.masks))
    operator = torch.ops.hf_asentmax.entmax_attention.default
    output, _ = operator(*tensors, *options_of(call), call.needs_gradient)
    return output.transpose(1, 2)
