"""Tile sizes of the kernels, and which calls the lists can do."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..common.problem import Problem

__all__ = [
    "ListTiles",
    "keeps_weights",
    "list_capacity",
    "list_tiles",
    "lists_unsupported_reason",
]

# Room in the lists, in keys a row on average: trained models have supports of 1 to 50.
_KEYS_A_ROW = 56
# packed_entry has 18 bits for the key.
_MOST_KEYS = 1 << 18


class ListTiles(NamedTuple):
    """Sizes of the tiles, and warps and registers a program, for one type and head_dim.

    Attributes:
        rows: query rows a tile; ROW_BLOCK where lists keep weights, so that a block's overflow is known in one launch.
        maxima_keys: keys a step of the first pass.
        block: keys a block maximum stands for, and a step of the second pass.
        maxima_warps, maxima_stages, maxima_registers: of the first pass; registers a thread, None for no limit.
        candidate_warps, candidate_stages, candidate_registers: of the second pass.
        steps: Newton steps on the block maxima; bound_unit: blocks read at a time; bound_warps: warps there.
        words: room for a row's words of 16 keys.
        room: the most keys that a row may list.
        expand_rows, expand_warps: rows a program, and warps, where words become keys.
        list_rows, list_chunk, list_warps, list_registers: rows a program, keys gathered at a time, warps, and registers
            a thread, of the forward pass on the lists.
        grad_rows, grad_chunk, grad_warps, grad_registers: the same of the backward pass, where a program does its rows
            one after the other.
        column_keys, column_chunk: of the last pass, keys that a program does one after the other, and rows gathered at
            a time.
    """

    rows: int = 128
    maxima_keys: int = 128
    block: int = 128
    maxima_warps: int = 8
    maxima_stages: int = 3
    maxima_registers: int | None = None
    candidate_warps: int = 8
    candidate_stages: int = 3
    candidate_registers: int | None = None
    steps: int = 3
    bound_unit: int = 32
    bound_warps: int = 4
    words: int = 256
    room: int = 128
    expand_rows: int = 8
    expand_warps: int = 1
    list_rows: int = 4
    list_chunk: int = 8
    list_warps: int = 1
    list_registers: int | None = None
    grad_rows: int = 4
    grad_chunk: int = 16
    grad_warps: int = 1
    grad_registers: int | None = None
    column_keys: int = 4
    column_chunk: int = 8


def list_tiles(dtype: torch.dtype, head_dim: int) -> ListTiles:
    """The tile sizes for a type and head_dim, chosen by timings on an H100 (recipes/benchmark/NOTES.md).

    Two programs of 8 warps share a multiprocessor if each thread has at most 128 registers and shared memory holds
    both. Then one multiplies while the other compares scores.
    """
    if dtype == torch.float32:
        return ListTiles(
            rows=64, maxima_keys=64, block=64, maxima_warps=4, maxima_stages=2, candidate_warps=4, candidate_stages=2
        )
    if head_dim <= 64:
        return ListTiles(maxima_registers=128, candidate_registers=128, grad_registers=80)
    if head_dim <= 128:
        return ListTiles(
            maxima_stages=2, candidate_stages=2, maxima_registers=128, candidate_registers=128, list_rows=2,
            grad_chunk=8,
        )  # fmt: skip
    return ListTiles(maxima_stages=2, candidate_stages=2, list_rows=1, grad_chunk=4)


def lists_unsupported_reason(problem: Problem) -> str | None:
    """Why lists cannot do a call (dense tiles can), or None."""
    if problem.softcap is not None:
        return "scores are soft-capped"
    if problem.ranges.dense_mask is not None:
        return "the mask is 4D"
    if not problem.scale > 0:
        return "the scale is not positive"
    if problem.key.shape[2] > _MOST_KEYS:
        return f"there are more than {_MOST_KEYS:,} keys: an entry of a list has 18 bits for the key"
    if problem.query.dtype == torch.float32 and problem.constants["D"] > 128:
        return "float32 tiles of a head_dim above 128 do not fit into a multiprocessor"
    return None


def keeps_weights(problem: Problem) -> bool:
    """Whether the lists keep r = [u - tau]_+ for the backward pass, as float16: for 16-bit inputs.

    p = r^(1/(alpha-1)) has 1/(alpha-1) times r's relative error of 2^-12.
    """
    return problem.query.dtype != torch.float32 and problem.alpha >= 1.25


def list_capacity(problem: Problem, tiles: ListTiles) -> int:
    """Keys that the lists of a head have room for together.

    Programs reserve space in no particular order. So where two runs must agree, there has to be room for all rows.
    """
    keys_a_row = tiles.room if torch.are_deterministic_algorithms_enabled() else min(_KEYS_A_ROW, tiles.room)
    return problem.query.shape[2] * keys_a_row
