"""Which regime does a call, or each row block of it: short rows, lists, or dense tiles. README.md has an overview.

A long call goes through the lists first. They flag the row blocks whose support is too large for them, and the dense
regime does exactly these. The choice is made on the device, for each row block. Where lists do not pay or cannot be
used, the dense regime does all rows of the call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .common.blocks import KEY_BLOCK, ROW_BLOCK, blocks_of
from .common.problem import Problem
from .common.state import Gradients, TileState
from .dense.launch import dense_backward, dense_forward, largest_key_norms
from .dense.tiles import forward_tiles
from .lists.device import Lists
from .lists.launch import column_ends, lists_backward, lists_forward
from .lists.tiles import keeps_weights, list_capacity, list_tiles, lists_unsupported_reason
from .short.launch import forward_rows, holds_head, is_short, short_backward, short_forward

__all__ = ["LISTS_FROM", "State", "backward", "forward", "new_state", "regime"]

# Keys from which lists are tried first. Their cost for a row is the same at any length; on an H100 they cost as much as
# they save at about this many keys (recipes/benchmark/NOTES.md).
LISTS_FROM = 6144
# Workspace of the backward pass on lists, in bytes. The pass does as many heads at a time as fit.
_BACKWARD_BYTES = 112 << 20


class State(NamedTuple):
    """What a call leaves for its backward pass: the fields of TileState, and those of the lists where there are lists.

    Of no use where no backward pass will follow.
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
        """The tensors that are not None. State(*tensors) is the state again, because only the last can be None."""
        return [tensor for tensor in self if tensor is not None]


def regime(problem: Problem) -> str:
    """The regime of a call's forward pass: "short", "lists" (with dense tiles for some row blocks) or "dense"."""
    if is_short(problem):
        return "short"
    long = problem.key.shape[2] >= LISTS_FROM
    return "lists" if long and lists_unsupported_reason(problem) is None else "dense"


def _map_rows(problem: Problem) -> int:
    """Query rows a block of the block map: those of a tile of the forward pass over tiles."""
    return forward_rows(problem) if is_short(problem) else forward_tiles(problem).rows


def _new_tile_state(problem: Problem) -> TileState:
    """A state with an empty block map, and memory for the rest."""
    batch, heads, q_len, _ = problem.query.shape
    empty = problem.launch.empty
    tau = empty((batch, heads, q_len), torch.float32)
    if not problem.for_backward or holds_head(problem):
        return TileState(tau)
    blocks = (problem.groups, blocks_of(q_len, _map_rows(problem)), blocks_of(problem.key.shape[2], KEY_BLOCK))
    block_map = problem.launch.zeros(blocks, torch.uint8)
    return TileState(tau, empty((batch, heads, q_len, problem.value.shape[3]), problem.query.dtype), block_map)


def new_state(problem: Problem) -> State:
    """A state of the right shapes, for tracing a forward pass without values."""
    query = problem.query
    tile_state = _new_tile_state(problem)
    if regime(problem) != "lists":
        return State(*tile_state)
    q_len = query.shape[2]
    capacity = list_capacity(problem, list_tiles(query.dtype, query.shape[3]))
    empty = problem.launch.empty
    listed = empty((problem.groups, capacity), torch.int32)
    offsets, counts = (empty((problem.groups, q_len), torch.int32) for _ in range(2))
    batch, kv_heads, kv_len, _ = problem.key.shape
    columns = (batch * kv_heads, kv_len) if keeps_weights(problem) else (0,)
    overflow = empty((problem.groups, blocks_of(q_len, ROW_BLOCK)), torch.uint8)
    return State(*tile_state, listed, offsets, counts, empty(columns, torch.int32), overflow)


