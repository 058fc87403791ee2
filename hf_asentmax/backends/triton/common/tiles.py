"""Which kernels do a call, and their tile sizes, chosen by timings on an H100 (recipes/benchmark/NOTES.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .problem import Problem, padded

__all__ = [
    "UNSAMPLED_KEYS",
    "Tiles",
    "class_count",
    "forward_tiles",
    "key_gradient_tiles",
    "map_rows",
    "query_gradient_tiles",
    "regime",
    "short_rows",
    "short_warps",
    "single_backward_warps",
    "single_rows",
]


# Keys up to which the dense forward pass takes class maxima without trying a sample first.
UNSAMPLED_KEYS = 1024


class Tiles(NamedTuple):
    """Rows and keys a step, warps a program, loads in flight, and registers a thread at most.

    168 registers let three programs of four warps share a multiprocessor, where 255 let two.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def regime(problem: Problem) -> str:
    """One of "single": a program does a head, forward and backward; "short": forward in registers; "dense"."""
    q_len, kv_len = problem.query.shape[2], problem.key.shape[2]
    width = problem.width
    exact = problem.query.dtype == torch.float32
    if q_len <= 128 and kv_len <= 128 and width <= 64 and not (exact and (max(q_len, kv_len) > 64 or width > 32)):
        return "single"
    if kv_len <= 256 and width <= 64 and not exact:
        return "short"
    return "dense"


def map_rows(problem: Problem) -> int:
    """Query rows a block of the block map: the forward kernel's tile."""
    return short_rows(problem) if regime(problem) == "short" else forward_tiles(problem).rows


def short_rows(problem: Problem) -> int:
    """Rows a program of the short forward kernel. Comparisons only: a traced length stays dynamic."""
    q_len = problem.query.shape[2]
    return 64 if q_len > 32 else 32 if q_len > 16 else 16


def single_rows(problem: Problem) -> int:
    """Rows that hold a head's queries, in the backward kernel that does a head in one program."""
    return padded(problem.query.shape[2])


def short_warps(problem: Problem) -> int:
    """Warps a program of the short forward kernel."""
    return 4


def single_backward_warps(problem: Problem) -> int:
    """Warps a program that holds the scores of all rows and keys of a head."""
    return 8 if max(problem.query.shape[2], problem.key.shape[2]) > 64 else 4


def forward_tiles(problem: Problem) -> Tiles:
    if problem.query.dtype == torch.float32:
        if problem.width <= 64:
            return Tiles(64, 32, 4, 1)
        return Tiles(32, 32, 4, 1) if problem.width <= 128 else Tiles(64, 32, 8, 1)
    if problem.width <= 64 and problem.key.shape[2] <= UNSAMPLED_KEYS:  # few steps a loop: waits weigh more than spills
        return Tiles(64, 64, 4, 2, 168)
    if problem.width <= 64:
        return Tiles(64, 64, 4, 3)
    if problem.width <= 128:
        return Tiles(128, 64, 8, 2) if problem.query.shape[2] > 64 else Tiles(64, 64, 4, 2)
    return Tiles(64, 32, 8, 2)


def class_count(problem: Problem) -> int:
    """Residue classes of keys, and sampled keys, in the dense forward pass."""
    if problem.query.dtype == torch.float32:
        return 64 if problem.width <= 128 else 32
    return 128 if problem.key.shape[2] > UNSAMPLED_KEYS else 64


def query_gradient_tiles(problem: Problem) -> Tiles:
    if problem.query.dtype == torch.float32:
        tiles = Tiles(32, 32, 4, 1)
    elif problem.width <= 64:
        tiles = Tiles(64, 64, 4, 3)
    elif problem.width <= 128:
        tiles = Tiles(64, 64, 4, 2)
    else:
        tiles = Tiles(64, 32, 8, 2)
    return _within_map(problem, tiles)


def key_gradient_tiles(problem: Problem) -> Tiles:
    if problem.query.dtype == torch.float32:
        tiles = Tiles(32, 32, 4, 1) if problem.width <= 128 else Tiles(16, 32, 8, 1)
    elif problem.width <= 64:
        tiles = Tiles(64, 64, 4, 3)
    elif problem.width <= 128:
        tiles = Tiles(32, 64, 4, 2)
    else:
        tiles = Tiles(32, 64, 8, 1)
    return _within_map(problem, tiles)


def _within_map(problem: Problem, tiles: Tiles) -> Tiles:
    """A block of the map holds whole tiles of the backward kernels."""
    return tiles._replace(rows=min(tiles.rows, map_rows(problem)))
