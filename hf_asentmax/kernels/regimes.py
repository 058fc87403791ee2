"""Lists or dense tiles: both regimes in one call, the choice made on the device for each block of rows.

Lists are off unless the environment says HF_ASENTMAX_LISTS=1: on a GPU they have run alone
(recipes/benchmark/sparse_probe.json), but their tests inside this operator have not passed there yet.

Long calls go through the sparse regime first. Row blocks with a support too large for its lists are flagged there, and
the dense regime does exactly these; it does all of them where lists do not pay or cannot be used.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from .dense_forward import ACTIVE_ROWS
from .dense_launch import DenseState, dense_backward, dense_forward, largest_key_norms, new_dense_state
from .problem import Problem
from .sparse_attention import SparseLists, sparse_backward, sparse_forward, sparse_tiles, sparse_unsupported_reason

__all__ = ["SPARSE_FROM", "State", "backward", "forward", "new_state"]

# Keys from which the sparse regime is tried first. Its lists cost the same for a row at any length; on an H100 they
# cost as much as they save at about so many keys (recipes/benchmark/NOTES.md).
SPARSE_FROM = 6144


class State(NamedTuple):
    """What a call leaves for its backward pass: dense_launch.DenseState and sparse_attention.SparseLists.

    The lists are empty where the dense regime does all rows. Where there are lists, mean_value is empty if their room
    can hold it: rows that the dense regime does have no use for their list, and keep their mean value there.
    """

    tau: torch.Tensor
    mean_value: torch.Tensor
    block_map: torch.Tensor
    indices: torch.Tensor
    counts: torch.Tensor
    overflow: torch.Tensor


def _uses_lists(problem: Problem) -> bool:
    if os.environ.get("HF_ASENTMAX_LISTS") != "1":
        return False
    return problem.key.shape[2] >= SPARSE_FROM and sparse_unsupported_reason(problem) is None


def _new_dense_state(problem: Problem, indices: torch.Tensor) -> DenseState:
    room = indices.shape[2] * indices.element_size()
    return new_dense_state(problem, with_mean=room < problem.value.shape[3] * problem.value.element_size())


def _mean_in_lists(problem: Problem, dense: DenseState, indices: torch.Tensor) -> DenseState:
    """The state with its mean_value, a view of the lists if it has none of its own."""
    if dense.mean_value.numel() > 0:
        return dense
    batch, heads, q_len, _ = problem.query.shape
    rows = indices.view(problem.value.dtype).view(batch, heads, q_len, -1)
    return dense._replace(mean_value=rows[..., : problem.value.shape[3]])


def new_state(problem: Problem) -> State:
    """A state of the right shapes, as a forward pass without values (for tracing)."""
    query = problem.query
    if not _uses_lists(problem):
        return State(*new_dense_state(problem), *_no_lists(query))
    q_len = query.shape[2]
    indices = query.new_empty(problem.groups, q_len, sparse_tiles(query.dtype, query.shape[3]).room, dtype=torch.int32)
    counts = query.new_empty(problem.groups, q_len, dtype=torch.int32)
    overflow = query.new_empty(problem.groups, -(-q_len // ACTIVE_ROWS), dtype=torch.uint8)
    return State(*_new_dense_state(problem, indices), indices, counts, overflow)


def _no_lists(query: torch.Tensor) -> SparseLists:
    return SparseLists(*(query.new_empty(0, dtype=dtype) for dtype in (torch.int32, torch.int32, torch.uint8)))


def forward(problem: Problem, output: torch.Tensor) -> State:
    """Writes output (batch, heads, q_len, value_dim); returns what the backward pass needs."""
    if not _uses_lists(problem):
        dense = new_dense_state(problem)
        dense_forward(problem, output, dense)
        return State(*dense, *_no_lists(problem.query))
    tau = problem.query.new_empty(problem.query.shape[:3], dtype=torch.float32)
    largest_key = largest_key_norms(problem)
    lists = sparse_forward(problem, output, tau, largest_key)
    dense = _new_dense_state(problem, lists.indices)._replace(tau=tau)
    with_mean = _mean_in_lists(problem, dense, lists.indices)
    dense_forward(problem, output, with_mean, active=lists.overflow, largest_key=largest_key)
    return State(*dense, *lists)


def backward(problem: Problem, state: State, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), laid out as query, key and value are; grad has unit stride in the last dimension.

    dk and dv of the lists are summed by atomics, in an order that changes from run to run in the last bits, unless
    torch.use_deterministic_algorithms asks for the slower way.
    """
    dense = DenseState(*state[:3])
    query_grad, key_grad, value_grad = (torch.empty_like(t) for t in (problem.query, problem.key, problem.value))
    if state.overflow.numel() == 0:  # the forward pass kept no lists, whatever the switch says now
        dense_backward(problem, dense, grad, query_grad, key_grad, value_grad)
        return query_grad, key_grad, value_grad
    sums = (
        torch.zeros(problem.key.shape, dtype=torch.float32, device=grad.device),
        torch.zeros(problem.value.shape, dtype=torch.float32, device=grad.device),
    )
    lists = SparseLists(*state[3:])
    deterministic = torch.are_deterministic_algorithms_enabled()
    sparse_backward(problem, dense.tau, lists, grad, query_grad, *sums, deterministic=deterministic)
    dense = _mean_in_lists(problem, dense, lists.indices)
    dense_backward(problem, dense, grad, query_grad, key_grad, value_grad, active=lists.overflow, partial=sums)
    return query_grad, key_grad, value_grad
