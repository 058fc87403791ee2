"""Memory of the forward pass on lists: the lists themselves, and what kernels leave for the next one."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..common.blocks import ROW_BLOCK
from ..common.problem import Problem
from .candidates import LISTERS
from .device import CandidateWords, KeyBlocks, Lists, Maxima
from .tiles import ListTiles, list_capacity

__all__ = ["TileWorkspace", "new_lists", "new_workspace"]

# Bytes for the block maxima and candidate words of the row tiles that are worked on at a time.
_WORKSPACE_BYTES = 312 << 20


class TileWorkspace(NamedTuple):
    """Memory for `at_once` of the call's `tiles` row tiles, with room for `blocks` key blocks each."""

    maxima: Maxima
    key_blocks: KeyBlocks
    words: CandidateWords
    tiles: int
    at_once: int
    blocks: int


def new_lists(problem: Problem, tiles: ListTiles, packed: bool) -> tuple[Lists, torch.Tensor]:
    """Lists for a call, overflow and column counts all zero, and the count of entries taken of each head, zero too.

    Args:
        packed: the lists keep weights, and column_counts is in use.
    """
    empty, zeros = problem.launch.empty, problem.launch.zeros
    q_len = problem.query.shape[2]
    batch, kv_heads, kv_len, _ = problem.key.shape
    listed = empty((problem.groups, list_capacity(problem, tiles)), torch.int32)
    offsets, counts = (empty((problem.groups, q_len), torch.int32) for _ in range(2))
    used = zeros((problem.groups,), torch.int32)
    column_counts = zeros((batch * kv_heads, kv_len) if packed else (0,), torch.int32)
    overflow = zeros((problem.groups, -(-q_len // ROW_BLOCK)), torch.uint8)
    return Lists(listed, offsets, counts, column_counts, overflow), used


def new_workspace(problem: Problem, tiles: ListTiles) -> TileWorkspace:
    """Memory for as many row tiles at a time as fit into _WORKSPACE_BYTES, at least one."""
    q_len, kv_len = problem.query.shape[2], problem.key.shape[2]
    maxima_type = torch.float32 if problem.query.dtype == torch.float32 else torch.bfloat16
    blocks = -(-kv_len // tiles.maxima_keys) * (tiles.maxima_keys // tiles.block)
    all_tiles = problem.groups * -(-q_len // tiles.rows)
    tile_bytes = tiles.rows * (blocks * maxima_type.itemsize + tiles.words * 4) + blocks * 4
    at_once = max(1, min(all_tiles, _WORKSPACE_BYTES // tile_bytes))
    empty = problem.launch.empty
    maxima = empty((at_once, blocks, tiles.rows), maxima_type)
    tops, bounds = (empty((at_once, tiles.rows), torch.float32) for _ in range(2))
    spans = empty((at_once, 5), torch.int32)
    active, active_counts = empty((at_once, blocks), torch.int32), empty((at_once, 2), torch.int32)
    entries = empty((at_once, tiles.rows, tiles.words), torch.int32)
    entry_counts = empty((at_once, tiles.rows, LISTERS.value), torch.int32)
    return TileWorkspace(
        maxima=Maxima(maxima, tops, spans),
        key_blocks=KeyBlocks(bounds, active, active_counts),
        words=CandidateWords(entries, entry_counts),
        tiles=all_tiles,
        at_once=at_once,
        blocks=blocks,
    )
