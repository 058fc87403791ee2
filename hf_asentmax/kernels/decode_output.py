r"""Decoding, second kernel: tau from the scores, and the output from the values of the support alone.

1. tau of the tile maxima is a lower bound on tau (sparse_bounds), and only tiles whose maximum exceeds it can hold
   support: they are listed, and of their keys those above the bound, the candidates. On trained models and on random
   keys these are the support and a few more.
2. Newton's method on ||[z - t]_+||_p = 1, p = 1/(alpha-1), over the candidates: it rises to tau and never passes it.
3. Values are gathered where the weight is above zero. Where that is many, several programs share them: all of them
   solve (the same arithmetic, so the same tau), each sums its part, and the last one to finish adds the parts in order.

A row with more candidates than the list has room for works on all keys of the listed tiles instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import entmax_norm, support_powers

__all__ = ["decode_output_kernel"]

_ENOUGH = tl.constexpr(2.0**-22)  # a smaller step of Newton's method is float32's rounding


@triton.jit
def _raised(tau, sum_p, sum_s, exponent: tl.constexpr):
    """Newton's step from sum p and sum s of a tau that is at most the root."""
    total = tl.where(sum_p > 0, sum_p, 1.0)
    norm = entmax_norm(total, exponent)
    step = (norm - 1.0) * total / (norm * tl.where(sum_s > 0, sum_s, 1.0))
    return tau + tl.where(sum_p > 0, tl.maximum(step, 0.0), 0.0)


@triton.jit
def _tile_maxima(
    record, workspace, first, tiles, slope, scoring, position, nearest, NB: tl.constexpr, BN: tl.constexpr
):
    """The maxima of tiles [first, first + NB) with ALiBi measured from the distance `nearest`; -inf beyond the end."""
    tile = first + tl.arange(0, NB)
    largest = tl.load(record + workspace.maxima + tile, mask=tile < tiles, other=float("-inf"))
    if scoring.slopes is not None:
        largest -= slope * (tl.abs(position - tile * BN) - nearest).to(tl.float32)
    return largest


