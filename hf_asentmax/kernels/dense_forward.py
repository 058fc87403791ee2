r"""Exact alpha-entmax attention over dense tiles, forward: one program solves one block of query rows.

With u_j = (alpha-1) z_j, tau is the root of ||[u - tau]_+||_p = 1, p = 1/(alpha-1). The norm is convex and falling in
tau, so a Newton step from either side lands at or below the root, and steps from below never pass it. A program

1. guesses tau from a sample of the keys (the sample's own tau is a rigorous lower bound);
2. passes over the keys, one Newton step a pass, and drops the key blocks that hold nothing above a proven lower bound;
3. passes once more for sum p v and sum s v, and takes the last, tiny step in closed form:
   o(tau + d) = sum p v - d/(alpha-1) sum s v + O(d^2), with s = p^(2-alpha).

The mean value sum s v / sum s is what the backward pass needs: dz = s (dp - do . mean_value).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    entmax_norm,
    load_rows,
    products_to_scores,
    store_rows,
    support_powers,
    visible_interval,
    visible_pairs,
)

__all__ = ["ACTIVE_ROWS", "KEY_BLOCK", "dense_forward_kernel", "key_norm_kernel"]

# Keys a block: the grain at which blocks are dropped. Liveness in the block map: 0 or >= 3 dead, 1 live and seen by all
# of its rows, 2 live and partly masked.
KEY_BLOCK = 128
# Query rows that another regime leaves to this one together.
ACTIVE_ROWS = 128
_FULL = tl.constexpr(1)
_MASKED = tl.constexpr(2)
_FIRST_PASS = tl.constexpr(3)
_CHUNK = tl.constexpr(128)
_MAX_PASSES = tl.constexpr(24)
_MAX_OUTPUTS = tl.constexpr(4)


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
    score = products_to_scores(
        product, scoring, slope, row_position[:, None], (keys - base).to(tl.float32)[None, :]
    )
    if MASKED:
        seen = visible_pairs(
            masks, batch, head, rows[:, None], keys[None, :], start[:, None], stop[:, None], q_len, kv_len
        )
        score = tl.where(seen, score, float("-inf"))
    return score


@triton.jit
def _sum_pass(
    sum_p, sum_s, tau, live, blocks, first, last, mark,
    q, key, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop, q_len, kv_len,
    MASKED: tl.constexpr, BN: tl.constexpr, KB: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds sum p and sum s at tau over listed blocks [first, last), marking in `live` those that hold anything."""
    parts: tl.constexpr = KB // BN
    for step in range(first * parts, last * parts):
        block = tl.load(blocks + step // parts).to(tl.int32)
        score = _tile_scores(
            q, key, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop,
            block * KB + (step % parts) * BN, q_len, kv_len, MASKED, BN, D, HEAD_DIM, PRECISION,
        )  # fmt: skip
        p, s = support_powers(tl.maximum(score - tau[:, None], 0.0), scoring.exponent)
        row_s = tl.sum(s, 1)
        sum_p += tl.sum(p, 1)
        sum_s += row_s
        tl.store(live + block + rows * 0, tl.full(rows.shape, mark, tl.uint8), mask=row_s > 0)
    return sum_p, sum_s


@triton.jit
def _output_pass(
    acc_p, acc_s, sum_p, sum_s, count, tau, live, blocks, first, last,
    q, key, value, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop, q_len, kv_len,
    MASKED: tl.constexpr, BN: tl.constexpr, KB: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    DV: tl.constexpr, VALUE_DIM: tl.constexpr, PRECISION: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """Adds sum p v, sum s v (times P_SCALE), sum p, sum s and the support's size at tau over blocks [first, last)."""
    parts: tl.constexpr = KB // BN
    mark: tl.constexpr = _MASKED if MASKED else _FULL
    for step in range(first * parts, last * parts):
        block = tl.load(blocks + step // parts).to(tl.int32)
        first_key = block * KB + (step % parts) * BN
        score = _tile_scores(
            q, key, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop,
            first_key, q_len, kv_len, MASKED, BN, D, HEAD_DIM, PRECISION,
        )  # fmt: skip
        p, s = support_powers(tl.maximum(score - tau[:, None], 0.0), scoring.exponent)
        row_s = tl.sum(s, 1)
        sum_p += tl.sum(p, 1)
        sum_s += row_s
        if scoring.exponent == 2.0:
            count += tl.sum(tl.where(s > 0, 1.0, 0.0), 1)
        tl.store(live + block + rows * 0, tl.full(rows.shape, mark, tl.uint8), mask=row_s > 0)
        v = load_rows(value, batch, kv_head, first_key, BN, kv_len, MASKED, DV, VALUE_DIM)
        acc_p = tl.dot((p * P_SCALE).to(v.dtype), v, acc_p, input_precision=PRECISION)
        acc_s = tl.dot((s * P_SCALE).to(v.dtype), v, acc_s, input_precision=PRECISION)
    return acc_p, acc_s, sum_p, sum_s, count


@triton.jit
def _newton_step(total, slope_sum, exponent: tl.constexpr):
    """(norm, step): the norm of r at tau, and the Newton step on it. Rows with total 0 do not move."""
    some = total > 0
    norm = entmax_norm(tl.where(some, total, 1.0), exponent)
    step = (norm - 1.0) * total / (norm * tl.where(some, slope_sum, 1.0))
    return tl.where(some, norm, 0.0), step


@triton.jit
def _keep_live(blocks, live, masked, total, mark):
    """Drops from the list the blocks not marked in this pass, keeping the order; (masked, total) of what stays."""
    kept = 0
    kept_masked = 0
    for chunk in range(0, total, _CHUNK):
        index = chunk + tl.arange(0, _CHUNK)
        block = tl.load(blocks + index, mask=index < total, other=0)
        keep = (index < total) & (tl.load(live + block.to(tl.int32), mask=index < total, other=0) == mark)
        ones = keep.to(tl.int32)
        place = kept + tl.cumsum(ones, 0) - 1
        tl.debug_barrier()
        tl.store(blocks + place, block, mask=keep)
        kept += tl.sum(ones, 0)
        kept_masked += tl.sum(tl.where(index < masked, ones, 0), 0)
    tl.debug_barrier()
    return kept_masked, kept


@triton.jit
def _list_blocks(blocks, low, full_low, full_high, high):
    """Lists the key blocks of [low, high), those outside of [full_low, full_high) first; (masked, total)."""
    head = full_low - low
    masked = head + (high - full_high)
    total = high - low
    for chunk in range(0, total, _CHUNK):
        index = chunk + tl.arange(0, _CHUNK)
        block = tl.where(index < masked, full_high + index - head, full_low + index - masked)
        block = tl.where(index < head, low + index, block)
        tl.store(blocks + index, block.to(tl.int16), mask=index < total)
    tl.debug_barrier()
    return masked, total


@triton.jit
def _sampled_tau(score, seen, length, exact, scoring):
    """(tau, floor) from sampled scores: a guess at tau, and the rigorous bound max - 1; -inf for rows without a key.

    The sample should hold its share of the mass. Twice that is asked for, so that the guess mostly lies below tau.
    """
    exponent: tl.constexpr = scoring.exponent
    top = tl.max(score, 1)
    some = top > float("-inf")
    top = tl.where(some, top, 0.0)
    share = tl.sum(seen.to(tl.float32), 1) / tl.maximum(length, 1).to(tl.float32)
    share = tl.where(exact, 1.0, tl.minimum(2.0 * share, 1.0))
    share = tl.maximum(share, 1e-6)
    tau = top - entmax_norm(share, exponent)
    for _ in tl.static_range(4):
        p, s = support_powers(tl.maximum(score - tau[:, None], 0.0), exponent)
        _, step = _newton_step(tl.sum(p, 1) / share, tl.sum(s, 1) / share, exponent)
        tau += step
    return tl.where(some, tau, float("-inf")), tl.where(some, top - 1.0, float("-inf"))


@triton.jit
def dense_forward_kernel(
    query, key, value, output, mean_value, tau_out, block_map, block_lists, largest_key, active,
    masks, scoring, heads, kv_heads, q_len, kv_len, tolerance,
    BM: tl.constexpr, BN: tl.constexpr, KB: tl.constexpr, ACTIVE_ROWS: tl.constexpr, SAMPLE: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    DV: tl.constexpr, VALUE_DIM: tl.constexpr, PRECISION: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """One block of BM query rows of one head.

    Args:
        query, key, value, output, mean_value: Rows.
        tau_out: (batch * heads, q_len) float32; +inf for rows without a visible key.
        block_map: (batch * heads, row blocks, key blocks) uint8, zeroed before; see KEY_BLOCK.
        block_lists: int16 workspace of block_map's shape.
        largest_key: (batch * kv_heads,) float32, the largest norm of a key; read only with ALiBi.
        active: (batch * heads, blocks of ACTIVE_ROWS rows) uint8, 0 where another kernel has done the rows; or None.
        tolerance: how far the norm may be from 1 before the last step.
    """
    row_blocks = tl.cdiv(q_len, BM)
    key_blocks = tl.cdiv(kv_len, KB)
    pid = tl.program_id(0)
    group = pid // row_blocks
    row_block = row_blocks - 1 - pid % row_blocks  # the longest rows first
    if active is not None:
        if tl.load(active + group.to(tl.int64) * tl.cdiv(q_len, ACTIVE_ROWS) + row_block * BM // ACTIVE_ROWS) == 0:
            return
    batch = group // heads
    head = group % heads
    kv_head = head // (heads // kv_heads)
    first_row = row_block * BM
    rows = first_row + tl.arange(0, BM)
    base = first_row + kv_len - q_len
    row_position = tl.arange(0, BM).to(tl.float32)
    program = group.to(tl.int64) * row_blocks + row_block
    live = block_map + program * key_blocks
    blocks = block_lists + program * key_blocks

    start, stop = visible_interval(masks, batch, rows, q_len, kv_len)
    start = tl.maximum(start, 0)
    stop = tl.minimum(stop, kv_len)
    sees = start < stop
    low = tl.min(tl.where(sees, start, kv_len), 0)
    high = tl.max(tl.where(sees, stop, 0), 0)
    low = tl.minimum(low, high)
    all_low = tl.max(tl.where(sees, start, 0), 0)
    all_high = tl.min(tl.where(sees, stop, kv_len), 0)

    q = load_rows(query, batch, head, first_row, BM, q_len, True, D, HEAD_DIM)
    slope = 0.0
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + head) * scoring.slope_factor

    # 1. a sample: every stride-th key, or with ALiBi the keys next to the block's own
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
    score = products_to_scores(
        tl.dot(q, tl.trans(k), input_precision=PRECISION), scoring, slope, row_position[:, None],
        (sampled - base).to(tl.float32)[None, :],
    )  # fmt: skip
    seen = inside[None, :] & visible_pairs(
        masks, batch, head, rows[:, None], sampled[None, :], start[:, None], stop[:, None], q_len, kv_len
    )
    score = tl.where(seen, score, float("-inf"))
    tau, floor = _sampled_tau(score, seen, stop - start, slope > 0, scoring)

    # rows that have keys but none in the sample: their maximum needs a pass of its own
    unknown = sees & (floor == float("-inf"))
    if tl.max(unknown.to(tl.int32), 0) > 0:
        top = floor
        for step in range(0, tl.cdiv(high - low, BN)):
            score = _tile_scores(
                q, key, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop,
                low + step * BN, q_len, kv_len, True, BN, D, HEAD_DIM, PRECISION,
            )  # fmt: skip
            top = tl.maximum(top, tl.max(score, 1))
        tau = tl.where(unknown, top - 1.0, tau)
        floor = tl.where(unknown, top - 1.0, floor)
    sees = sees & (floor > float("-inf"))
    tau = tl.where(sees, tl.maximum(tau, floor), float("inf"))

    # ALiBi: (alpha-1)(scale |q| max|k| - slope distance) <= max - 1 <= tau, so the key's weight is zero
    if scoring.slopes is not None:
        if slope > 0:
            q32 = q.to(tl.float32)
            bound = tl.sqrt(tl.sum(q32 * q32, 1)) * tl.load(largest_key + batch * kv_heads + kv_head) * scoring.scale
            bound = tl.abs(bound)
            if scoring.softcap is not None:
                bound = tl.minimum(bound, scoring.softcap) * scoring.after_cap
            reach = tl.where(sees, (bound * 1.0001 - floor) / slope + 1.0, 0.0)
            reach = tl.minimum(reach, 1e9).to(tl.int32)
            position = rows + (kv_len - q_len)
            low = tl.maximum(low, tl.min(tl.where(sees, position - reach, kv_len), 0))
            high = tl.minimum(high, tl.max(tl.where(sees, position + reach + 1, 0), 0))
            low = tl.minimum(low, high)

    # 2. Newton's method over the listed blocks
    low_block = low // KB
    high_block = tl.cdiv(high, KB)
    full_low = tl.minimum(tl.maximum(tl.cdiv(all_low, KB), low_block), high_block)
    full_high = tl.maximum(tl.minimum(all_high // KB, high_block), full_low)
    if masks.has_holes is not None:
        full_high = tl.where(tl.load(masks.has_holes + batch) != 0, full_low, full_high)
    if masks.dense is not None:
        full_high = full_low
    masked, total = _list_blocks(blocks, low_block, full_low, full_high, high_block)

    going = total > 0
    for attempt in range(_MAX_PASSES):
        if going:
            sum_p = tl.zeros([BM], tl.float32)
            sum_s = tl.zeros([BM], tl.float32)
            mark = _FIRST_PASS + attempt
            sum_p, sum_s = _sum_pass(
                sum_p, sum_s, tau, live, blocks, 0, masked, mark,
                q, key, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop, q_len, kv_len,
                True, BN, KB, D, HEAD_DIM, PRECISION,
            )  # fmt: skip
            sum_p, sum_s = _sum_pass(
                sum_p, sum_s, tau, live, blocks, masked, total, mark,
                q, key, masks, scoring, slope, batch, head, kv_head, rows, row_position, base, start, stop, q_len, kv_len,
                False, BN, KB, D, HEAD_DIM, PRECISION,
            )  # fmt: skip
            norm, step = _newton_step(sum_p, sum_s, scoring.exponent)
            below = (norm >= 1.0) | (tau == float("inf"))
            residual = tl.where(sees & (step > 1e-6 * tl.abs(tau)), (norm - 1.0) * (norm - 1.0), 0.0)
            residual = tl.where(sees & (norm == 0.0), 1.0, residual)
            tau = tl.where(sees, tl.maximum(tl.where(norm > 0, tau + step, floor), floor), tau)
            if tl.min(below.to(tl.int32), 0) == 1:
                tl.debug_barrier()
                masked, total = _keep_live(blocks, live, masked, total, mark)
            going = tl.max(residual, 0) > tolerance

    # 3. output at tau, repeated in the rare case that the last step was still long
    acc_p = tl.zeros([BM, DV], tl.float32)
    acc_s = tl.zeros([BM, DV], tl.float32)
    sum_s = tl.zeros([BM], tl.float32)
    step = tl.zeros([BM], tl.float32)
    going = total > 0
    for _ in range(_MAX_OUTPUTS):
        if going:
            acc_p = tl.zeros([BM, DV], tl.float32)
            acc_s = tl.zeros([BM, DV], tl.float32)
            sum_p = tl.zeros([BM], tl.float32)
            sum_s = tl.zeros([BM], tl.float32)
            count = tl.zeros([BM], tl.float32)
            acc_p, acc_s, sum_p, sum_s, count = _output_pass(
                acc_p, acc_s, sum_p, sum_s, count, tau, live, blocks, 0, masked, q, key, value, masks, scoring, slope,
                batch, head, kv_head, rows, row_position, base, start, stop, q_len, kv_len,
                True, BN, KB, D, HEAD_DIM, DV, VALUE_DIM, PRECISION, P_SCALE,
            )  # fmt: skip
            acc_p, acc_s, sum_p, sum_s, count = _output_pass(
                acc_p, acc_s, sum_p, sum_s, count, tau, live, blocks, masked, total, q, key, value, masks, scoring, slope,
                batch, head, kv_head, rows, row_position, base, start, stop, q_len, kv_len,
                False, BN, KB, D, HEAD_DIM, DV, VALUE_DIM, PRECISION, P_SCALE,
            )  # fmt: skip
            norm, step = _newton_step(sum_p, sum_s, scoring.exponent)
            if scoring.exponent == 2.0:
                # the root of sum p - 2 d sum s + d^2 count = 1, exact while no key leaves the support
                surplus = sum_p - 1.0
                root = sum_s + tl.sqrt(tl.maximum(sum_s * sum_s - count * surplus, 0.0))
                step = surplus / tl.where(root > 0, root, 1.0)
            residual = tl.where(sees & (tl.abs(step) > 1e-6 * tl.abs(tau)), tl.abs(norm - 1.0), 0.0)
            step = tl.where(sees, step, 0.0)
            tau += step
            going = tl.max(residual, 0) > 2.0 * tolerance

    output_rows = acc_p - (step * scoring.exponent)[:, None] * acc_s
    store_rows(output, batch, head, first_row, output_rows * (1.0 / P_SCALE), q_len, DV, VALUE_DIM)
    mean = acc_s / tl.where(sum_s > 0, sum_s * P_SCALE, 1.0)[:, None]
    store_rows(mean_value, batch, head, first_row, mean, q_len, DV, VALUE_DIM)
    tl.store(tau_out + group.to(tl.int64) * q_len + rows, tau, mask=rows < q_len)