def forward(problem: Problem, output: torch.Tensor) -> State:
    """Writes output (batch, heads, q_len, value_dim); returns what the backward pass needs."""
    tile_state = _new_tile_state(problem)
    chosen = regime(problem)
    if chosen == "short":
        short_forward(problem, output, tile_state)
    elif chosen == "dense":
        dense_forward(problem, output, tile_state)
    else:
        largest_key = largest_key_norms(problem)
        lists = lists_forward(problem, output, tile_state.tau, tile_state.mean_value, largest_key)
        dense_forward(problem, output, tile_state, active=lists.overflow, largest_key=largest_key)
        return State(*tile_state, *lists)
    return State(*tile_state)


def _parts(problem: Problem, capacity: int) -> Iterator[tuple[slice, slice, slice]]:
    """(batch entries, query heads, key heads) of parts of a call whose workspace fits into _BACKWARD_BYTES.

    A part is several batch entries with all their heads, or some heads of one entry: contiguous in (batch, heads).
    """
    batch, kv_heads = problem.key.shape[:2]
    members = problem.query.shape[1] // kv_heads
    head_bytes = 8 * members * capacity
    entries = max(1, _BACKWARD_BYTES // (head_bytes * kv_heads))
    kv_at_once = kv_heads if entries > 1 else max(1, min(kv_heads, _BACKWARD_BYTES // head_bytes))
    for entry in range(0, batch, entries):
        for head in range(0, kv_heads, kv_at_once):
            last = min(head + kv_at_once, kv_heads)
            yield slice(entry, entry + entries), slice(head * members, last * members), slice(head, last)


def backward(problem: Problem, state: State, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), laid out as query, key and value are; grad has unit stride in the last dimension.

    Lists sum dk and dv in an order that changes the last bits from run to run, unless
    torch.use_deterministic_algorithms asks for the slower, deterministic sums.
    """
    gradients = Gradients(grad, *(problem.launch.empty_like(t) for t in (problem.query, problem.key, problem.value)))
    tile_state = TileState(*state[:3])
    # What the forward pass kept decides here, so that a constant that changes in between changes nothing.
    if state.listed is not None:
        _lists_backward(problem, state, gradients)
    elif tile_state.block_map is None:
        short_backward(problem, tile_state, gradients)
    else:
        dense_backward(problem, tile_state, gradients, _map_rows(problem))
    return gradients.query, gradients.key, gradients.value


def _lists_backward(problem: Problem, state: State, gradients: Gradients) -> None:
    """The backward pass of a call whose forward pass made lists; the dense regime does the row blocks without."""
    tau, mean_value, block_map, listed, offsets, counts, column_counts, overflow = state
    assert mean_value is not None and block_map is not None and listed is not None and offsets is not None
    assert counts is not None and column_counts is not None and overflow is not None
    heads, kv_heads = problem.query.shape[1], problem.key.shape[1]
    ends = column_counts
    if ends.numel():
        ends = problem.launch.torch(column_ends, ends)
    for entries, query_heads, key_heads in _parts(problem, listed.shape[1]):
        part = problem.part(entries, query_heads, key_heads)
        first, first_kv = entries.start * heads + query_heads.start, entries.start * kv_heads + key_heads.start
        groups = slice(first, first + part.groups)
        kv_groups = slice(first_kv, first_kv + part.key.shape[0] * part.key.shape[1])
        tiles = TileState(tau[entries, query_heads], mean_value[entries, query_heads], block_map[groups])
        lists = Lists(
            listed[groups], offsets[groups], counts[groups], column_counts[kv_groups], overflow[groups]
        )  # fmt: skip
        part_gradients = Gradients(
            gradients.output[entries, query_heads], gradients.query[entries, query_heads],
            gradients.key[entries, key_heads], gradients.value[entries, key_heads],
        )  # fmt: skip
        lists_backward(
            part,
            tiles.tau,
            mean_value[entries, query_heads],
            lists,
            part_gradients,
            ends[kv_groups],
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        dense_backward(part, tiles, part_gradients, _map_rows(part), active=overflow[groups])
