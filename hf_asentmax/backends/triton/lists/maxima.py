r"""First pass over the scores: each row's maximum in each key block.

The pass makes the products q k and nothing else; the score of a pair is u = (alpha-1)(scale q k - slope |i - j|). It
keeps one number for each row and key block. tau of a subset of the keys never exceeds tau of all keys, so tau of the
block maxima is a lower bound on tau (`bounds.py`), and few keys beyond the support lie above it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.device import load_rows, visible_interval
from .device import RowTile, masked_scores, scatter, tile_of

__all__ = ["block_maxima_kernel"]


@triton.jit
def _store_maxima(maxima, largest, block, index, BM: tl.constexpr):
    """Writes the (BM, parts) maxima of the key blocks in one step of the pass."""
    parts: tl.constexpr = largest.shape[1]
    part = block * parts + tl.arange(0, parts)
    stored = largest.to(maxima.dtype.element_ty)
    bits = tl.int16 if stored.dtype == tl.bfloat16 else tl.int32
    pointers = maxima.to(tl.pointer_type(bits)) + part[None, :] * BM + index[:, None]
    scatter(pointers, stored.to(bits, bitcast=True), part[None, :] >= 0)


@triton.jit
def _larger(top, largest):
    """The rows' maxima so far; NaN stays."""
    return tl.maximum(top, tl.max(largest, 1), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _alibi_low(q, key, tile, masks, scoring, largest_key, lengths, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The first key that may have a weight under ALiBi, over all rows of the RowTile `tile`.

    A row's maximum is at least the score of its own key. So z_ij <= (alpha-1)(scale |q_i| max|k| - slope (i - j)) <=
    z_ii - 1 proves that the weight of key j is zero. Rows that do not see their own key prove nothing.
    """
    own = tile.rows + (lengths.kv_len - lengths.q_len)
    seen = (own >= tile.start) & (own < tile.stop)
    if masks.key_valid is not None:
        valid = tl.load(masks.key_valid + tile.batch.to(tl.int64) * lengths.kv_len + own, mask=seen, other=0)
        seen = seen & (valid != 0)
    dim = tl.arange(0, D)
    pointer = key.pointer + tile.batch.to(tl.int64) * key.batch + tile.kv_head.to(tl.int64) * key.head
    inside = seen[:, None] & (dim[None, :] < HEAD_DIM)
    k = tl.load(pointer + own.to(tl.int64)[:, None] * key.row + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    q = q.to(tl.float32)
    score = tl.sum(q * k, 1) * scoring.scale
    bound = tl.sqrt(tl.sum(q * q, 1)) * (largest_key * scoring.scale)
    reach = tl.minimum((bound * 1.0001 - score + 1.0001) / tile.slope + 1.0, 1e9).to(tl.int32)
    first = tl.where(seen, own - reach, tile.start)
    return tl.min(tl.where(tile.start < tile.stop, tl.maximum(first, tile.start), lengths.kv_len), 0)


@triton.jit(do_not_specialize=["first_tile", "blocks"])
def block_maxima_kernel(
    query, key, maxima, largest_key, overflow, masks, scoring, lengths, first_tile, blocks,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, D: tl.constexpr,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The maximum score of each row in each block of BLOCK keys: max_j u_ij over the keys j of a block.

    Grid: one program for each row tile, BM query rows of one head. It reads its queries and all keys that they see,
    BN at a time, and writes the tile's `maxima`. Where the row block has overflowed already, it writes what a tile that
    sees no key gets, so that later kernels find nothing to do.

    Blocks that all rows see are compared as integers, the bits of float32, because the GPU compares three integers at
    once. The order is the same except among negative numbers, where it is reversed: a block of negative scores leaves
    its smallest. That is the score of a key too, so bounds stay bounds. They would be loose only where a row has
    nothing but negative scores; then the program repeats the tile's blocks in float32.

    Args:
        query, key: Rows.
        maxima: Maxima, written.
        largest_key: (batch * kv_heads,) float32, the largest Euclidean norm of a key.
        overflow: (batch * heads, ceil(q_len / ROW_BLOCK)) uint8, 1 for row blocks to leave alone.
        first_tile: number of this launch's first tile, counted over batch, heads and row tiles.
        blocks: how many key blocks a row of `maxima` has room for.
    """
    slot = tl.program_id(0).to(tl.int64)
    batch, head, kv_head, first_row = tile_of(first_tile, lengths, BM)
    kv_len = lengths.kv_len
    index = tl.arange(0, BM)
    row_block = (batch * lengths.heads + head) * tl.cdiv(lengths.q_len, ROW_BLOCK) + first_row // ROW_BLOCK
    if tl.load(overflow + row_block) != 0:
        tl.store(maxima.spans + slot * 5 + 3, 0)
        tl.store(maxima.tops + slot * BM + index, float("-inf"))
        return
    rows = first_row + index
    start, stop = visible_interval(masks, batch, rows, lengths.q_len, kv_len)
    sees = start < stop
    low = tl.min(tl.where(sees, start, kv_len), 0)
    high = tl.max(tl.where(sees, stop, 0), 0)
    all_low = tl.max(tl.where(sees, start, 0), 0)
    all_high = tl.min(tl.where(sees, stop, kv_len), 0)

    q = load_rows(query, batch, head, first_row, BM, lengths.q_len, True, D, HEAD_DIM)
    slope = 0.0
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + head) * scoring.slope_factor
    tile = RowTile(batch, head, kv_head, rows, start, stop, slope)
    if scoring.slopes is not None:  # noqa: SIM102 (one is decided at compile time)
        if slope > 0:
            largest = tl.load(largest_key + batch * lengths.kv_heads + kv_head)
            low = tl.maximum(low, _alibi_low(q, key, tile, masks, scoring, largest, lengths, D, HEAD_DIM))
    low = tl.minimum(low, high) // BN
    high = tl.cdiv(high, BN)
    full_low = tl.minimum(tl.maximum(tl.cdiv(all_low, BN), low), high)
    full_high = tl.maximum(tl.minimum(all_high // BN, high), full_low)
    if masks.has_holes is not None:
        full_high = tl.where(tl.load(masks.has_holes + batch) != 0, full_low, full_high)
    full_high = tl.where(slope > 0, full_low, full_high)
    parts: tl.constexpr = BN // BLOCK
    spans = maxima.spans + slot * 5
    tl.store(spans, low * parts)
    tl.store(spans + 1, full_low * parts)
    tl.store(spans + 2, full_high * parts)
    tl.store(spans + 3, high * parts)

    of_tile = maxima.blocks + slot * blocks * BM
    best = tl.full([BM], -(2**31), tl.int32)
    for step in range(0, full_high - full_low):
        block = full_low + step
        k = load_rows(key, batch, kv_head, block * BN, BN, kv_len, False, D, HEAD_DIM)
        product = tl.reshape(tl.dot(q, tl.trans(k), input_precision=PRECISION), [BM, parts, BLOCK])
        largest = tl.max(product.to(tl.int32, bitcast=True), 2)
        best = tl.maximum(best, tl.max(largest, 1))
        _store_maxima(of_tile, largest.to(tl.float32, bitcast=True) * scoring.scale, block, index, BM)
    top = best.to(tl.float32, bitcast=True) * scoring.scale
    some_negative = tl.min(tl.where(sees, best, 0), 0) < 0
    tl.store(spans + 4, tl.where(some_negative, 0, 1))
    if some_negative:
        top = tl.full([BM], float("-inf"), tl.float32)
        for step in range(0, full_high - full_low):
            block = full_low + step
            k = load_rows(key, batch, kv_head, block * BN, BN, kv_len, False, D, HEAD_DIM)
            product = tl.reshape(tl.dot(q, tl.trans(k), input_precision=PRECISION), [BM, parts, BLOCK])
            largest = tl.max(product, 2) * scoring.scale
            top = _larger(top, largest)
            _store_maxima(of_tile, largest, block, index, BM)
    edges = (full_low - low) + (high - full_high)
    for edge in range(0, edges):
        block = tl.where(low + edge < full_low, low + edge, full_high + edge - (full_low - low))
        score = masked_scores(q, key, tile, block * BN, masks, scoring, lengths, BN, D, HEAD_DIM, PRECISION)
        largest = tl.max(tl.reshape(score, [BM, parts, BLOCK]), 2)
        top = _larger(top, largest)
        _store_maxima(of_tile, largest, block, index, BM)
    # a maximum passes over scores that are not numbers: where a row saw nothing else, its top becomes NaN
    top = tl.where(top == float("-inf"), float("nan"), top)
    tl.store(maxima.tops + slot * BM + index, tl.where(sees, top, float("-inf")))
