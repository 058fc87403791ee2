"""Launches of the decoding kernels: tile sizes, workspace. README.md in this folder describes the steps.

Nothing waits for the device. On Hopper and later GPUs each kernel is launched while the one before it still runs, and
waits for it on the device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ..common.launching import on_device
from ..common.problem import Problem, padded, rows_of
from .output import decode_flat_kernel, decode_output_kernel
from .scores import KeyNormBound, Queries, Workspace, decode_scores_kernel

__all__ = ["DecodeTiles", "decode", "decode_tiles"]

# Newton steps on the tile maxima: in simulations, more of them left hardly fewer candidates.
_BOUND_STEPS = 3
# Most Newton steps on the candidates; the loop stops when tau stays.
_STEPS = 24
# Tile maxima that a program reads at a time.
_MOST_TILES_AT_ONCE = 4096
# Candidates that a program solves in registers, and those that it reads at a time where there are more.
_SOLVED_IN_REGISTERS = 512
_SOLVED_AT_ONCE = 2048
# The third kernel does rows with more tiles above their bound. Caches of up to _SHORT_TILES tiles are done without it.
_MOST_TILES_LISTED = 128
_SHORT_TILES = 640  # 40,960 keys: a prompt of 32,768 and what is generated after it


class DecodeTiles(NamedTuple):
    """Sizes of the kernels.

    Attributes:
        rows: query rows a program of the first kernel; keys: keys a tile; tiles: tiles a program, a power of two.
        warps, stages: of the first kernel.
        parts: programs of the other kernels that share a query row.
        values: values gathered at once; output_warps: warps of the second kernel. The third uses twice as many of both.
    """

    rows: int
    keys: int
    tiles: int
    warps: int
    stages: int
    parts: int
    values: int
    output_warps: int


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def decode_tiles(problem: Problem, reaches: bool = False) -> DecodeTiles:
    """Sizes for a call: enough programs to fill the GPU at batch 1, few enough that none is idle for long.

    Args:
        reaches: some heads see a short span only, whatever the cache's length. They cost the start of their programs,
            so there are fewer programs.
    """
    batch, heads, q_len, _ = problem.query.shape
    kv_heads, kv_len = problem.key.shape[1:3]
    processors = _multiprocessors(problem.query.device)
    shared_rows = heads // kv_heads * q_len
    rows = 16 if shared_rows <= 16 else 32 if shared_rows <= 32 else 64
    exact = problem.query.dtype == torch.float32
    keys = 64
    if exact and problem.width > 64:  # products in float32 go through registers
        keys = 32 if problem.width <= 128 else 16
    stages = 1 if exact else 3 if problem.width <= 64 or kv_len >= 65536 else 2
    groups = batch * kv_heads * -(-shared_rows // rows)
    tiles = 4 if q_len > 4 else 32 if reaches and q_len == 1 else 8
    while tiles > 1 and groups * -(-kv_len // (keys * tiles)) < (3 if tiles > 8 else 6) * processors:
        tiles //= 2
    parts = min(8, max(1, 2 * processors // max(1, batch * heads * q_len)))
    values = 64 if problem.width <= 128 else 32
    return DecodeTiles(rows, keys, tiles, 4, stages, parts, values, 4)


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel can be launched before the one ahead of it has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _workspace(problem: Problem, sizes: DecodeTiles) -> Workspace:
    """The Workspace of a call, in one piece, because each allocation costs the host a microsecond."""
    tiles = -(-problem.key.shape[2] // sizes.keys)
    listed = tiles if tiles <= _SHORT_TILES else _MOST_TILES_LISTED
    ends = []
    end = 0
    for size in (tiles * sizes.keys, tiles, tiles, tiles * sizes.keys, listed * sizes.keys):
        end += -(-size // 32) * 32
        ends.append(end)
    ends.append(end + sizes.parts * (padded(problem.value.shape[3]) + 32))
    rows = problem.groups * problem.query.shape[2]
    memory = problem.launch.empty((rows, ends[-1] + 32), torch.float32)
    return Workspace(memory, ends[-1] + 32, *ends)


def _search_levels(kv_len: int) -> int:
    return 2 if kv_len <= 64**2 else 3 if kv_len <= 64**3 else 4


def decode(
    problem: Problem,
    output: torch.Tensor,
    key_norm_bound: torch.Tensor | None = None,
    sizes: DecodeTiles | None = None,
) -> None:
    """alpha-entmax attention without a backward pass, in two launches, three for a long cache.

    Args:
        output: (batch, heads, q_len, value_dim), written.
        key_norm_bound: (batch or 1, kv_heads) float32, at least the norm of every key; with it, ALiBi heads read no
            key that is provably too far away. The result is the same without.
        sizes: instead of decode_tiles's choice.
    """
    sizes = sizes or decode_tiles(problem, reaches=key_norm_bound is not None and problem.scoring.slopes is not None)
    workspace = _workspace(problem, sizes)
    overlaps = _overlaps(problem.query.device)
    launch: dict[str, Any] = {"OVERLAPS": overlaps, **({"launch_pdl": True} if overlaps else {})}
    with on_device(problem.launch.device):
        _launch_scores(problem, workspace, key_norm_bound, sizes, launch)
        _launch_outputs(problem, workspace, output, sizes, launch)


def _queries(problem: Problem) -> Queries:
    return Queries(problem.query.shape[1], problem.key.shape[1], problem.query.shape[2])


def _launch_scores(
    problem: Problem,
    workspace: Workspace,
    key_norm_bound: torch.Tensor | None,
    sizes: DecodeTiles,
    launch: dict[str, Any],
) -> None:
    """Step 1: scores and tile maxima."""
    batch, heads, q_len, _ = problem.query.shape
    kv_heads, kv_len = problem.key.shape[1:3]
    tiles = -(-kv_len // sizes.keys)
    splits = -(-tiles // sizes.tiles)
    row_tiles = -(-(heads // kv_heads * q_len) // sizes.rows)
    per_entry = 0 if key_norm_bound is None or key_norm_bound.shape[0] == 1 else kv_heads
    dense = problem.ranges.dense_mask
    constants = problem.constants
    problem.launch(
        decode_scores_kernel, batch * kv_heads * row_tiles * splits,
        rows_of(problem.query), rows_of(problem.key), workspace, KeyNormBound(key_norm_bound, per_entry),
        problem.masks, problem.scoring, _queries(problem), kv_len, splits,
        BM=sizes.rows, BN=sizes.keys, TILES=sizes.tiles, Q=1 << (q_len - 1).bit_length(),
        SEARCH=problem.masks.key_valid is not None if dense is None else dense.shape[1] == 1,
        LEVELS=_search_levels(kv_len), D=constants["D"], HEAD_DIM=constants["HEAD_DIM"],
        PRECISION=constants["PRECISION"], num_warps=sizes.warps, num_stages=sizes.stages, **launch,
    )  # fmt: skip


def _launch_outputs(
    problem: Problem, workspace: Workspace, output: torch.Tensor, sizes: DecodeTiles, launch: dict[str, Any]
) -> None:
    """Step 2, and step 3 for a long cache: tau and output."""
    kv_len = problem.key.shape[2]
    tiles = -(-kv_len // sizes.keys)
    arguments = (rows_of(problem.value), rows_of(output), workspace, problem.scoring, _queries(problem))
    programs = problem.groups * problem.query.shape[2] * sizes.parts
    common: dict[str, Any] = {
        "PARTS": sizes.parts,
        "BN": sizes.keys,
        "MANY": _SOLVED_AT_ONCE,
        "STEPS": _STEPS,
        "DV": problem.constants["DV"],
        "VALUE_DIM": problem.constants["VALUE_DIM"],
        "num_stages": 1,
        **launch,
    }
    problem.launch(
        decode_output_kernel, programs, *arguments, kv_len,
        NB=min(_MOST_TILES_AT_ONCE, padded(tiles)), CB=max(1024, 512 * sizes.output_warps) // sizes.keys,
        SHARED_FROM=None if tiles <= _SHORT_TILES else _MOST_TILES_LISTED + 1, FEW=_SOLVED_IN_REGISTERS,
        CV=sizes.values, BOUND_STEPS=_BOUND_STEPS, num_warps=sizes.output_warps, **common,
    )  # fmt: skip
    if tiles > _SHORT_TILES:
        problem.launch(
            decode_flat_kernel, programs, *arguments,
            CV=2 * sizes.values, num_warps=2 * sizes.output_warps, **common,
        )  # fmt: skip
