"""Which kernels do a call, and their tile sizes, chosen by timings on an H100 (recipes/benchmark/NOTES.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .problem import Problem, padded

__all__ = [
    "Tiles",
    "forward_tiles",
    "key_gradient_tiles",
    "map_rows",
    "query_gradient_tiles",
    "regime",
    "short_rows",
    "single_warps",
]


class Tiles(NamedTuple):
    """Rows and keys a step, warps a program, and loads in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


def _width(problem: Problem) -> int:
    return max(padded(problem.query.shape[3]), padded(problem.value.shape[3]))


def regime(problem: Problem) -> str:
    """"single": one program does a head, forward and backward; "short": forward in registers; else "dense"."""
    q_len, kv_len = problem.query.shape[2], problem.key.shape[2]
    width = _width(problem)
    exact = problem.query.dtype == torch.float32
    if q_len <= 128 and kv_len <= 128 and width <= 64 and not (exact and max(q_len, kv_len) > 64):
        return "single"
    if kv_len <= 512 and width <= 64 and not exact:
        return "short"
    return "dense"


def map_rows(problem: Problem) -> int:
    """Query rows a block of the block map: the forward kernel's tile."""
    return short_rows(problem) if regime(problem) == "short" else forward_tiles(problem).rows


def short_rows(problem: Problem) -> int:
    """Rows a program of the short forward kernel."""
    rows = max(16, 1 << (problem.query.shape[2] - 1).bit_length())
    return min(rows, 128 if regime(problem) == "single" else 64)


def single_warps(problem: Problem) -> int:
    """Warps a program that holds (rows, keys) scores."""
    largest = max(problem.query.shape[2], problem.key.shape[2])
    return 8 if largest > 64 else 4


def forward_tiles(problem: Problem) -> Tiles:
    width = _width(problem)
    if problem.query.dtype == torch.float32:
        return Tiles(64, 32, 4, 1) if width <= 64 else Tiles(32, 32, 4, 1)
    if width <= 64:
        return Tiles(128, 64, 8, 3)
    if width <= 128:
        return Tiles(128, 64, 8, 3)
    return Tiles(64, 64, 8, 2)


def query_gradient_tiles(problem: Problem) -> Tiles:
    width = _width(problem)
    rows = map_rows(problem)
    if problem.query.dtype == torch.float32:
        return Tiles(32, 32, 4, 1)
    if width <= 64:
        return Tiles(min(rows, 128), 64, 8 if rows >= 128 else 4, 3)
    if width <= 128:
        return Tiles(min(rows, 128), 64, 8, 2)
    return Tiles(64, 32, 8, 2)


def key_gradient_tiles(problem: Problem) -> Tiles:
    width = _width(problem)
    if problem.query.dtype == torch.float32:
        return Tiles(32, 32, 4, 1)
    if width <= 64:
        return Tiles(64, 128, 8, 2)
    if width <= 128:
        return Tiles(32, 128, 8, 2)
    return Tiles(32, 64, 8, 1)
