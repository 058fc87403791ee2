r"""The forward pass over dense tiles: one program solves one tile of query rows, exactly.

With u_j = (alpha-1) z_j, tau is the root of ||[u - tau]_+||_q = 1, q = 1/(alpha-1). The norm is convex and falling in
tau, so a Newton step from either side lands at or below the root. A program

1. guesses tau from a sample of the keys, by the share of the mass that the sample should hold (not on short rows);
2. takes a pass for the maximum of each residue class of keys, if some row's sample holds too little of its support. The
   class maxima's own tau is a lower bound, as any subset's is, and a tight one where supports are small. Otherwise, if
   there are many keys, it corrects the guess on a part of their tiles;
3. passes over the keys until tau is near, one step a pass. For alpha = 1.5 the step is the root of
   sum r^2 - 2 d sum r + d^2 #support = 1, whose error is cubic; for other alpha it is Newton's;
4. passes once more for sum p v and sum s v, and takes the last, tiny step in closed form:
   o(tau + d) = sum p v - d/(alpha-1) sum s v + O(d^2), with s = p^(2-alpha). Where no backward pass follows, the output
   is sum p v / sum p instead.

The backward pass needs the mean value sum s v / sum s: dz = s (dp - do . mean_value).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.device import (
    entmax_norm,
    load_rows,
    query_tile,
    store_rows,
    tile_scores,
    tile_sees,
)
from .passes import LANES, KeySpan, closer_step, maximum_pass, output_pass, sampled_tau, subset_tau, sum_pass

__all__ = ["ForwardSizes", "dense_forward_kernel", "key_norm_kernel"]

_MAX_PASSES = tl.constexpr(24)
_MAX_OUTPUTS = tl.constexpr(4)
# A row with fewer keys of its sample in the support gets its bound from class maxima.
_ENOUGH = tl.constexpr(4)
# A row with fewer takes that bound even where it is below the guess: the guess's error is then the larger.
_FEW = tl.constexpr(16)
# A guess is corrected on this many tiles of keys, or on one tile in this many if that is more.
_PART = tl.constexpr(16)
# For alpha below 1.5, a step smaller than this share of tau is float32's rounding.
_ROUNDING = tl.constexpr(2.0**-22)


class ForwardSizes(NamedTuple):
    """Compile-time sizes of `dense_forward_kernel`.

    Attributes:
        BM: query rows a program; BN: keys a step.
        KB: keys a block of the block map; ROWS: query rows a flag of `active`.
        SAMPLE: sampled keys, or 0 to go without a guess; CLASSES: residue classes of keys.
    """

    BM: Any
    BN: Any
    KB: Any
    ROWS: Any
    SAMPLE: Any
    CLASSES: Any


@triton.jit
def key_norm_kernel(key, norms, kv_heads, kv_len, D: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """norms_b = max over the keys j of block b of ||k_j||. Grid: batch * kv_heads * ceil(kv_len / BLOCK).

    Args:
        key: Rows, read.
        norms: (batch * kv_heads, blocks) float32, written.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(kv_len, BLOCK)
    group = pid // blocks
    block = pid % blocks
    tile = load_rows(key, group // kv_heads, group % kv_heads, block * BLOCK, BLOCK, kv_len, True, D, HEAD_DIM)
    tile = tile.to(tl.float32)
    tl.store(norms + pid.to(tl.int64), tl.sqrt(tl.max(tl.sum(tile * tile, 1), 0)))


@triton.jit
def _guess(
    q, key, tile, low, high, masks, scoring, lengths,
    BM: tl.constexpr, SAMPLE: tl.constexpr, dims, PRECISION: tl.constexpr,
):  # fmt: skip
    """Step 1: `sampled_tau` of every stride-th key of [low, high), or with ALiBi of the keys next to the tile."""
    stride = tl.cdiv(high - low, SAMPLE)
    last_key = high - 1
    if scoring.slopes is not None:
        stride = tl.where(tile.slope > 0, 1, stride)
        last_key = tl.where(tile.slope > 0, tl.minimum(last_key, tile.base + BM - 1), last_key)
    sampled = last_key - stride * tl.arange(0, SAMPLE)
    inside = (sampled >= low) & (sampled < high)
    dim = tl.arange(0, dims.D)
    key_pointer = key.pointer + tile.batch.to(tl.int64) * key.batch + tile.kv_head.to(tl.int64) * key.head
    k = tl.load(
        key_pointer + sampled.to(tl.int64)[:, None] * key.row + dim[None, :],
        mask=inside[:, None] & (dim[None, :] < dims.HEAD_DIM),
        other=0.0,
    )
    sample = tile_scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), scoring, tile, sampled)
    seen = inside[None, :] & tile_sees(masks, tile, tl.maximum(sampled, 0), lengths)
    sample = tl.where(seen, sample, float("-inf"))
    return sampled_tau(sample, seen, tile.stop - tile.start, tile.slope > 0, scoring.exponent)


