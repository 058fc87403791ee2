r"""A lower bound on tau from the block maxima, and the key blocks that hold something above it.

tau rises with every score and with every key added, so tau of the block maxima (each lowered by its rounding) is at
most tau of all keys. Newton's method on ||[u - t]_+||_p = 1, p = 1/(alpha-1), finds it: it rises from t = max - 1
towards the root and never passes it, so any number of steps gives a valid bound.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.device import load_rows, newton_step, support_powers
from .candidates import LARGEST_BOUND
from .device import tile_of

__all__ = ["row_bounds_kernel"]

# The passes over the scores and the gather on the lists sum q k in different orders. Each lies within this share of
# |q||k| of the exact product.
_PRODUCT_ROUNDING = tl.constexpr(2.0**-16)
# From this many blocks on, the number of blocks that hold a candidate tells how many candidates there are.
_TELLING_BLOCKS = tl.constexpr(48)


@triton.jit
def _widened(maxima, sign: tl.constexpr):
    """What the maxima can have been before they were rounded to nearest bfloat16: the least (sign -1) or most (1)."""
    largest = maxima.to(tl.float32)
    if maxima.dtype == tl.bfloat16:
        return largest + tl.abs(largest) * (sign * 2.0**-8)
    return largest


@triton.jit
def _list_active(active, maxima, bound, floor, first, last, total, crowd, UNIT: tl.constexpr, BM: tl.constexpr):
    """Lists the blocks of [first, last) with a row's maximum above its bound; maxima below `floor` count as `floor`.

    Returns:
        total: how many blocks are listed so far.
        crowd: (UNIT, BM), whose sum over the first axis counts the blocks above each row's bound.
    """
    index = tl.arange(0, BM)
    for chunk in range(first, last, UNIT):
        block = chunk + tl.arange(0, UNIT)
        inside = (block < last)[:, None]
        largest = tl.load(maxima + block[:, None] * BM + index[None, :], mask=inside, other=float("-inf"))
        above = (inside & (tl.maximum(_widened(largest, 1.0), floor) > bound[None, :])).to(tl.int32)
        crowd += above
        ones = tl.max(above, 1)
        place = total + tl.cumsum(ones, 0) - ones
        tl.store(active + place, block, mask=ones != 0)
        total += tl.sum(ones, 0)
    return total, crowd


@triton.jit
def _most_blocks(seen, ROOM: tl.constexpr, LIST_ROOM: tl.constexpr):
    """How many of `seen` blocks may hold a candidate of a row, float32: with more, its list will hardly fit.

    n keys spread at random leave a block empty with probability exp(-n / seen). A row with more blocks than n =
    5/4 LIST_ROOM such keys would touch has about as many keys; keys that stand together touch fewer blocks.
    """
    seen = tl.maximum(seen, 1).to(tl.float32)
    touched = seen * (1.0 - tl.exp(-1.25 * LIST_ROOM / seen))
    return tl.where(seen >= _TELLING_BLOCKS, tl.minimum(touched, ROOM), ROOM)


@triton.jit(do_not_specialize=["first_tile", "blocks"])
def row_bounds_kernel(
    query, maxima, largest_key, scoring, key_blocks, overflow, lengths, first_tile, blocks,
    STEPS: tl.constexpr, ROOM: tl.constexpr, LIST_ROOM: tl.constexpr, ROW_BLOCK: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The rows' bounds on tau, and the key blocks that `candidates_kernel` has to visit.

    bound = tau(block maxima) - 2 error - (1 + |tau|) 2^-18, where error bounds what products and ALiBi lose to
    rounding, so that no key above tau is missed.

    Grid: one program for each row tile, BM query rows of one head. It reads the tile's `maxima` and its queries, and
    writes the tile's `key_blocks` and, where a row overflows, `overflow`.

    A row overflows in three cases: more than ROOM blocks lie above its bound, which make more words than fit; so many
    that more than LIST_ROOM keys must be expected in them; its scores are not finite, or too large for
    `candidates_kernel` to compare. Its row block is then the dense regime's, and none of the tile's key blocks are
    listed.

    Args:
        query: Rows.
        maxima: Maxima, from `block_maxima_kernel`.
        largest_key: (batch * kv_heads,) float32, the largest Euclidean norm of a key.
        key_blocks: KeyBlocks, written.
        overflow: (batch * heads, ceil(q_len / ROW_BLOCK)) uint8, set to 1 where a row overflows.
        first_tile, blocks: as in `block_maxima_kernel`.
        STEPS: Newton steps; UNIT: block maxima read at a time.
    """
    slot = tl.program_id(0).to(tl.int64)
    batch, head, kv_head, first_row = tile_of(first_tile, lengths, BM)
    index = tl.arange(0, BM)
    unit = tl.arange(0, UNIT)
    spans = maxima.spans + slot * 5
    low = tl.load(spans)
    full_low = tl.load(spans + 1)
    full_high = tl.load(spans + 2)
    high = tl.load(spans + 3)
    least = tl.where(tl.load(spans + 4) != 0, 0.0, float("-inf"))
    if high == 0:  # no row sees a key, or the row block is left to the dense regime
        tl.store(key_blocks.bounds + slot * BM + index, float("inf"))
        tl.store(key_blocks.counts + slot * 2 + tl.arange(0, 2), 0)
        return
    of_tile = maxima.blocks + slot * blocks * BM
    top = tl.load(maxima.tops + slot * BM + index)
    exists = first_row + index < lengths.q_len
    strange = exists & ((top != top) | (top == float("inf")))
    some = (top > float("-inf")) & exists
    top = tl.where(some, top, 0.0)
    tau = top - 1.0
    for _ in tl.static_range(STEPS):
        sum_p = tl.zeros([UNIT, BM], tl.float32)
        sum_s = tl.zeros([UNIT, BM], tl.float32)
        for chunk in range(low, high, UNIT):
            block = chunk + unit
            pointers = of_tile + block[:, None] * BM + index[None, :]
            largest = tl.load(pointers, mask=(block < high)[:, None], other=float("-inf"))
            p, s = support_powers(tl.maximum(_widened(largest, -1.0) - tau[None, :], 0.0), scoring.exponent)
            sum_p += p
            sum_s += s
        _, step = newton_step(tl.sum(sum_p, 0), tl.sum(sum_s, 0), scoring.exponent)
        tau += tl.maximum(step, 0.0)

    q = load_rows(query, batch, head, first_row, BM, lengths.q_len, True, D, HEAD_DIM).to(tl.float32)
    longest = tl.load(largest_key + batch * lengths.kv_heads + kv_head)
    error = tl.sqrt(tl.sum(q * q, 1)) * (longest * scoring.scale * _PRODUCT_ROUNDING)
    if scoring.slopes is not None:
        # slope |i - j| of a candidate is at most |q||k| scale + |tau|; float32 rounds the difference
        error += (tl.abs(tau) + error * 65536.0) * 2.0**-20
    bound = tau - 2.0 * error - (1.0 + tl.abs(tau)) * 2.0**-18
    largest = LARGEST_BOUND * tl.minimum(scoring.scale, 1.0)
    strange = strange | (some & ((bound != bound) | (tl.abs(bound) > largest)))
    bound = tl.where(some, bound, float("inf"))
    tl.store(key_blocks.bounds + slot * BM + index, bound)

    active = key_blocks.active + slot * blocks
    crowd = tl.zeros([UNIT, BM], tl.int32)
    masked = 0
    none = float("-inf")
    masked, crowd = _list_active(active, of_tile, bound, none, low, full_low, masked, crowd, UNIT, BM)
    masked, crowd = _list_active(active, of_tile, bound, none, full_high, high, masked, crowd, UNIT, BM)
    total_listed, crowd = _list_active(active, of_tile, bound, least, full_low, full_high, masked, crowd, UNIT, BM)
    fullest = tl.max(tl.where(strange, ROOM + 1, tl.sum(crowd, 0)), 0)
    if fullest.to(tl.float32) > _most_blocks(high - low, ROOM, LIST_ROOM):
        group = (first_tile + tl.program_id(0)) // tl.cdiv(lengths.q_len, BM)
        row_blocks = tl.cdiv(lengths.q_len, ROW_BLOCK)
        tl.store(overflow + group.to(tl.int64) * row_blocks + first_row // ROW_BLOCK, 1)
        masked = 0
        total_listed = 0
    tl.store(key_blocks.counts + slot * 2, masked)
    tl.store(key_blocks.counts + slot * 2 + 1, total_listed)
