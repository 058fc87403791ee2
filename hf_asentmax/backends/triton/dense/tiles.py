"""Tile sizes of the dense kernels, chosen by timings on an H100 (recipes/benchmark/NOTES.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..common.problem import Problem

__all__ = ["Tiles", "class_count", "forward_tiles", "key_gradient_tiles", "query_gradient_tiles", "sample_size"]

# Up to this many keys the forward pass takes class maxima without trying a sample first.
UNSAMPLED_KEYS = 1024


class Tiles(NamedTuple):
    """Query rows and keys of a tile, warps a program, loads in flight, and registers a thread at most.

    168 registers let three programs of four warps share a multiprocessor, where 255 let two.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def forward_tiles(problem: Problem) -> Tiles:
    """Tiles of dense_forward_kernel."""
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
    """Residue classes of keys in the forward pass."""
    if problem.query.dtype == torch.float32:
        return 64 if problem.width <= 128 else 32
    return 128 if problem.key.shape[2] > UNSAMPLED_KEYS else 64


def sample_size(problem: Problem) -> int:
    """Sampled keys in the forward pass, or 0 for no sample. ALiBi's reach needs the sample's maxima."""
    return class_count(problem) if problem.key.shape[2] > UNSAMPLED_KEYS or problem.slopes is not None else 0


def query_gradient_tiles(problem: Problem, map_rows: int) -> Tiles:
    """Tiles of query_gradient_kernel, where a block of the block map has map_rows query rows."""
    if problem.query.dtype == torch.float32:
        tiles = Tiles(32, 32, 4, 1)
    elif problem.width <= 64:
        tiles = Tiles(64, 64, 4, 3)
    elif problem.width <= 128:
        tiles = Tiles(64, 64, 4, 2)
    else:
        tiles = Tiles(64, 32, 8, 2)
    return _within_block(tiles, map_rows)


def key_gradient_tiles(problem: Problem, map_rows: int) -> Tiles:
    """Tiles of key_gradient_kernel, likewise."""
    if problem.query.dtype == torch.float32:
        tiles = Tiles(32, 32, 4, 1) if problem.width <= 128 else Tiles(16, 32, 8, 1)
    elif problem.width <= 64:
        tiles = Tiles(64, 64, 4, 3)
    elif problem.width <= 128:
        tiles = Tiles(32, 64, 4, 2)
    else:
        tiles = Tiles(32, 64, 8, 1)
    return _within_block(tiles, map_rows)


def _within_block(tiles: Tiles, map_rows: int) -> Tiles:
    """Tiles of which whole ones make up a block of the block map."""
    return tiles._replace(rows=min(tiles.rows, map_rows))