@triton.jit
def _within_reach(q, largest_key, floor, tile, sees, low, high, scoring, lengths):
    """(low, high) without the keys that ALiBi puts too far away to have a weight.

    (alpha-1) (scale |q| max|k| - slope distance) <= max - 1 <= tau holds for them.
    """
    if tile.slope > 0:
        q32 = q.to(tl.float32)
        bound = tl.sqrt(tl.sum(q32 * q32, 1)) * tl.load(largest_key + tile.batch * lengths.kv_heads + tile.kv_head)
        bound = tl.abs(bound * scoring.scale)
        if scoring.softcap is not None:
            bound = tl.minimum(bound, scoring.softcap) * scoring.after_cap
        reach = tl.where(sees, (bound * 1.0001 - floor) / tile.slope + 1.0, 0.0)
        reach = tl.minimum(reach, 1e9).to(tl.int32)
        position = tile.rows + (lengths.kv_len - lengths.q_len)
        low = tl.maximum(low, tl.min(tl.where(sees, position - reach, lengths.kv_len), 0))
        high = tl.minimum(high, tl.max(tl.where(sees, position + reach + 1, 0), 0))
        low = tl.minimum(low, high)
    return low, high


@triton.jit
def _key_span(low, high, all_low, all_high, masks, batch, BN: tl.constexpr, KB: tl.constexpr):
    """The KeySpan of [low, high), where all rows see [all_low, all_high); the full keys are whole key blocks."""
    low = low // KB * KB
    high = tl.cdiv(high, BN) * BN
    full_low = tl.cdiv(tl.maximum(all_low, low), KB) * KB
    full_high = tl.minimum(all_high, high) // KB * KB
    if masks.has_holes is not None:
        full_high = tl.where(tl.load(masks.has_holes + batch) != 0, full_low, full_high)
    if masks.dense is not None:
        full_high = full_low
    some_full = full_high > full_low
    full_low = tl.where(some_full, full_low, low)
    full_high = tl.where(some_full, full_high, low)
    full_keys = full_high - full_low
    return KeySpan(low, high, full_low, full_high, full_low - low, full_keys, high - full_high)


@triton.jit
def _class_maxima(
    q, key, tile, span, masks, scoring, lengths, BM: tl.constexpr, CLASSES: tl.constexpr, dims, PRECISION: tl.constexpr
):  # fmt: skip
    """(rows, CLASSES) the largest score of each row in each residue class of keys."""
    maxima = tl.full([BM, CLASSES], float("-inf"), tl.float32)
    maxima = maximum_pass(maxima, q, key, tile, span, masks, scoring, lengths, True, CLASSES, dims, PRECISION)
    return maximum_pass(maxima, q, key, tile, span, masks, scoring, lengths, False, CLASSES, dims, PRECISION)


@triton.jit
def _class_bound(
    tau, count, q, key, tile, span, masks, scoring, lengths,
    BM: tl.constexpr, CLASSES: tl.constexpr, dims, PRECISION: tl.constexpr,
):  # fmt: skip
    """(tau, floor) of step 2, by the maxima of residue classes of keys."""
    maxima = _class_maxima(q, key, tile, span, masks, scoring, lengths, BM, CLASSES, dims, PRECISION)
    top = tl.max(maxima, 1)
    some = top > float("-inf")
    top = tl.where(some, top, 0.0)
    start = tau
    if scoring.exponent > 2.0:  # a guess far below the maximum would start from powers that overflow
        start = tl.maximum(tau, top - 1.0)
    bound = tl.where(count > 0, start, top - 1.0)
    bound = subset_tau(maxima, tl.full([BM], 1.0, tl.float32), bound, 3, scoring.exponent)
    tau = tl.where(count < _FEW, bound, tl.maximum(tau, bound))
    floor = tl.where(some, top - 1.0, float("-inf"))
    return tau, floor


