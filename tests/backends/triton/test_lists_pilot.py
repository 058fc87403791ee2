"""The pilot flags row blocks for the dense regime, and only where no list would fit; candidate words and bounds."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from hf_asentmax.backends.triton.common.blocks import ROW_BLOCK
from hf_asentmax.backends.triton.common.problem import Problem, rows_of
from hf_asentmax.backends.triton.common.row_ranges import row_ranges
from hf_asentmax.backends.triton.lists.candidates import LISTERS, append_candidates, half_bound
from hf_asentmax.backends.triton.lists.device import Lists
from hf_asentmax.backends.triton.lists.launch import lists_forward
from hf_asentmax.backends.triton.lists.pilot import SAMPLED_KEYS, SAMPLED_ROWS, pilot_kernel
from hf_asentmax.backends.triton.lists.tiles import list_tiles
from hf_asentmax.masks import Masks


def problem_of(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    alpha: float = 1.5,
    is_causal: bool = True,
    slopes: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> Problem:
    masks = Masks(attention_mask=attention_mask, cu_seqlens=cu_seqlens)
    ranges = row_ranges(query.shape[2], key.shape[2], masks)
    scale = 1 / math.sqrt(query.shape[3])
    return Problem(query, key, key, alpha, scale, is_causal, None, None, slopes, ranges)


def flags(problem: Problem, room: int = 128) -> list[list[int]]:
    """(batch * heads, row blocks) of what the pilot alone says."""
    query, key = problem.query, problem.key
    largest_key = key.float().norm(dim=-1).amax(-1).reshape(-1)
    overflow = torch.zeros(problem.groups, -(-query.shape[2] // ROW_BLOCK), dtype=torch.uint8, device=query.device)
    constants = {name: problem.constants[name] for name in ("D", "HEAD_DIM", "PRECISION")}
    lengths = problem.lengths
    pilot_kernel[(overflow.numel(),)](
        rows_of(query), rows_of(key), largest_key, overflow, problem.masks, problem.scoring,
        lengths, ROOM=room, ROW_BLOCK=ROW_BLOCK, R=SAMPLED_ROWS, SAMPLE=SAMPLED_KEYS, **constants,
        num_warps=4,
    )  # fmt: skip
    return overflow.tolist()


def draw(device: str, *, q_len: int = 256, kv_len: int = 2000, heads: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(kv_len)
    query, key = (torch.randn(1, heads, length, 32, generator=generator) for length in (q_len, kv_len))
    return query.to(device), key.to(device)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.7])
def test_flat_row_blocks_are_flagged(alpha: float, device: str) -> None:
    query, key = draw(device)
    query[:, :, :128] *= 0.01
    assert flags(problem_of(query, key, alpha=alpha)) == [[1, 0]]


@pytest.mark.parametrize("kv_len", [300, 2000, 30000])
@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_random_rows_are_not(kv_len: int, factor: float, device: str) -> None:
    query, key = draw(device, kv_len=kv_len, heads=2)
    assert not any(map(any, flags(problem_of(query * factor, key))))


def test_a_key_outside_of_the_sample_may_decide(device: str) -> None:
    """A sample misses single keys: where the norms allow for a decisive one, rows must not be flagged."""
    query, key = draw(device, kv_len=4000)
    query *= 0.05
    assert flags(problem_of(query, key)) == [[1, 1]]
    key[:, :, 1234] *= 20
    assert flags(problem_of(query, key)) == [[0, 0]]


def test_masks_count(device: str) -> None:
    """Few visible keys fit into any list, ALiBi heads are skipped, and padded keys are not sampled."""
    query, key = draw(device, heads=2)
    query *= 0.05
    slopes = torch.tensor([0.0, 0.1], device=device)
    assert flags(problem_of(query, key)) == [[1, 1], [1, 1]]
    assert flags(problem_of(query, key, slopes=slopes)) == [[1, 1], [0, 0]]
    valid = torch.ones(1, 2000, dtype=torch.bool)
    valid[:, torch.arange(2000) % 40 != 0] = False
    assert flags(problem_of(query, key, attention_mask=valid.to(device))) == [[0, 0], [0, 0]]
    packed = torch.arange(0, 2001, 100, dtype=torch.int32, device=device)
    assert flags(problem_of(draw(device, q_len=2000)[0] * 0.05, key[:, :1], cu_seqlens=packed)) == [[0] * 16]


def lists_of(problem: Problem) -> Lists:
    query, key = problem.query, problem.key
    output, tau = torch.zeros_like(query), torch.zeros(query.shape[:3], device=query.device)
    largest_key = key.norm(dim=-1).amax(-1).reshape(-1)
    tiles = list_tiles(query.dtype, query.shape[3])
    return lists_forward(problem, output, tau, torch.zeros_like(output), largest_key, tiles)


def test_flagged_row_blocks_are_left_alone(device: str) -> None:
    query, key = draw(device)
    query[:, :, :128] *= 0.05
    query[:, :, 128:] *= 4.0
    lists = lists_of(problem_of(query, key))
    assert lists.overflow.tolist() == [[1, 0]]
    assert not lists.counts[0, :128].any() and lists.counts[0, 128:].all()


def test_many_blocks_with_a_candidate_mean_a_long_list(device: str) -> None:
    """Supports of about 130 to 280 of 4,000 keys are too sharp for the pilot; their block maxima flag them."""
    query, key = draw(device, q_len=8, kv_len=4000)
    problem = problem_of(query * 0.3, key)
    assert flags(problem) == [[0]]
    lists = lists_of(problem)
    assert lists.overflow.tolist() == [[1]] and not lists.counts.any()


@triton.jit
def append_kernel(scores, bounds, lists, counts, BM: tl.constexpr, ROOM: tl.constexpr):
    row = tl.arange(0, BM)
    score = tl.load(scores + row[:, None] * 128 + tl.arange(0, 128)[None, :])
    factor, shift = half_bound(tl.load(bounds + row))
    lister = row[:, None] * LISTERS + tl.arange(0, LISTERS)[None, :]
    count = tl.zeros([BM, LISTERS], tl.int32)
    count = append_candidates(lists + lister * ROOM, count, score, factor, shift, 5, BM, 128, ROOM - 1)
    tl.store(counts + lister, count)


def test_words_hold_what_lies_above_the_bound(device: str) -> None:
    """Words hold every score above the bound, and others only within float16's rounding of it, or 1/32 near 0."""
    bounds = [3.0, 33.3, 1.0, -1.0, -70.7, 1e-3, 0.0, -0.0, -1e-4, 1 / 32, -1 / 32, 2048.0, 59999.0, -59999.0, math.inf]
    bound = torch.tensor([*bounds, 0.1], device=device)
    generator = torch.Generator().manual_seed(1)
    spread = torch.randn(16, 128, generator=generator).to(device) * torch.logspace(-5, 1, 128, device=device)
    score = torch.where(bound.isfinite(), bound, 1.0)[:, None] * (1 + 0.01 * spread) + 0.01 * spread
    score[:, :4] = bound[:, None]
    score[:, 4:8] = torch.tensor([math.nan, -math.inf, 1e9, -1e9], device=device)
    room = 16
    lists = torch.zeros(16, 4, room, dtype=torch.int32, device=device)
    counts = torch.zeros(16, 4, dtype=torch.int32, device=device)
    append_kernel[(1,)](score, bound, lists, counts, BM=16, ROOM=room)
    listed = torch.zeros(16, 128, dtype=torch.bool, device=device)
    for row in range(16):
        for lister in range(4):
            for entry in lists[row, lister, : counts[row, lister]].tolist():
                for bit in range(16):
                    key = (entry >> 16) * 64 - 640 + (bit % 8) * 8 + 2 * lister + bit // 8
                    listed[row, key] |= bool(entry >> bit & 1)
    above = score > bound[:, None]
    assert not (above & ~listed).any()
    assert not (listed & ~(score > (bound - bound.abs() * 2**-9).where(bound.abs() > 1 / 32, -0.04)[:, None])).any()


