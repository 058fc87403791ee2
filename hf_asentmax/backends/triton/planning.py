"""Lists or dense tiles: both regimes in one call, the choice made on the device for each block of rows.

Long calls go through the sparse regime first. Row blocks with a support too large for its lists are flagged there, and
the dense regime does exactly these; it does all of them where lists do not pay or cannot be used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .common.problem import Problem
from .dense.forward import ACTIVE_ROWS
from .dense.launch import DenseState, dense_backward, dense_forward, largest_key_norms, new_dense_state
from .lists.device import Lists
from .lists.launch import Gradients, column_ends, lists_backward, lists_forward
from .lists.tiles import keeps_weights, list_capacity, list_tiles, lists_unsupported_reason

__all__ = ["SPARSE_FROM", "State", "backward", "forward", "new_state"]

# Keys from which the sparse regime is tried first. Its lists cost the same for a row at any length; on an H100 they
# cost as much as they save at about so many keys (recipes/benchmark/NOTES.md).
SPARSE_FROM = 6144
# Workspace of the backward pass on lists, in bytes: it does so many heads at a time.
_BACKWARD_BYTES = 112 << 20


class State(NamedTuple):
    """What a call leaves for its backward pass: dense_launch.DenseState and lists.device.Lists.

    Without lists where the dense regime does all rows. Of no use where no backward pass will follow.
    """

    tau: torch.Tensor
    mean_value: torch.Tensor | None = None
    block_map: torch.Tensor | None = None
    listed: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    column_counts: torch.Tensor | None = None
    overflow: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Those that there are; State(*tensors) is the state again, as only the last ones can be missing."""
        return [tensor for tensor in self if tensor is not None]


def _uses_lists(problem: Problem) -> bool:
    return problem.key.shape[2] >= SPARSE_FROM and lists_unsupported_reason(problem) is None


def new_state(problem: Problem) -> State:
    """A state of the right shapes, as a forward pass without values (for tracing)."""
    query = problem.query
    dense = new_dense_state(problem, for_backward=problem.for_backward)
    if not _uses_lists(problem):
        return State(*dense)
    q_len = query.shape[2]
    capacity = list_capacity(problem, list_tiles(query.dtype, query.shape[3]))
    empty = problem.launch.empty
    listed = empty((problem.groups, capacity), torch.int32)
    offsets, counts = (empty((problem.groups, q_len), torch.int32) for _ in range(2))
    batch, kv_heads, kv_len, _ = problem.key.shape
    columns = (batch * kv_heads, kv_len) if keeps_weights(problem) else (0,)
    overflow = empty((problem.groups, -(-q_len // ACTIVE_ROWS)), torch.uint8)
    return State(*dense, listed, offsets, counts, empty(columns, torch.int32), overflow)


def forward(problem: Problem, output: torch.Tensor) -> State:
    """Writes output (batch, heads, q_len, value_dim); returns what the backward pass needs."""
    dense = new_dense_state(problem, for_backward=problem.for_backward)
    if not _uses_lists(problem):
        dense_forward(problem, output, dense)
        return State(*dense)
    largest_key = largest_key_norms(problem)
    lists = lists_forward(problem, output, dense.tau, dense.mean_value, largest_key)
    dense_forward(problem, output, dense, active=lists.overflow, largest_key=largest_key)
    return State(*dense, *lists)


def _parts(problem: Problem, capacity: int) -> Iterator[tuple[slice, slice, slice]]:
    """(batch entries, query heads, key heads) of parts of a call whose workspace fits into _BACKWARD_BYTES.

    Either of several batch entries with all their heads, or of heads of one: contiguous in (batch, heads).
    """
    batch, kv_heads = problem.key.shape[:2]
    members = problem.query.shape[1] // kv_heads
    a_head = 8 * members * capacity
    entries = max(1, _BACKWARD_BYTES // (a_head * kv_heads))
    kv_at_once = kv_heads if entries > 1 else max(1, min(kv_heads, _BACKWARD_BYTES // a_head))
    for entry in range(0, batch, entries):
        for head in range(0, kv_heads, kv_at_once):
            last = min(head + kv_at_once, kv_heads)
            yield slice(entry, entry + entries), slice(head * members, last * members), slice(head, last)


def backward(problem: Problem, state: State, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), laid out as query, key and value are; grad has unit stride in the last dimension.

    dk and dv of the lists are summed in an order that changes from run to run in the last bits, unless
    torch.use_deterministic_algorithms asks for the slower way.
    """
    query_grad, key_grad, value_grad = (
        problem.launch.empty_like(t) for t in (problem.query, problem.key, problem.value)
    )
    tau, mean_value, block_map, *kept = state
    all_lists = [tensor for tensor in kept if tensor is not None]
    if not all_lists:
        dense_backward(problem, DenseState(tau, mean_value, block_map), grad, query_grad, key_grad, value_grad)
        return query_grad, key_grad, value_grad
    assert mean_value is not None and block_map is not None
    listed, offsets, counts, column_counts, overflow = all_lists
    deterministic = torch.are_deterministic_algorithms_enabled()
    heads, kv_heads = problem.query.shape[1], problem.key.shape[1]
    ends = column_counts
    if ends.numel():
        ends = problem.launch.torch(column_ends, ends)
    for entries, query_heads, key_heads in _parts(problem, listed.shape[1]):
        part = problem.part(entries, query_heads, key_heads)
        first, first_kv = entries.start * heads + query_heads.start, entries.start * kv_heads + key_heads.start
        groups = slice(first, first + part.groups)
        kv_groups = slice(first_kv, first_kv + part.key.shape[0] * part.key.shape[1])
        dense = DenseState(tau[entries, query_heads], mean_value[entries, query_heads], block_map[groups])
        lists = Lists(
            listed[groups], offsets[groups], counts[groups], column_counts[kv_groups], overflow[groups]
        )  # fmt: skip
        gradients = (
            grad[entries, query_heads], query_grad[entries, query_heads], key_grad[entries, key_heads],
            value_grad[entries, key_heads],
        )  # fmt: skip
        lists_backward(
            part,
            tau[entries, query_heads],
            mean_value[entries, query_heads],
            lists,
            Gradients(*gradients),
            ends[kv_groups],
            deterministic=deterministic,
        )
        dense_backward(part, dense, *gradients, active=lists.overflow)
    return query_grad, key_grad, value_grad