@triton.jit
def _corrected_guess(
    tau, q, key, tile, span, masks, scoring, lengths,
    BM: tl.constexpr, BN: tl.constexpr, dims, PRECISION: tl.constexpr,
):  # fmt: skip
    """tau of step 2, a step from the guess on one full tile in `apart`, which should hold their share of the mass."""
    apart = tl.minimum(span.full_keys // (_PART * BN), _PART)
    if (apart > 1) & (tile.slope <= 0.0):
        tiles = span.full_keys // BN // apart
        share = (tiles * BN).to(tl.float32) / tl.maximum(tile.stop - tile.start, 1).to(tl.float32)
        zeros = tl.zeros([BM, LANES], tl.float32)
        part_p, part_s, part_count = sum_pass(
            zeros, zeros, zeros, tau, apart, q, key, tile, span, masks, scoring, lengths, False, BN, dims, PRECISION
        )
        norm, step = closer_step(
            tl.sum(part_p, 1) / share, tl.sum(part_s, 1) / share, tl.sum(part_count, 1) / share, scoring.exponent
        )
        tau += tl.where(norm > 0.0, step, 0.0)
    return tau


@triton.jit
def _residual(norm, step, tau, sees, exponent: tl.constexpr):
    """How far the norm is from 1, or 0 where the step is no more than float32's rounding of tau."""
    ROUNDING: tl.constexpr = _ROUNDING if exponent > 2.0 else 1e-6
    return tl.where(sees & (tl.abs(step) > ROUNDING * tl.abs(tau)), tl.abs(norm - 1.0), 0.0)


@triton.jit
def _solved(
    tau, floor, sees, near_enough, q, key, tile, span, masks, scoring, lengths,
    BM: tl.constexpr, BN: tl.constexpr, CLASSES: tl.constexpr, dims, PRECISION: tl.constexpr,
):  # fmt: skip
    """(tau, size of the support) of step 3."""
    support = tl.zeros([BM], tl.float32)
    going = span.high > span.low
    for _ in range(_MAX_PASSES):
        if going:
            part_p = tl.zeros([BM, LANES], tl.float32)
            part_s = tl.zeros([BM, LANES], tl.float32)
            part_count = tl.zeros([BM, LANES], tl.float32)
            part_p, part_s, part_count = sum_pass(
                part_p, part_s, part_count, tau, 1, q, key, tile, span, masks, scoring, lengths,
                True, BN, dims, PRECISION,
            )  # fmt: skip
            part_p, part_s, part_count = sum_pass(
                part_p, part_s, part_count, tau, 1, q, key, tile, span, masks, scoring, lengths,
                False, BN, dims, PRECISION,
            )  # fmt: skip
            support = tl.sum(part_count, 1)
            norm, step = closer_step(tl.sum(part_p, 1), tl.sum(part_s, 1), support, scoring.exponent)
            residual = _residual(norm, step, tau, sees, scoring.exponent)
            lost = sees & (norm == 0.0)
            if scoring.exponent > 2.0:
                lost = sees & ((norm == 0.0) | (norm == float("inf")))
                if tl.max(lost.to(tl.int32), 0) > 0:
                    maxima = _class_maxima(q, key, tile, span, masks, scoring, lengths, BM, CLASSES, dims, PRECISION)
                    floor = tl.where(sees, tl.maximum(floor, tl.max(maxima, 1) - 1.0), floor)
            residual = tl.where(lost, 1.0, residual)
            tau = tl.where(sees, tl.maximum(tl.where(lost, floor, tau + step), floor), tau)
            going = tl.max(residual, 0) > near_enough
    return tau, support


@triton.jit
def dense_forward_kernel(
    query, key, value, output, mean_value, tau_out, block_map, largest_key, active,
    masks, scoring, lengths, near_enough, accepted, sizes, dims, PRECISION: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """o_i = sum_j p_ij v_j and tau_i of BM query rows of one head; see the module for the steps.

    Grid: batch * heads * ceil(q_len / BM). A program reads its queries and the keys and values that they see, four to
    six times in all, and writes its rows of output, mean_value and tau and its row of the block map.

    Args:
        query, key, value, output: Rows; mean_value: Rows, or None without a backward pass.
        tau_out: (batch * heads, q_len) float32; +inf for rows without a visible key.
        block_map: (batch * heads, row tiles, key blocks) uint8, zeroed before; see blocks.KEY_BLOCK. None if
            mean_value is None.
        largest_key: (batch * kv_heads,) float32, the largest norm of a key; read only with ALiBi.
        active: (batch * heads, blocks of ROWS rows) uint8, 0 where another kernel has done the rows; or None.
        near_enough: how far the norm may be from 1 before the last step of 3.
        accepted: how far it may be from 1 before the step in closed form.
        sizes: ForwardSizes; dims: Dims.
    """
    BM: tl.constexpr = sizes.BM
    BN: tl.constexpr = sizes.BN
    KB: tl.constexpr = sizes.KB
    DV: tl.constexpr = dims.DV
    q_len = lengths.q_len
    kv_len = lengths.kv_len
    row_blocks = tl.cdiv(q_len, BM)
    pid = tl.program_id(0)
    group = pid // row_blocks
    row_block = row_blocks - 1 - pid % row_blocks  # the longest rows first
    if active is not None:  # noqa: SIM102 (one is decided at compile time)
        if tl.load(active + group.to(tl.int64) * tl.cdiv(q_len, sizes.ROWS) + row_block * BM // sizes.ROWS) == 0:
            return
    first_row = row_block * BM
    tile = query_tile(group, first_row, masks, scoring, lengths, BM)
    batch, head, start, stop = tile.batch, tile.head, tile.start, tile.stop
    live = None
    if block_map is not None:
        live = block_map + (group.to(tl.int64) * row_blocks + row_block) * tl.cdiv(kv_len, KB)

    sees = start < stop
    high = tl.max(tl.where(sees, stop, 0), 0)
    low = tl.minimum(tl.min(tl.where(sees, start, kv_len), 0), high)
    all_low = tl.max(tl.where(sees, start, 0), 0)
    all_high = tl.min(tl.where(sees, stop, kv_len), 0)
    q = load_rows(query, batch, head, first_row, BM, q_len, True, dims.D, dims.HEAD_DIM)

    tau = tl.full([BM], float("-inf"), tl.float32)
    floor = tau
    count = tl.zeros([BM], tl.int32)
    if sizes.SAMPLE > 0:
        tau, floor, count = _guess(
            q, key, tile, low, high, masks, scoring, lengths, BM, sizes.SAMPLE, dims, PRECISION
        )  # fmt: skip
    if scoring.slopes is not None:
        low, high = _within_reach(q, largest_key, floor, tile, sees, low, high, scoring, lengths)
    span = _key_span(low, high, all_low, all_high, masks, batch, BN, KB)
    if tl.min(tl.where(sees, count, _ENOUGH), 0) < _ENOUGH:
        tau, floor = _class_bound(
            tau, count, q, key, tile, span, masks, scoring, lengths, BM, sizes.CLASSES, dims, PRECISION
        )  # fmt: skip
    elif sizes.SAMPLE > 0:
        tau = _corrected_guess(tau, q, key, tile, span, masks, scoring, lengths, BM, BN, dims, PRECISION)
    sees = sees & (floor > float("-inf"))
    tau = tl.where(sees, tl.maximum(tau, floor), float("inf"))
    tau, support = _solved(
        tau, floor, sees, near_enough, q, key, tile, span, masks, scoring, lengths, BM, BN, sizes.CLASSES,
        dims, PRECISION,
    )  # fmt: skip

    # 4. output at tau, repeated in the rare case that the last step is not yet tiny
    acc_p = tl.zeros([BM, DV], tl.float32)
    acc_s = tl.zeros([BM, DV], tl.float32)
    sum_p = tl.zeros([BM], tl.float32)
    sum_s = tl.zeros([BM], tl.float32)
    step = tl.zeros([BM], tl.float32)
    going = span.high > span.low
    for _ in range(_MAX_OUTPUTS):
        if going:
            acc_p = tl.zeros([BM, DV], tl.float32)
            acc_s = tl.zeros([BM, DV], tl.float32)
            part_p = tl.zeros([BM, LANES], tl.float32)
            part_s = tl.zeros([BM, LANES], tl.float32)
            acc_p, acc_s, part_p, part_s = output_pass(
                acc_p, acc_s, part_p, part_s, tau, live, q, key, value, tile, span, masks, scoring, lengths,
                True, BN, KB, dims, PRECISION, P_SCALE,
            )  # fmt: skip
            acc_p, acc_s, part_p, part_s = output_pass(
                acc_p, acc_s, part_p, part_s, tau, live, q, key, value, tile, span, masks, scoring, lengths,
                False, BN, KB, dims, PRECISION, P_SCALE,
            )  # fmt: skip
            sum_p = tl.sum(part_p, 1)
            sum_s = tl.sum(part_s, 1)
            norm, step = closer_step(sum_p, sum_s, support, scoring.exponent)
            residual = _residual(norm, step, tau, sees, scoring.exponent)
            step = tl.where(sees, step, 0.0)
            tau += step
            going = tl.max(residual, 0) > accepted

    if mean_value is not None:
        if scoring.exponent > 2.0:
            # Where float32 has no tau near enough to the root, the step says nothing: the weights' mean alone is kept
            near = tl.abs(entmax_norm(sum_p, scoring.exponent) - 1.0) <= accepted
            last = tl.where(near, step * scoring.exponent, 0.0)
            total = sum_p - last * sum_s
            output_rows = (acc_p - last[:, None] * acc_s) / tl.where(total > 0, total * P_SCALE, 1.0)[:, None]
        else:
            output_rows = (acc_p - (step * scoring.exponent)[:, None] * acc_s) * (1.0 / P_SCALE)
        mean = acc_s / tl.where(sum_s > 0, sum_s * P_SCALE, 1.0)[:, None]
        store_rows(mean_value, batch, head, first_row, mean, q_len, DV, dims.VALUE_DIM)
    else:
        output_rows = acc_p / tl.where(sum_p > 0, sum_p * P_SCALE, 1.0)[:, None]
    store_rows(output, batch, head, first_row, output_rows, q_len, DV, dims.VALUE_DIM)
    tl.store(tau_out + group.to(tl.int64) * q_len + tile.rows, tau, mask=tile.rows < q_len)