@triton.jit
def _bound(
    record, workspace, tiles, slope, scoring, position, nearest, top,
    STEPS: tl.constexpr, NB: tl.constexpr, BN: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """tau of the tile maxima from below, lowered by more than float32 can have rounded."""
    tau = top - 1.0
    if ONE:
        largest = _tile_maxima(record, workspace, 0, tiles, slope, scoring, position, nearest, NB, BN)
        for _ in tl.static_range(STEPS):
            p, s = support_powers(tl.maximum(largest - tau, 0.0), scoring.exponent)
            tau = _raised(tau, tl.sum(p, 0), tl.sum(s, 0), scoring.exponent)
    else:
        for _ in tl.static_range(STEPS):
            sum_p = tl.zeros([NB], tl.float32)
            sum_s = tl.zeros([NB], tl.float32)
            for first in range(0, tiles, NB):
                largest = _tile_maxima(record, workspace, first, tiles, slope, scoring, position, nearest, NB, BN)
                p, s = support_powers(tl.maximum(largest - tau, 0.0), scoring.exponent)
                sum_p += p
                sum_s += s
            tau = _raised(tau, tl.sum(sum_p, 0), tl.sum(sum_s, 0), scoring.exponent)
    return tau - (1.0 + tl.abs(tau)) * 2.0**-18


@triton.jit
def _list_candidates(
    record, workspace, active, slope, scoring, position, nearest, bound,
    ROOM: tl.constexpr, CB: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Lists the keys above the bound and their scores, as far as there is room; how many there are."""
    total = 0
    within = tl.arange(0, BN)
    for first in range(0, active, CB):
        place = first + tl.arange(0, CB)
        inside = place < active
        tile = tl.load(record + workspace.active + place, mask=inside, other=0.0).to(tl.int32)
        keys = tile[:, None] * BN + within[None, :]
        score = tl.load(record + keys, mask=inside[:, None], other=float("-inf"))
        if scoring.slopes is not None:
            score -= (slope * (tl.abs(position - tile * BN) - nearest).to(tl.float32))[:, None]
        above = inside[:, None] & (score > bound)
        ones = above.to(tl.int32)
        counts = tl.sum(ones, 1)
        slot = total + (tl.cumsum(counts, 0) - counts)[:, None] + tl.cumsum(ones, 1) - ones
        kept = above & (slot < ROOM)
        tl.store(record + workspace.listed_keys + slot, keys.to(tl.float32), mask=kept)
        tl.store(record + workspace.listed_scores + slot, score, mask=kept)
        total += tl.sum(counts, 0)
    return total


@triton.jit
def _candidates(record, workspace, slot, count, listed, slope, scoring, position, nearest, BN: tl.constexpr):
    """(keys, scores) of some of the `count` candidates: of the list, or else of the keys of the active tiles."""
    inside = slot < count
    entry = tl.load(
        record + tl.where(listed, workspace.listed_keys + slot, workspace.active + slot // BN), mask=inside, other=0.0
    ).to(tl.int32)
    keys = tl.where(listed, entry, entry * BN + slot % BN)
    score = tl.load(record + tl.where(listed, workspace.listed_scores + slot, keys), mask=inside, other=float("-inf"))
    if scoring.slopes is not None:
        farther = (tl.abs(position - entry * BN) - nearest).to(tl.float32)
        score = tl.where(listed, score, score - slope * farther)
    return keys, score


@triton.jit
def _solve(
    record, workspace, count, listed, tau, slope, scoring, position, nearest,
    FEW: tl.constexpr, MANY: tl.constexpr, STEPS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """tau of the candidates, from a bound below it: mostly 1 to 5 steps."""
    moved = 1.0
    if count <= FEW:
        slot = tl.arange(0, FEW)
        score = _candidates(record, workspace, slot, count, listed, slope, scoring, position, nearest, BN)[1]
        for _ in range(0, STEPS):
            if moved > _ENOUGH:
                p, s = support_powers(tl.maximum(score - tau, 0.0), scoring.exponent)
                raised = _raised(tau, tl.sum(p, 0), tl.sum(s, 0), scoring.exponent)
                moved = (raised - tau) / (1.0 + tl.abs(tau))
                tau = raised
    else:
        for _ in range(0, STEPS):
            if moved > _ENOUGH:
                sum_p = tl.zeros([MANY], tl.float32)
                sum_s = tl.zeros([MANY], tl.float32)
                for first in range(0, count, MANY):
                    slot = first + tl.arange(0, MANY)
                    score = _candidates(
                        record, workspace, slot, count, listed, slope, scoring, position, nearest, BN
                    )[1]  # fmt: skip
                    p, s = support_powers(tl.maximum(score - tau, 0.0), scoring.exponent)
                    sum_p += p
                    sum_s += s
                raised = _raised(tau, tl.sum(sum_p, 0), tl.sum(sum_s, 0), scoring.exponent)
                moved = (raised - tau) / (1.0 + tl.abs(tau))
                tau = raised
    return tau


@triton.jit(do_not_specialize=["kv_len", "tiles"])
def decode_output_kernel(
    value, output, workspace, scoring, heads, kv_heads, q_len, kv_len, tiles,
    PARTS: tl.constexpr, NB: tl.constexpr, ONE: tl.constexpr, BN: tl.constexpr, CB: tl.constexpr,
    ROOM: tl.constexpr, FEW: tl.constexpr, MANY: tl.constexpr, CV: tl.constexpr,
    BOUND_STEPS: tl.constexpr, STEPS: tl.constexpr, DV: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """One of PARTS programs that share the values of one query row.

    Args:
        value, output: Rows.
        workspace: Workspace, as decode_scores_kernel left it.
        NB: tiles looked at together, all of them if ONE. CB: active tiles whose keys are looked at together.
        ROOM: candidates in the list; up to FEW are solved in registers, else MANY at a time. BOUND_STEPS and STEPS:
            most steps of Newton's method on the tile maxima and on the candidates.
        CV: values gathered together.
    """
    row = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    group = row // q_len
    batch = group // heads
    head = group % heads
    kv_head = head // (heads // kv_heads)
    position = row % q_len + (kv_len - q_len)
    record = workspace.pointer + row.to(tl.int64) * workspace.row
    slope = 0.0
    nearest = 0
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + head) * scoring.slope_factor
        nearest = kv_len
        for first in range(0, tiles, NB):
            tile = first + tl.arange(0, NB)
            largest = tl.load(record + workspace.maxima + tile, mask=tile < tiles, other=float("-inf"))
            distance = tl.abs(position - tile * BN)
            nearest = tl.minimum(nearest, tl.min(tl.where(largest > float("-inf"), distance, kv_len), 0))
    top = float("-inf")
    for first in range(0, tiles, NB):
        largest = _tile_maxima(record, workspace, first, tiles, slope, scoring, position, nearest, NB, BN)
        top = tl.maximum(top, tl.max(largest, 0))
    some = top > float("-inf")
    strange = top == float("inf")  # a score that is no number, or infinite
    usable = some & (top < float("inf"))
    top = tl.where(usable, top, 0.0)
    bound = _bound(
        record, workspace, tiles, slope, scoring, position, nearest, top, BOUND_STEPS, NB, BN, ONE
    )  # fmt: skip
    bound = tl.where(usable, bound, float("inf"))

    active = 0
    for first in range(0, tiles, NB):
        tile = first + tl.arange(0, NB)
        ones = (_tile_maxima(record, workspace, first, tiles, slope, scoring, position, nearest, NB, BN) > bound).to(
            tl.int32
        )
        slot = active + tl.cumsum(ones, 0) - ones
        tl.store(record + workspace.active + slot, tile.to(tl.float32), mask=ones != 0)
        active += tl.sum(ones, 0)
    tl.debug_barrier()
    count = _list_candidates(
        record, workspace, active, slope, scoring, position, nearest, bound, ROOM, CB, BN
    )  # fmt: skip
    listed = count <= ROOM
    count = tl.where(listed, count, active * BN)
    tl.debug_barrier()
    tau = tl.where(usable, bound, 0.0)
    tau = _solve(record, workspace, count, listed, tau, slope, scoring, position, nearest, FEW, MANY, STEPS, BN)

    chunks = tl.cdiv(count, CV)
    shares = tl.maximum(tl.minimum(chunks // 2, PARTS), 1)
    if part < shares:
        dim = tl.arange(0, DV)
        values = value.pointer + batch.to(tl.int64) * value.batch + kv_head.to(tl.int64) * value.head
        weighted = tl.zeros([CV, DV], tl.float32)
        weights = tl.zeros([CV], tl.float32)
        for chunk in range(part, chunks, shares):
            keys, score = _candidates(
                record, workspace, chunk * CV + tl.arange(0, CV), count, listed, slope, scoring, position, nearest, BN
            )
            p, _ = support_powers(tl.maximum(score - tau, 0.0), scoring.exponent)
            pointers = values + keys.to(tl.int64)[:, None] * value.row + dim[None, :]
            v = tl.load(pointers, mask=(p > 0)[:, None] & (dim < VALUE_DIM)[None, :], other=0.0)
            weighted += p[:, None] * v.to(tl.float32)
            weights += p
        result = tl.sum(weighted, 0)
        total = tl.sum(weights, 0)
        finished = shares - 1
        if shares > 1:
            share = record + workspace.partial + part * (DV + 32)
            tl.store(share + dim, result)
            tl.store(share + DV, total)
            tl.debug_barrier()
            finished = tl.atomic_add(record + workspace.finished, 1.0, sem="acq_rel").to(tl.int32)
            if finished == shares - 1:
                result = tl.zeros([DV], tl.float32)
                total = 0.0
                for other in range(0, shares):
                    share = record + workspace.partial + other * (DV + 32)
                    result += tl.load(share + dim, cache_modifier=".cg")
                    total += tl.load(share + DV, cache_modifier=".cg")
        if finished == shares - 1:
            result = result / tl.where(total > 0, total, 1.0)
            result = tl.where(strange, float("nan"), result)
            pointer = output.pointer + batch.to(tl.int64) * output.batch + head.to(tl.int64) * output.head
            pointer += (row % q_len).to(tl.int64) * output.row
            tl.store(pointer + dim, result.to(output.pointer.dtype.element_ty), mask=dim < VALUE_DIM)
