"""Passes over the keys of a tile of query rows: maxima, sums of weights, and the output."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.device import (
    BLOCK_FULL,
    BLOCK_MASKED,
    entmax_norm,
    excess_over,
    load_rows,
    newton_step,
    scaled_weights,
    support_powers,
    tile_scores,
    tile_sees,
)

__all__ = ["LANES", "KeySpan", "closer_step", "maximum_pass", "output_pass", "sampled_tau", "subset_tau", "sum_pass"]

# Columns of a product that the threads of a row hold side by side; the next so many columns are theirs again.
LANES = tl.constexpr(8)


class KeySpan(NamedTuple):
    """The keys [low, high) that a program visits, in three parts whose lengths are head_keys, full_keys and tail_keys.

    Every row sees all of the full keys, [full_low, full_high). The head before them and the tail behind need masks.
    """

    low: Any
    high: Any
    full_low: Any
    full_high: Any
    head_keys: Any
    full_keys: Any
    tail_keys: Any


@triton.jit
def _scores(
    q, key, tile, first, masks, scoring, lengths, MASKED: tl.constexpr, BN: tl.constexpr, dims, PRECISION: tl.constexpr
):  # fmt: skip
    """(rows, BN) scores u of the keys from `first` on; -inf where masked."""
    k = load_rows(key, tile.batch, tile.kv_head, first, BN, lengths.kv_len, MASKED, dims.D, dims.HEAD_DIM)
    keys = first + tl.arange(0, BN)
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    score = tile_scores(product, scoring, tile, keys)
    if MASKED:
        score = tl.where(tile_sees(masks, tile, keys, lengths), score, float("-inf"))
    return score


@triton.jit
def _first_key(step, span, every, MASKED: tl.constexpr, SIZE: tl.constexpr):
    """The first key of a step: a masked pass visits the head's tiles first, then those of the tail."""
    if MASKED:
        head_steps = span.head_keys // SIZE
        return tl.where(step < head_steps, span.low + step * SIZE, span.full_high + (step - head_steps) * SIZE)
    else:
        return span.full_low + step * (every * SIZE)


@triton.jit
def maximum_pass(
    maxima, q, key, tile, span, masks, scoring, lengths,
    MASKED: tl.constexpr, SIZE: tl.constexpr, dims, PRECISION: tl.constexpr,
):  # fmt: skip
    """maxima (rows, SIZE): the maximum of each residue class of keys modulo SIZE, over the masked or the full keys."""
    steps = span.head_keys // SIZE + tl.cdiv(span.tail_keys, SIZE) if MASKED else span.full_keys // SIZE
    for step in range(0, steps):
        first = _first_key(step, span, 1, MASKED, SIZE)
        score = _scores(q, key, tile, first, masks, scoring, lengths, MASKED, SIZE, dims, PRECISION)
        maxima = tl.maximum(maxima, score)
    return maxima


@triton.jit
def _lane_sums(tile):
    """(rows, LANES) sums over the columns of one residue modulo LANES: no thread needs another's."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.sum(tl.reshape(tile, [rows, columns // LANES, LANES]), 1)


@triton.jit
def sum_pass(
    sum_p, sum_s, count, tau, every, q, key, tile, span, masks, scoring, lengths,
    MASKED: tl.constexpr, BN: tl.constexpr, dims, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds p, s and (alpha = 1.5) the support's indicator at tau, (rows, LANES) each, over masked or full keys.

    Of the full keys it visits one tile in `every`.
    """
    steps = (span.head_keys + span.tail_keys) // BN if MASKED else span.full_keys // BN // every
    for step in range(0, steps):
        first = _first_key(step, span, every, MASKED, BN)
        score = _scores(q, key, tile, first, masks, scoring, lengths, MASKED, BN, dims, PRECISION)
        p, s = support_powers(excess_over(score, tau[:, None]), scoring.exponent)
        sum_p += _lane_sums(p)
        sum_s += _lane_sums(s)
        if scoring.exponent == 2.0:
            count += _lane_sums(tl.where(s > 0, 1.0, 0.0))
    return sum_p, sum_s, count


