r"""Exact alpha-entmax attention over dense tiles, forward: one program solves one block of query rows.

With u_j = (alpha-1) z_j, tau is the root of ||[u - tau]_+||_p = 1, p = 1/(alpha-1). The norm is convex and falling in
tau, so a Newton step from either side lands at or below the root. A program

1. guesses tau from a sample of the keys, by the share of the mass that the sample should hold (not on short rows);
2. where a row's sample holds too little of its support for that: one pass for the maximum of each residue class of
   keys, whose own tau is a rigorous lower bound (as any subset's), and a tight one where supports are small;
   else, if there are many keys, corrects the guess on a part of their tiles;
3. passes over the keys until tau is near: a step a pass, for alpha = 1.5 by the root of
   sum r^2 - 2 d sum r + d^2 #support = 1, whose error is cubic, for other alpha Newton's;
4. passes once more for sum p v and sum s v, and takes the last, tiny step in closed form:
   o(tau + d) = sum p v - d/(alpha-1) sum s v + O(d^2), with s = p^(2-alpha). Where no backward pass follows, the output
   is sum p v / sum p instead.

The mean value sum s v / sum s is what the backward pass needs: dz = s (dp - do . mean_value).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.device import (
    entmax_norm,
    excess_over,
    load_rows,
    newton_step,
    products_to_scores,
    store_rows,
    support_powers,
    visible_interval,
    visible_pairs,
)

__all__ = ["ACTIVE_ROWS", "KEY_BLOCK", "dense_forward_kernel", "key_norm_kernel"]

# Keys a block of the block map, which says what the backward pass has to visit: 0 nothing (no key of the block has a
# weight in these rows), 1 a block seen by all of its rows, 2 a partly masked one.
KEY_BLOCK = 128
# Query rows that another regime leaves to this one together.
ACTIVE_ROWS = 128
_FULL = tl.constexpr(1)
_MASKED = tl.constexpr(2)
_MAX_PASSES = tl.constexpr(24)
_MAX_OUTPUTS = tl.constexpr(4)
# A row with fewer keys of its sample in the support gets its bound from class maxima.
_ENOUGH = tl.constexpr(4)
# Columns of a product that the threads of a row hold side by side; the next so many are theirs again.
_LANES = tl.constexpr(8)
# A row with fewer takes that bound even where it is below the guess: the guess's error is then the larger.
_FEW = tl.constexpr(16)
# A guess is corrected on so many tiles of keys, or on every so many-th tile if that is more.
_PART = tl.constexpr(16)


@triton.jit
def key_norm_kernel(key, norms, kv_heads, kv_len, D: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """norms[batch * kv_heads, block] = the largest Euclidean norm among the block's keys."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(kv_len, BLOCK)
    group = pid // blocks
    block = pid % blocks
    tile = load_rows(key, group // kv_heads, group % kv_heads, block * BLOCK, BLOCK, kv_len, True, D, HEAD_DIM)
    tile = tile.to(tl.float32)
    tl.store(norms + pid.to(tl.int64), tl.sqrt(tl.max(tl.sum(tile * tile, 1), 0)))


@triton.jit
def _tile_scores(
    q, key, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop, first, q_len, kv_len,
    MASKED: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(rows, BN) scores of the keys from `first` on; -inf where masked."""
    k = load_rows(key, batch, kv_head, first, BN, kv_len, MASKED, D, HEAD_DIM)
    keys = first + tl.arange(0, BN)
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    score = products_to_scores(product, scoring, slope, row_position[:, None], (keys - base).to(tl.float32)[None, :])
    if MASKED:
        seen = visible_pairs(masks, batch, head, rows, keys, start, stop, q_len, kv_len)
        score = tl.where(seen, score, float("-inf"))
    return score


@triton.jit
def _tile_start(step, head_steps, low, full_high, SIZE: tl.constexpr):
    """First key of a masked tile: tiles from `low` on first, then those from `full_high` on."""
    return tl.where(step < head_steps, low + step * SIZE, full_high + (step - head_steps) * SIZE)


@triton.jit
def _maximum_pass(
    maxima, first, steps, head_steps, low, full_high, q, key, masks, scoring, slope, batch, head, kv_head,
    rows, row_position, base, start, stop, q_len, kv_len,
    MASKED: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """maxima (rows, SIZE): the maximum of each residue class of keys modulo SIZE."""
    for step in range(0, steps):
        first_key = first + step * SIZE
        if MASKED:
            first_key = _tile_start(step, head_steps, low, full_high, SIZE)
        score = _tile_scores(
            q, key, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop,
            first_key, q_len, kv_len, MASKED, SIZE, D, HEAD_DIM, PRECISION,
        )  # fmt: skip
        maxima = tl.maximum(maxima, score)
    return maxima


@triton.jit
def _lane_sums(tile):
    """(rows, _LANES) sums over the columns of one residue modulo _LANES: no thread needs another's."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.sum(tl.reshape(tile, [rows, columns // _LANES, _LANES]), 1)


@triton.jit
def _sum_pass(
    sum_p, sum_s, count, tau, first, stride, steps, head_steps, low, full_high,
    q, key, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop, q_len, kv_len,
    MASKED: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds p, s and (alpha = 1.5) the support's indicator at tau, (rows, _LANES) each, of tiles `stride` keys apart."""
    for step in range(0, steps):
        first_key = first + step * stride
        if MASKED:
            first_key = _tile_start(step, head_steps, low, full_high, BN)
        score = _tile_scores(
            q, key, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop,
            first_key, q_len, kv_len, MASKED, BN, D, HEAD_DIM, PRECISION,
        )  # fmt: skip
        p, s = support_powers(excess_over(score, tau[:, None]), scoring.exponent)
        sum_p += _lane_sums(p)
        sum_s += _lane_sums(s)
        if scoring.exponent == 2.0:
            count += _lane_sums(tl.where(s > 0, 1.0, 0.0))
    return sum_p, sum_s, count


@triton.jit
def _output_pass(
    acc_p, acc_s, sum_p, sum_s, tau, live, first, steps, head_steps, low, full_high,
    q, key, value, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop, q_len, kv_len,
    MASKED: tl.constexpr, BN: tl.constexpr, KB: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    DV: tl.constexpr, VALUE_DIM: tl.constexpr, PRECISION: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """Adds sum p v, sum s v (times P_SCALE), sum p and sum s at tau, and marks the blocks that hold support.

    sum_p and sum_s are (rows, _LANES). Without `live`, sum s v is not computed and nothing is marked.
    """
    mark: tl.constexpr = _MASKED if MASKED else _FULL
    for step in range(0, steps):
        first_key = first + step * BN
        if MASKED:
            first_key = _tile_start(step, head_steps, low, full_high, BN)
        score = _tile_scores(
            q, key, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop,
            first_key, q_len, kv_len, MASKED, BN, D, HEAD_DIM, PRECISION,
        )  # fmt: skip
        p, s = support_powers(excess_over(score, tau[:, None]), scoring.exponent)
        part_s = _lane_sums(s)
        sum_p += _lane_sums(p)
        sum_s += part_s
        v = load_rows(value, batch, kv_head, first_key, BN, kv_len, MASKED, DV, VALUE_DIM)
        acc_p = tl.dot((p * P_SCALE).to(v.dtype), v, acc_p, input_precision=PRECISION)
        if live is not None:
            block = live + first_key // KB
            tl.store(block + tl.zeros_like(part_s).to(tl.int32), tl.full(part_s.shape, mark, tl.uint8), mask=part_s > 0)
            acc_s = tl.dot((s * P_SCALE).to(v.dtype), v, acc_s, input_precision=PRECISION)
    return acc_p, acc_s, sum_p, sum_s


@triton.jit
def _closer_step(total, slope_sum, count, exponent: tl.constexpr):
    """(norm, step): for alpha = 1.5 the quadratic's root where it exists and the norm is near 1, else Newton's step."""
    norm, step = newton_step(total, slope_sum, exponent)
    if exponent == 2.0:
        surplus = total - 1.0
        inside = slope_sum * slope_sum - count * surplus
        root = slope_sum + tl.sqrt(tl.maximum(inside, 0.0))
        good = (inside > 0) & (norm < 4.0) & (root > 0)
        step = tl.where(good, surplus / tl.where(good, root, 1.0), step)
    return norm, step


@triton.jit
def _subset_tau(score, share, tau, STEPS: tl.constexpr, exponent: tl.constexpr):
    """The tau at which these scores hold the mass `share`, from below (after the first step), by Newton's method."""
    for _ in tl.static_range(STEPS):
        p, s = support_powers(excess_over(score, tau[:, None]), exponent)
        _, step = newton_step(tl.sum(p, 1) / share, tl.sum(s, 1) / share, exponent)
        tau += step
    return tau


@triton.jit
def _sampled_tau(score, seen, length, near, exponent: tl.constexpr):
    """(tau, floor, count): a guess, the rigorous bound max - 1, and the sample's keys above the guess.

    near: the sample is the keys next to the row (ALiBi), which should hold all of the mass and not their share.
    tau and floor are -inf for rows without a key in the sample.
    """
    top = tl.max(score, 1)
    some = top > float("-inf")
    top = tl.where(some, top, 0.0)
    share = tl.sum(seen.to(tl.float32), 1) / tl.maximum(length, 1).to(tl.float32)
    share = tl.maximum(tl.where(near, 1.0, tl.minimum(share, 1.0)), 1e-6)
    tau = _subset_tau(score, share, top - entmax_norm(share, exponent), 3, exponent)
    count = tl.sum(tl.where(score > tau[:, None], 1, 0), 1)
    floor = tl.where(some, top - 1.0, float("-inf"))
    return tl.where(some, tau, float("-inf")), floor, tl.where(some, count, 0)


@triton.jit
def dense_forward_kernel(
    query, key, value, output, mean_value, tau_out, block_map, largest_key, active,
    masks, scoring, heads, kv_heads, q_len, kv_len, near_enough, accepted,
    BM: tl.constexpr, BN: tl.constexpr, KB: tl.constexpr, ACTIVE_ROWS: tl.constexpr,
    SAMPLE: tl.constexpr, CLASSES: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, DV: tl.constexpr, VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """One block of BM query rows of one head.

    Args:
        query, key, value, output: Rows; mean_value: Rows, or None without a backward pass.
        tau_out: (batch * heads, q_len) float32; +inf for rows without a visible key.
        block_map: (batch * heads, row blocks, key blocks) uint8, zeroed before; see KEY_BLOCK. None if mean_value is.
        largest_key: (batch * kv_heads,) float32, the largest norm of a key; read only with ALiBi.
        active: (batch * heads, blocks of ACTIVE_ROWS rows) uint8, 0 where another kernel has done the rows; or None.
        near_enough: how far the norm may be from 1 before the last step of 3.
        accepted: how far it may be from 1 before the step in closed form.
        SAMPLE: sampled keys, or 0 to go without a guess.
    """
    row_blocks = tl.cdiv(q_len, BM)
    pid = tl.program_id(0)
    group = pid // row_blocks
    row_block = row_blocks - 1 - pid % row_blocks  # the longest rows first
    if active is not None:  # noqa: SIM102 (one is decided at compile time)
        if tl.load(active + group.to(tl.int64) * tl.cdiv(q_len, ACTIVE_ROWS) + row_block * BM // ACTIVE_ROWS) == 0:
            return
    batch = group // heads
    head = group % heads
    kv_head = head // (heads // kv_heads)
    first_row = row_block * BM
    rows = first_row + tl.arange(0, BM)
    base = first_row + kv_len - q_len
    row_position = tl.arange(0, BM).to(tl.float32)
    live = None
    if block_map is not None:
        live = block_map + (group.to(tl.int64) * row_blocks + row_block) * tl.cdiv(kv_len, KB)

    start, stop = visible_interval(masks, batch, rows, q_len, kv_len)
    sees = start < stop
    high = tl.max(tl.where(sees, stop, 0), 0)
    low = tl.minimum(tl.min(tl.where(sees, start, kv_len), 0), high)
    all_low = tl.max(tl.where(sees, start, 0), 0)
    all_high = tl.min(tl.where(sees, stop, kv_len), 0)

    q = load_rows(query, batch, head, first_row, BM, q_len, True, D, HEAD_DIM)
    slope = 0.0
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + head) * scoring.slope_factor

    # 1. a sample: every stride-th key, or with ALiBi the keys next to the block's own
    tau = tl.full([BM], float("-inf"), tl.float32)
    floor = tau
    count = tl.zeros([BM], tl.int32)
    if SAMPLE > 0:
        stride = tl.cdiv(high - low, SAMPLE)
        last_key = high - 1
        if scoring.slopes is not None:
            stride = tl.where(slope > 0, 1, stride)
            last_key = tl.where(slope > 0, tl.minimum(last_key, base + BM - 1), last_key)
        sampled = last_key - stride * tl.arange(0, SAMPLE)
        inside = (sampled >= low) & (sampled < high)
        dim = tl.arange(0, D)
        key_pointer = key.pointer + batch.to(tl.int64) * key.batch + kv_head.to(tl.int64) * key.head
        k = tl.load(
            key_pointer + sampled.to(tl.int64)[:, None] * key.row + dim[None, :],
            mask=inside[:, None] & (dim[None, :] < HEAD_DIM),
            other=0.0,
        )
        sample = products_to_scores(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), scoring, slope, row_position[:, None],
            (sampled - base).to(tl.float32)[None, :],
        )  # fmt: skip
        seen = inside[None, :] & visible_pairs(
            masks, batch, head, rows, tl.maximum(sampled, 0), start, stop, q_len, kv_len
        )  # fmt: skip
        sample = tl.where(seen, sample, float("-inf"))
        tau, floor, count = _sampled_tau(sample, seen, stop - start, slope > 0, scoring.exponent)

    # ALiBi: (alpha-1)(scale |q| max|k| - slope distance) <= max - 1 <= tau, so the key's weight is zero
    if scoring.slopes is not None:  # noqa: SIM102
        if slope > 0:
            q32 = q.to(tl.float32)
            bound = tl.sqrt(tl.sum(q32 * q32, 1)) * tl.load(largest_key + batch * kv_heads + kv_head)
            bound = tl.abs(bound * scoring.scale)
            if scoring.softcap is not None:
                bound = tl.minimum(bound, scoring.softcap) * scoring.after_cap
            reach = tl.where(sees, (bound * 1.0001 - floor) / slope + 1.0, 0.0)
            reach = tl.minimum(reach, 1e9).to(tl.int32)
            position = rows + (kv_len - q_len)
            low = tl.maximum(low, tl.min(tl.where(sees, position - reach, kv_len), 0))
            high = tl.minimum(high, tl.max(tl.where(sees, position + reach + 1, 0), 0))
            low = tl.minimum(low, high)

    # tiles [low, high), of which [full_low, full_high), whole key blocks, are seen by all rows
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
    head_keys = full_low - low
    tail_keys = high - full_high

    if tl.min(tl.where(sees, count, _ENOUGH), 0) < _ENOUGH:
        # 2. class maxima
        maxima = tl.full([BM, CLASSES], float("-inf"), tl.float32)
        maxima = _maximum_pass(
            maxima, 0, head_keys // CLASSES + tl.cdiv(tail_keys, CLASSES), head_keys // CLASSES, low, full_high,
            q, key, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop, q_len, kv_len,
            True, CLASSES, D, HEAD_DIM, PRECISION,
        )  # fmt: skip
        maxima = _maximum_pass(
            maxima, full_low, full_keys // CLASSES, 0, low, full_high,
            q, key, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop, q_len, kv_len,
            False, CLASSES, D, HEAD_DIM, PRECISION,
        )  # fmt: skip
        top = tl.max(maxima, 1)
        some = top > float("-inf")
        top = tl.where(some, top, 0.0)
        bound = tl.where(count > 0, tau, top - 1.0)
        bound = _subset_tau(maxima, tl.full([BM], 1.0, tl.float32), bound, 3, scoring.exponent)
        tau = tl.where(count < _FEW, bound, tl.maximum(tau, bound))
        floor = tl.where(some, top - 1.0, float("-inf"))
    elif SAMPLE > 0:
        # the guess's own correction: a step on every apart-th tile, which should hold their share of the mass
        apart = tl.minimum(full_keys // (_PART * BN), _PART)
        if (apart > 1) & (slope <= 0.0):
            tiles = full_keys // BN // apart
            share = (tiles * BN).to(tl.float32) / tl.maximum(stop - start, 1).to(tl.float32)
            part_p, part_s, part_count = _sum_pass(
                tl.zeros([BM, _LANES], tl.float32), tl.zeros([BM, _LANES], tl.float32),
                tl.zeros([BM, _LANES], tl.float32), tau, full_low, apart * BN, tiles, 0, low, full_high, q, key,
                masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop, q_len, kv_len,
                False, BN, D, HEAD_DIM, PRECISION,
            )  # fmt: skip
            norm, step = _closer_step(
                tl.sum(part_p, 1) / share, tl.sum(part_s, 1) / share, tl.sum(part_count, 1) / share, scoring.exponent
            )
            tau += tl.where(norm > 0.0, step, 0.0)
    sees = sees & (floor > float("-inf"))
    tau = tl.where(sees, tl.maximum(tau, floor), float("inf"))

    # 3. passes for tau
    support = tl.zeros([BM], tl.float32)
    going = high > low
    for _ in range(_MAX_PASSES):
        if going:
            part_p = tl.zeros([BM, _LANES], tl.float32)
            part_s = tl.zeros([BM, _LANES], tl.float32)
            part_count = tl.zeros([BM, _LANES], tl.float32)
            part_p, part_s, part_count = _sum_pass(
                part_p, part_s, part_count, tau, 0, BN, (head_keys + tail_keys) // BN, head_keys // BN, low, full_high,
                q, key, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop, q_len,
                kv_len, True, BN, D, HEAD_DIM, PRECISION,
            )  # fmt: skip
            part_p, part_s, part_count = _sum_pass(
                part_p, part_s, part_count, tau, full_low, BN, full_keys // BN, 0, low, full_high, q, key,
                masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop, q_len, kv_len,
                False, BN, D, HEAD_DIM, PRECISION,
            )  # fmt: skip
            support = tl.sum(part_count, 1)
            norm, step = _closer_step(tl.sum(part_p, 1), tl.sum(part_s, 1), support, scoring.exponent)
            residual = tl.where(sees & (tl.abs(step) > 1e-6 * tl.abs(tau)), tl.abs(norm - 1.0), 0.0)
            residual = tl.where(sees & (norm == 0.0), 1.0, residual)
            tau = tl.where(sees, tl.maximum(tl.where(norm > 0, tau + step, floor), floor), tau)
            going = tl.max(residual, 0) > near_enough

    # 4. output at tau, repeated in the rare case that the last step is not yet tiny
    acc_p = tl.zeros([BM, DV], tl.float32)
    acc_s = tl.zeros([BM, DV], tl.float32)
    sum_p = tl.zeros([BM], tl.float32)
    sum_s = tl.zeros([BM], tl.float32)
    step = tl.zeros([BM], tl.float32)
    going = high > low
    for _ in range(_MAX_OUTPUTS):
        if going:
            acc_p = tl.zeros([BM, DV], tl.float32)
            acc_s = tl.zeros([BM, DV], tl.float32)
            part_p = tl.zeros([BM, _LANES], tl.float32)
            part_s = tl.zeros([BM, _LANES], tl.float32)
            acc_p, acc_s, part_p, part_s = _output_pass(
                acc_p, acc_s, part_p, part_s, tau, live, 0, (head_keys + tail_keys) // BN, head_keys // BN, low,
                full_high, q, key, value, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start,
                stop, q_len, kv_len, True, BN, KB, D, HEAD_DIM, DV, VALUE_DIM, PRECISION, P_SCALE,
            )  # fmt: skip
            acc_p, acc_s, part_p, part_s = _output_pass(
                acc_p, acc_s, part_p, part_s, tau, live, full_low, full_keys // BN, 0, low, full_high,
                q, key, value, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop,
                q_len, kv_len, False, BN, KB, D, HEAD_DIM, DV, VALUE_DIM, PRECISION, P_SCALE,
            )  # fmt: skip
            sum_p = tl.sum(part_p, 1)
            sum_s = tl.sum(part_s, 1)
            norm, step = _closer_step(sum_p, sum_s, support, scoring.exponent)
            residual = tl.where(sees & (tl.abs(step) > 1e-6 * tl.abs(tau)), tl.abs(norm - 1.0), 0.0)
            step = tl.where(sees, step, 0.0)
            tau += step
            going = tl.max(residual, 0) > accepted

    if mean_value is not None:
        output_rows = (acc_p - (step * scoring.exponent)[:, None] * acc_s) * (1.0 / P_SCALE)
        mean = acc_s / tl.where(sum_s > 0, sum_s * P_SCALE, 1.0)[:, None]
        store_rows(mean_value, batch, head, first_row, mean, q_len, DV, VALUE_DIM)
    else:
        output_rows = acc_p / tl.where(sum_p > 0, sum_p * P_SCALE, 1.0)[:, None]
    store_rows(output, batch, head, first_row, output_rows, q_len, DV, VALUE_DIM)
    tl.store(tau_out + group.to(tl.int64) * q_len + rows, tau, mask=rows < q_len)