@pytest.mark.parametrize("blocks", ["one", "all"])
def test_negative_scores(blocks: str, device: str) -> None:
    """Where a block or a row has negative scores only, its lists still hold the support and little more."""
    query, key = draw(device, q_len=8, kv_len=400)
    direction = torch.nn.functional.normalize(torch.ones(32, device=device), dim=0)
    query = 4.0 * query + 20 * direction
    key[:, :, 64:128] -= 8 * direction
    if blocks == "all":
        key -= 8 * direction
    problem = problem_of(query, key)
    lists = lists_of(problem)
    score = (query @ key.transpose(-1, -2) * problem.scoring.scale)[0, 0]
    assert (score[:, 64:128] < 0).all() and (blocks == "one" or (score < 0).all())
    hidden = torch.ones(8, 400, dtype=torch.bool, device=device).triu(393)
    score = score.masked_fill(hidden, -math.inf)
    tau = score.amax(1, keepdim=True) - 1
    for _ in range(30):
        excess = (score - tau).clamp_min(0)
        tau = tau + (excess.square().sum(1, keepdim=True) - 1) / (2 * excess.sum(1, keepdim=True))
    support = (score > tau).sum(1)
    assert not lists.overflow.any()
    assert (lists.counts[0] >= support).all() and (lists.counts[0] <= 2 * support + 3).all()