@triton.jit
def output_pass(
    acc_p, acc_s, sum_p, sum_s, tau, live, q, key, value, tile, span, masks, scoring, lengths,
    MASKED: tl.constexpr, BN: tl.constexpr, KB: tl.constexpr, dims, PRECISION: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """Adds sum p v, sum s v (both times P_SCALE), sum p and sum s at tau, and marks the blocks that hold support.

    sum_p and sum_s are (rows, LANES). Without `live`, sum s v is not computed and nothing is marked.
    """
    mark: tl.constexpr = BLOCK_MASKED if MASKED else BLOCK_FULL
    steps = (span.head_keys + span.tail_keys) // BN if MASKED else span.full_keys // BN
    for step in range(0, steps):
        first = _first_key(step, span, 1, MASKED, BN)
        score = _scores(q, key, tile, first, masks, scoring, lengths, MASKED, BN, dims, PRECISION)
        p, s = support_powers(excess_over(score, tau[:, None]), scoring.exponent)
        part_s = _lane_sums(s)
        sum_p += _lane_sums(p)
        sum_s += part_s
        v = load_rows(value, tile.batch, tile.kv_head, first, BN, lengths.kv_len, MASKED, dims.DV, dims.VALUE_DIM)
        acc_p = tl.dot(scaled_weights(p, P_SCALE, v.dtype), v, acc_p, input_precision=PRECISION)
        if live is not None:
            block = live + first // KB
            tl.store(block + tl.zeros_like(part_s).to(tl.int32), tl.full(part_s.shape, mark, tl.uint8), mask=part_s > 0)
            acc_s = tl.dot(scaled_weights(s, P_SCALE, v.dtype), v, acc_s, input_precision=PRECISION)
    return acc_p, acc_s, sum_p, sum_s


@triton.jit
def closer_step(total, slope_sum, count, exponent: tl.constexpr):
    """(norm, step) from sum p, sum s and the size of the support.

    For alpha = 1.5 the step is the root d of sum r^2 - 2 d sum r + d^2 #support = 1, where it exists and the norm is
    near 1. Otherwise it is Newton's.
    """
    norm, step = newton_step(total, slope_sum, exponent)
    if exponent == 2.0:
        surplus = total - 1.0
        inside = slope_sum * slope_sum - count * surplus
        root = slope_sum + tl.sqrt(tl.maximum(inside, 0.0))
        good = (inside > 0) & (norm < 4.0) & (root > 0)
        step = tl.where(good, surplus / tl.where(good, root, 1.0), step)
    return norm, step


@triton.jit
def subset_tau(score, share, tau, STEPS: tl.constexpr, exponent: tl.constexpr):
    """The tau at which these scores hold the mass `share`, by Newton's method; from below after the first step."""
    for _ in tl.static_range(STEPS):
        p, s = support_powers(excess_over(score, tau[:, None]), exponent)
        _, step = newton_step(tl.sum(p, 1) / share, tl.sum(s, 1) / share, exponent)
        tau += step
    return tau


@triton.jit
def sampled_tau(score, seen, length, near, exponent: tl.constexpr):
    """(tau, floor, count): a guess, the rigorous bound max - 1, and how many sampled keys are above the guess.

    Args:
        score, seen: (rows, sample), -inf and false where a row does not see the key.
        length: (rows,), how many keys each row may see.
        near: the sample is the keys next to the row (ALiBi), which should hold all of the mass and not their share.

    Returns:
        tau and floor are -inf for rows that see no key of the sample.
    """
    top = tl.max(score, 1)
    some = top > float("-inf")
    top = tl.where(some, top, 0.0)
    share = tl.sum(seen.to(tl.float32), 1) / tl.maximum(length, 1).to(tl.float32)
    share = tl.maximum(tl.where(near, 1.0, tl.minimum(share, 1.0)), 1e-6)
    tau = subset_tau(score, share, top - entmax_norm(share, exponent), 3, exponent)
    count = tl.sum(tl.where(score > tau[:, None], 1, 0), 1)
    floor = tl.where(some, top - 1.0, float("-inf"))
    return tl.where(some, tau, float("-inf")), floor, tl.where(some, count, 0)
