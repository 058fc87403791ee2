r"""Which tiles and keys of a decoding row can hold support: those above a lower bound on tau.

tau of the tiles' maxima, taken in at most 512 classes, is a lower bound on tau (`lists/bounds.py`). Tiles whose maximum
exceeds it are listed, and of their keys those above the bound, the candidates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.device import newton_step, support_powers
from ..lists.device import scatter

__all__ = ["Alibi", "active_tiles", "capped_excess", "list_candidates", "raised_tau"]

_LARGEST_EXCESS = tl.constexpr(32.0)  # to the power of 20, the largest exponent: 2^100


class Alibi(NamedTuple):
    """ALiBi of a row: the slope times alpha - 1, the row's key, and the distance of the nearest visible tile."""

    slope: Any
    position: Any
    nearest: Any


@triton.jit
def capped_excess(score, tau, exponent: tl.constexpr):
    """r = [score - tau]_+, cut where r^exponent and sums of it would overflow (alpha below 1.5).

    At the root r is at most 1. A bound on tau is lowered by what float32 may have rounded, which is more than that
    where scores are in the millions. A cut r makes Newton's step smaller, so tau stays at or below the root.
    """
    excess = tl.maximum(score - tau, 0.0)
    if exponent > 2.0:
        excess = tl.minimum(excess, _LARGEST_EXCESS)
    return excess


@triton.jit
def raised_tau(tau, p, s, exponent: tl.constexpr):
    """A Newton step from the summands p and s of a tau that is at most the root; both sums are one reduction."""
    sum_p, sum_s = tl.split(tl.sum(tl.join(p, s), 0))
    _, step = newton_step(sum_p, sum_s, exponent)
    return tau + tl.where(sum_p > 0, tl.maximum(step, 0.0), 0.0)


@triton.jit
def _tile_maxima(record, workspace, first, last, alibi, scoring, NB: tl.constexpr, BN: tl.constexpr):
    """The maxima of tiles [first, first + NB) with ALiBi measured from alibi.nearest; -inf from `last` on."""
    tile = first + tl.arange(0, NB)
    largest = tl.load(record + workspace.maxima + tile, mask=tile < last, other=float("-inf"))
    if scoring.slopes is not None:
        largest -= alibi.slope * (tl.abs(alibi.position - tile * BN) - alibi.nearest).to(tl.float32)
    return largest


@triton.jit
def _bound(largest, top, scoring, STEPS: tl.constexpr, NB: tl.constexpr):
    """tau of the maxima (NB,) from below, lowered by more than float32 can have rounded."""
    if NB > 512:
        largest = tl.max(tl.reshape(largest, [NB // 512, 512]), 0)
    tau = top - 1.0
    for _ in range(STEPS):
        p, s = support_powers(capped_excess(largest, tau, scoring.exponent), scoring.exponent)
        tau = raised_tau(tau, p, s, scoring.exponent)
    return tau - (1.0 + tl.abs(tau)) * 2.0**-18


@triton.jit
def _list_active(record, workspace, begin, end, alibi, bound, scoring, NB: tl.constexpr, BN: tl.constexpr):
    """Lists the tiles of [begin, end) whose maximum exceeds the bound; returns how many there are."""
    places = record.to(tl.pointer_type(tl.int32)) + workspace.active
    active = 0
    for first in range(begin, end, NB):
        largest = _tile_maxima(record, workspace, first, end, alibi, scoring, NB, BN)
        ones = (largest > bound).to(tl.int32)
        slot = active + tl.cumsum(ones, 0) - ones
        scatter(places + slot, first + tl.arange(0, NB), ones != 0)
        active += tl.sum(ones, 0)
    tl.debug_barrier()
    return active


@triton.jit
def active_tiles(
    record, workspace, begin, end, slope, position, scoring, kv_len,
    BOUND_STEPS: tl.constexpr, NB: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Lists the tiles of [begin, end) that can hold support, NB at a time.

    Returns:
        The distance of the nearest tile with a visible key (0 without ALiBi), the largest score (not finite if there is
        none, or one that is not a number), the lower bound on tau, and the number of tiles listed.
    """
    nearest = begin * 0
    if scoring.slopes is not None:
        nearest = nearest + kv_len
        for first in range(begin, end, NB):
            tile = first + tl.arange(0, NB)
            largest = tl.load(record + workspace.maxima + tile, mask=tile < end, other=float("-inf"))
            distance = tl.abs(position - tile * BN)
            nearest = tl.minimum(nearest, tl.min(tl.where(largest > float("-inf"), distance, kv_len), 0))
    alibi = Alibi(slope, position, nearest)
    largest = _tile_maxima(record, workspace, begin, end, alibi, scoring, NB, BN)
    for first in range(begin + NB, end, NB):
        others = _tile_maxima(record, workspace, first, end, alibi, scoring, NB, BN)
        largest = tl.maximum(largest, others)
    top = tl.max(largest, 0)
    usable = (top > float("-inf")) & (top < float("inf"))
    bound = _bound(largest, tl.where(usable, top, 0.0), scoring, BOUND_STEPS, NB)
    bound = tl.where(usable, bound, float("inf"))
    active = _list_active(record, workspace, begin, end, alibi, bound, scoring, NB, BN)
    return nearest, top, bound, active


@triton.jit
def list_candidates(
    record, workspace, begin, end, keys_at, scores_at, alibi, bound, scoring, CB: tl.constexpr, BN: tl.constexpr
):
    """Lists keys above the bound, of active tiles [begin, end), and their scores; returns how many there are.

    scores_at may be the place of the first of these tiles' own scores: the list never overtakes what is still to read.
    """
    words = record.to(tl.pointer_type(tl.int32))
    total = 0
    within = tl.arange(0, BN)
    for first in range(begin, end, CB):
        place = first + tl.arange(0, CB)
        inside = place < end
        tile = tl.load(words + workspace.active + place, mask=inside, other=0)
        keys = tile[:, None] * BN + within[None, :]
        score = tl.load(record + keys, mask=inside[:, None], other=float("-inf"))
        if scoring.slopes is not None:
            score -= (alibi.slope * (tl.abs(alibi.position - tile * BN) - alibi.nearest).to(tl.float32))[:, None]
        ones = (score > bound).to(tl.int32)
        slot = total + tl.reshape(tl.cumsum(tl.reshape(ones, [CB * BN]), 0), [CB, BN]) - ones
        total += tl.sum(tl.reshape(ones, [CB * BN]), 0)
        tl.debug_barrier()
        scatter(words + keys_at + slot, keys, ones != 0)
        scatter(words + scores_at + slot, score.to(tl.int32, bitcast=True), ones != 0)
    tl.debug_barrier()
    return total
