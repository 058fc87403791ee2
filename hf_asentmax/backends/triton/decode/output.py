r"""Decoding, second and third kernel: tau from the scores, and the output from the values of the support alone.

1. `candidates.py` lists the keys above a lower bound on tau. On trained models and on random keys these are the support
   and a few keys more.
2. Newton's method on ||[u - t]_+||_p = 1, p = 1/(alpha-1), over the candidates rises to tau and never passes it.
3. Values are gathered where the weight is above zero. Where these are many, several programs share them. All of them
   list and solve (the same arithmetic, so the same tau), each sums its part, and the last to finish adds the parts.

In a long cache a row may have thousands of candidates. Then each program lists a share of the tiles and leaves the rest
to the third kernel, whose programs solve on all the shares and sum the values of their own. For other rows its launch
is a wasted microsecond, so short caches are done without it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common.device import support_powers
from .candidates import Alibi, active_tiles, capped_excess, list_candidates, raised_tau
from .scores import SPAN

__all__ = ["decode_flat_kernel", "decode_output_kernel"]

_ENOUGH = tl.constexpr(2.0**-22)  # a smaller step of Newton's method is float32's rounding


class _Row(NamedTuple):
    """A query row: pointer to its record, numbers of its batch entry, head, key head, and its number in the head."""

    record: Any
    batch: Any
    head: Any
    kv_head: Any
    number: Any


class _Candidates(NamedTuple):
    """A list in a row's record: places of its keys and of its scores, and how many there are."""

    keys_at: Any
    scores_at: Any
    count: Any


@triton.jit
def _scores(record, first, count, SIZE: tl.constexpr):
    """SIZE scores from the place `first` in the record on, -inf after the first `count`."""
    slot = tl.arange(0, SIZE)
    return tl.load(record + first + slot, mask=slot < count, other=float("-inf"))


@triton.jit
def _add_powers(sum_p, sum_s, record, scores_at, count, tau, scoring, MANY: tl.constexpr):
    """sum_p and sum_s (MANY,) with the summands of a list's `count` scores at tau."""
    for first in range(0, count, MANY):
        score = _scores(record, scores_at + first, count - first, MANY)
        p, s = support_powers(capped_excess(score, tau, scoring.exponent), scoring.exponent)
        sum_p += p
        sum_s += s
    return sum_p, sum_s


@triton.jit
def _solve(record, scores_at, count, tau, scoring, FEW: tl.constexpr, MANY: tl.constexpr, STEPS: tl.constexpr):
    """tau of a list's `count` scores, from a bound below it: mostly 1 to 3 steps."""
    moved = 1.0
    if count <= FEW:
        score = _scores(record, scores_at, count, FEW)
        for _ in range(0, STEPS):
            if moved > _ENOUGH:
                p, s = support_powers(capped_excess(score, tau, scoring.exponent), scoring.exponent)
                raised = raised_tau(tau, p, s, scoring.exponent)
                moved = (raised - tau) / (1.0 + tl.abs(tau))
                tau = raised
    else:
        for _ in range(0, STEPS):
            if moved > _ENOUGH:
                sum_p = tl.zeros([MANY], tl.float32)
                sum_s = tl.zeros([MANY], tl.float32)
                sum_p, sum_s = _add_powers(sum_p, sum_s, record, scores_at, count, tau, scoring, MANY)
                raised = raised_tau(tau, sum_p, sum_s, scoring.exponent)
                moved = (raised - tau) / (1.0 + tl.abs(tau))
                tau = raised
    return tau


