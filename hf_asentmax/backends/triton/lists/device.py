"""What the kernels of this folder share: groups of arguments, gathers, and stores that keep their layout.

A group is a NamedTuple. Most are arguments of kernels. A kernel builds `RowTile` and `Matrix` for its device functions;
such a group holds no compile-time constants, because Triton turns them into run-time values on assignment.
No field may be called `values` or `type`, which are names of Triton's own tuples. The groups are flat, because
`common/launching.py` looks for tensors one level deep.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.device import load_rows, visible_pairs

__all__ = [
    "INTERPRETED",
    "CandidateWords",
    "KeyBlocks",
    "KeyRecords",
    "KeySums",
    "Lists",
    "Matrix",
    "Maxima",
    "RowTile",
    "gather_rows",
    "masked_scores",
    "scatter",
    "tile_of",
]

# Triton's interpreter knows no inline assembly; each use of it has a replacement there that computes the same.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Maxima(NamedTuple):
    """What `block_maxima_kernel` writes for each row tile.

    Attributes:
        blocks: (tiles, key blocks, BM) float32 or bfloat16 (rounded to nearest), each row's maximum in each key block;
            written within the tile's span.
        tops: (tiles, BM) float32, each row's maximum; -inf for rows that see no key, NaN where a row's range holds
            nothing but padding or scores that are not numbers.
        spans: (tiles, 5) int32. Key blocks [span 0, span 3) may hold weights. Every row sees all keys of the blocks
            [span 1, span 2), and these carry no ALiBi. Span 4 is 1 where negative maxima of these blocks may be too
            small.
    """

    blocks: Any
    tops: Any
    spans: Any


class KeyBlocks(NamedTuple):
    """What `row_bounds_kernel` writes for each row tile.

    Attributes:
        bounds: (tiles, BM) float32, at most each row's tau; +inf for rows without a key.
        active: (tiles, key blocks) int32, the key blocks that may hold a candidate, those that need a mask first.
        counts: (tiles, 2) int32, how many active blocks need a mask, and how many there are.
    """

    bounds: Any
    active: Any
    counts: Any


class CandidateWords(NamedTuple):
    """What `candidates_kernel` writes for each row tile; `candidates.py` describes the entries.

    Attributes:
        entries: (tiles, BM, LISTERS, ROOM / LISTERS) int32.
        counts: (tiles, BM, LISTERS) int32; ROOM / LISTERS - 1 marks a full list, which may lack some candidates.
    """

    entries: Any
    counts: Any


class Lists(NamedTuple):
    """The rows' lists of keys, and the row blocks that have none.

    Attributes:
        listed: (batch * heads, capacity) int32, the rows' lists one after another: keys, or keys with their r
            (`keeps_weights`).
        offsets, counts: (batch * heads, q_len) int32, where a row's list begins and how many keys it holds.
        column_counts: (batch * kv_heads, kv_len) int32, how many rows list a key with r > 0; empty unless
            `keeps_weights`. Kernels get None where they do not use it.
        overflow: (batch * heads, ceil(q_len / ROW_BLOCK)) uint8, 1 where a row did not fit: output, tau and gradients
            of these row blocks are the dense regime's.
    """

    listed: Any
    offsets: Any
    counts: Any
    column_counts: Any
    overflow: Any


class KeySums(NamedTuple):
    """Sums that rows add their terms of dk and dv to.

    Attributes:
        of_keys, of_values: (batch, kv_heads, kv_len, head_dim or value_dim) float32 or int64, contiguous.
        units: (2,) float32, what the integer sums multiply terms of dk and dv by; None for float32.
    """

    of_keys: Any
    of_values: Any
    units: Any


class KeyRecords(NamedTuple):
    """Records of the rows that give a key a weight, one key's records after another's.

    Attributes:
        cursors: (batch * kv_heads, kv_len) int32. `list_backward_kernel` gets the place after each key's last record
            and leaves the place of its first one.
        counts: (batch * kv_heads, kv_len) int32, how many records a key has; None in `list_backward_kernel`.
        records: (batch * kv_heads, heads / kv_heads * capacity) int64, see `packed_record`.
    """

    cursors: Any
    counts: Any
    records: Any


class RowTile(NamedTuple):
    """The query rows of a program: their head, their numbers, the interval of keys that each may see, ALiBi's slope."""

    batch: Any
    head: Any
    kv_head: Any
    rows: Any
    start: Any
    stop: Any
    slope: Any


class Matrix(NamedTuple):
    """The rows of one head: a pointer to the first, and the stride from one to the next."""

    pointer: Any
    row: Any


@triton.jit
def tile_of(first_tile, lengths, BM: tl.constexpr):
    """(batch, head, kv_head, first_row) of this program's row tile; a head's longest rows come first."""
    row_tiles = tl.cdiv(lengths.q_len, BM)
    tile = first_tile + tl.program_id(0)
    group = tile // row_tiles
    row_tile = row_tiles - 1 - tile % row_tiles
    head = group % lengths.heads
    return group // lengths.heads, head, head // (lengths.heads // lengths.kv_heads), row_tile * BM


@triton.jit
def masked_scores(
    q, key, tile, first, masks, scoring, lengths,
    BN: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(rows, BN) scores (alpha-1)(scale q k - slope |i - j|) of the keys from `first` on; -inf where a row is blind.

    Args:
        q: (rows, D), the queries of the RowTile `tile`; key: Rows.
    """
    k = load_rows(key, tile.batch, tile.kv_head, first, BN, lengths.kv_len, True, D, HEAD_DIM)
    keys = first + tl.arange(0, BN)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scoring.scale
    if scoring.slopes is not None:
        position = tile.rows + (lengths.kv_len - lengths.q_len)
        score -= tile.slope * tl.abs(position[:, None] - keys[None, :]).to(tl.float32)
    seen = visible_pairs(
        masks, tile.batch, tile.head, tile.rows, keys, tile.start, tile.stop, lengths.q_len, lengths.kv_len
    )
    return tl.where(seen, score, float("-inf"))


@triton.jit
def gather_rows(matrix, keys, inside, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(..., D) float32: the rows of a Matrix at the indices `keys` (..., 1), zeros where not `inside`."""
    dim = tl.arange(0, D)[None, :]
    if len(keys.shape) == 3:
        dim = dim[None, :, :]
    pointers = matrix.pointer + keys.to(tl.int64) * matrix.row + dim
    if HEAD_DIM != D:
        inside = inside & (dim < HEAD_DIM)
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def scatter(pointers, values, mask):
    """tl.store of 16- or 32-bit integers in the layout that they have.

    tl.store would change the layout first, which passes the tile through shared memory.
    """
    if INTERPRETED:
        tl.store(pointers, values, mask=mask)
    elif values.dtype == tl.int16:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b16 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,h,r", [pointers, values, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r", [pointers, values, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