@triton.jit
def _share(active, part, PARTS: tl.constexpr):
    """The first of the active tiles that a part lists, where the parts share them."""
    return ((active.to(tl.int64) * part) // PARTS).to(tl.int32)


@triton.jit
def _solve_shares(
    record, workspace, active, tau, scoring,
    PARTS: tl.constexpr, BN: tl.constexpr, MANY: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """tau of the lists of all parts, as `_solve` finds that of one."""
    words = record.to(tl.pointer_type(tl.int32))
    moved = 1.0
    for _ in range(0, STEPS):
        if moved > _ENOUGH:
            sum_p = tl.zeros([MANY], tl.float32)
            sum_s = tl.zeros([MANY], tl.float32)
            for part in range(0, PARTS):
                count = tl.load(words + workspace.state + 3 + part)
                first_tile = tl.load(words + workspace.active + _share(active, part, PARTS))
                sum_p, sum_s = _add_powers(sum_p, sum_s, record, first_tile * BN, count, tau, scoring, MANY)
            raised = raised_tau(tau, sum_p, sum_s, scoring.exponent)
            moved = (raised - tau) / (1.0 + tl.abs(tau))
            tau = raised
    return tau


@triton.jit
def _write_output(
    value, output, row, workspace, candidates, scoring, first, step, tau, part, shares, strange,
    CV: tl.constexpr, DV: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Sums weight x value over a part of a list; the last of the `shares` parts to arrive adds all in order.

    Args:
        value, output: Rows; row: _Row; candidates: _Candidates.
        first, step: the part takes chunks first, first + step, ... of CV candidates.
        strange: a score of the row is NaN or infinite, and so the output is NaN.
    """
    record = row.record
    words = record.to(tl.pointer_type(tl.int32))
    dim = tl.arange(0, DV)
    values = value.pointer + row.batch.to(tl.int64) * value.batch + row.kv_head.to(tl.int64) * value.head
    weighted = tl.zeros([CV, DV], tl.float32)
    weights = tl.zeros([CV], tl.float32)
    for chunk in range(first * CV, candidates.count, step * CV):
        slot = chunk + tl.arange(0, CV)
        keys = tl.load(words + candidates.keys_at + slot, mask=slot < candidates.count, other=0)
        score = _scores(record, candidates.scores_at + chunk, candidates.count - chunk, CV)
        p, _ = support_powers(capped_excess(score, tau, scoring.exponent), scoring.exponent)
        pointers = values + keys.to(tl.int64)[:, None] * value.row + dim[None, :]
        v = tl.load(pointers, mask=(p > 0)[:, None] & (dim < VALUE_DIM)[None, :], other=0.0)
        weighted += p[:, None] * v.to(tl.float32)
        weights += p
    result = tl.sum(weighted, 0)
    total = tl.sum(weights, 0)
    arrived = shares - 1
    if shares > 1:
        partial = record + workspace.partial + part * (DV + 32)
        tl.store(partial + dim, result)
        tl.store(partial + DV, total)
        tl.debug_barrier()
        arrived = tl.atomic_add(words + workspace.state, 1, sem="acq_rel")
        if arrived == shares - 1:
            result = tl.zeros([DV], tl.float32)
            total = 0.0
            for other in range(0, shares):
                partial = record + workspace.partial + other * (DV + 32)
                result += tl.load(partial + dim, cache_modifier=".cg")
                total += tl.load(partial + DV, cache_modifier=".cg")
    if arrived == shares - 1:
        result = result / tl.where(total > 0, total, 1.0)
        result = tl.where(strange, float("nan"), result)
        pointer = output.pointer + row.batch.to(tl.int64) * output.batch + row.head.to(tl.int64) * output.head
        pointer += row.number.to(tl.int64) * output.row
        tl.store(pointer + dim, result.to(output.pointer.dtype.element_ty), mask=dim < VALUE_DIM)


@triton.jit
def _row_of(number, workspace, queries):
    """The _Row of a query row's number, counted over batch, heads and q_len."""
    group = number // queries.q_len
    batch = group // queries.heads
    head = group % queries.heads
    kv_head = head // (queries.heads // queries.kv_heads)
    record = workspace.pointer + number.to(tl.int64) * workspace.row
    return _Row(record, batch, head, kv_head, number % queries.q_len)


@triton.jit(do_not_specialize=["kv_len"])
def decode_output_kernel(
    value, output, workspace, scoring, queries, kv_len,
    PARTS: tl.constexpr, NB: tl.constexpr, BN: tl.constexpr, CB: tl.constexpr, SHARED_FROM: tl.constexpr,
    FEW: tl.constexpr, MANY: tl.constexpr, CV: tl.constexpr, BOUND_STEPS: tl.constexpr, STEPS: tl.constexpr,
    DV: tl.constexpr, VALUE_DIM: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """The output of a query row, sum_j p_j v_j / sum_j p_j with p_j = [u_j - tau]_+^(1/(alpha-1)).

    Grid: PARTS programs for each query row. A program reads the tile maxima of its row's record, the scores of the
    tiles above the bound, and the values of its part of the support. It writes lists and partial sums to the record;
    the last program of a row to arrive writes the output. A row left to the third kernel gets its lists only.

    Args:
        value, output: Rows; queries: Queries.
        workspace: Workspace, as decode_scores_kernel left it.
        NB: tiles read together (FEW, where ALiBi's reach leaves no more). CB: active tiles whose keys are.
        SHARED_FROM: a row with at least as many active tiles is left to decode_flat_kernel; None: there is none.
        FEW: candidates that are solved in registers, else MANY at a time. BOUND_STEPS and STEPS: most steps of
            Newton's method on the tile maxima and on the candidates.
        CV: values gathered together.
        OVERLAPS: started before the kernel ahead of it has ended.
    """
    tl.static_assert(3 + PARTS <= SPAN)  # the parts' counts lie before the span
    part = tl.program_id(0) % PARTS
    row = _row_of(tl.program_id(0) // PARTS, workspace, queries)
    position = row.number + (kv_len - queries.q_len)
    record = row.record
    words = record.to(tl.pointer_type(tl.int32))
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    begin = tl.load(words + workspace.state + SPAN)
    end = tl.load(words + workspace.state + SPAN + 1)
    slope = 0.0
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + row.head) * scoring.slope_factor
    nearest = begin * 0
    top = slope + float("inf")
    bound = top
    active = begin * 0
    few = False
    if NB > FEW and scoring.slopes is not None:
        few = end - begin <= FEW  # a head with ALiBi in a long cache; fewer tiles take less time
        if few:
            nearest, top, bound, active = active_tiles(
                record, workspace, begin, end, slope, position, scoring, kv_len, BOUND_STEPS, FEW, BN
            )
    if not few:
        nearest, top, bound, active = active_tiles(
            record, workspace, begin, end, slope, position, scoring, kv_len, BOUND_STEPS, NB, BN
        )
    alibi = Alibi(slope, position, nearest)
    usable = (top > float("-inf")) & (top < float("inf"))
    strange = top == float("inf")  # a score that is not a number, or infinite

    shared = False
    if SHARED_FROM is not None:
        shared = active >= SHARED_FROM
        if part == 0:
            tl.store(words + workspace.state + 1, tl.where(shared, active, 0))
            tl.store(record + workspace.state + 2, bound)
    if shared:
        begin = _share(active, part, PARTS)
        end = _share(active, part + 1, PARTS)
        place = tl.load(words + workspace.active + begin) * BN
        count = list_candidates(
            record, workspace, begin, end, workspace.listed_keys + place, place, alibi, bound, scoring, CB, BN
        )
        tl.store(words + workspace.state + 3 + part, count)
    else:
        count = list_candidates(
            record, workspace, 0, active, workspace.listed_keys, workspace.listed_scores, alibi, bound, scoring, CB, BN
        )
        shares = tl.maximum(tl.minimum(count // (2 * CV), PARTS), 1)
        if part < shares:
            tau = tl.where(usable, bound, 0.0)
            tau = _solve(record, workspace.listed_scores, count, tau, scoring, FEW, MANY, STEPS)
            candidates = _Candidates(workspace.listed_keys, workspace.listed_scores, count)
            _write_output(
                value, output, row, workspace, candidates, scoring, part, shares, tau, part, shares, strange,
                CV, DV, VALUE_DIM,
            )  # fmt: skip


@triton.jit
def decode_flat_kernel(
    value, output, workspace, scoring, queries,
    PARTS: tl.constexpr, BN: tl.constexpr, MANY: tl.constexpr, CV: tl.constexpr, STEPS: tl.constexpr,
    DV: tl.constexpr, VALUE_DIM: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """The output of the query rows that decode_output_kernel left, those with many candidates.

    Grid: PARTS programs for each query row. A program reads the lists of all parts of its row to find tau, and the
    values of its own part. It writes its partial sum; the last program of a row to arrive writes the output. Programs
    of other rows end at once.

    The arguments are those of decode_output_kernel.
    """
    part = tl.program_id(0) % PARTS
    row = _row_of(tl.program_id(0) // PARTS, workspace, queries)
    record = row.record
    words = record.to(tl.pointer_type(tl.int32))
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    active = tl.load(words + workspace.state + 1)
    if active > 0:
        bound = tl.load(record + workspace.state + 2)
        tau = _solve_shares(record, workspace, active, bound, scoring, PARTS, BN, MANY, STEPS)
        count = tl.load(words + workspace.state + 3 + part)
        place = tl.load(words + workspace.active + _share(active, part, PARTS)) * BN
        candidates = _Candidates(workspace.listed_keys + place, place, count)
        _write_output(
            value, output, row, workspace, candidates, scoring, 0, 1, tau, part, PARTS, False, CV, DV, VALUE_DIM
        )
