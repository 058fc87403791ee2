r"""A look at a sample of the keys, before any pass over the scores, that flags row blocks whose lists cannot fit.

The sample gives an estimate of a row's threshold. With u_j = (alpha-1) z_j, p = 1/(alpha-1) and one of f keys sampled,
tau solves f sum_sample [u_j - tau]_+^p = 1, and f #{sample: u_j > tau} estimates the size of the support.

A sample misses the few keys that a sharp row attends to, and these keys would raise tau. |u_j| <= |q| max|k| times the
scale bounds their scores. So the equation adds some keys with this score to the sample, and only rows that would
overflow even then are flagged. These are flat rows with small queries, as an untrained model has them.

The kernel only chooses a regime. Flagged row blocks are left to the dense regime; the result is exact either way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.device import entmax_norm, newton_step, support_powers, visible_interval

__all__ = ["SAMPLED_KEYS", "SAMPLED_ROWS", "pilot_kernel"]

# Rows looked at in a block, and keys for each.
SAMPLED_ROWS = 16
SAMPLED_KEYS = 128
# How many keys outside of the sample a row is assumed to have whose scores are as high as the norms allow.
_HIDDEN_KEYS = tl.constexpr(2)
# Newton steps from below; with too few steps the count is a few keys too high.
_STEPS = tl.constexpr(4)
# A row votes for the dense regime if at least this many sampled keys lie above its threshold; this share of the rows
# decides.
_ENOUGH_KEYS = tl.constexpr(4)
_ENOUGH_ROWS = tl.constexpr(0.125)


@triton.jit
def pilot_kernel(
    query, key, largest_key, overflow, masks, scoring, lengths,
    ROOM: tl.constexpr, ROW_BLOCK: tl.constexpr, R: tl.constexpr, SAMPLE: tl.constexpr, D: tl.constexpr,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Flags a block of query rows where the estimated support f #{sample: u_j > tau} of enough rows exceeds ROOM.

    Grid: one program for each block of ROW_BLOCK query rows of one head. It reads R of these rows and SAMPLE keys, and
    sets the block's `overflow`. Heads with ALiBi are skipped: `block_maxima_kernel` finds their few keys in reach.

    Args:
        query, key: Rows.
        largest_key: (batch * kv_heads,) float32, the largest Euclidean norm of a key.
        overflow: (batch * heads, ceil(q_len / ROW_BLOCK)) uint8, set to 1 where lists of ROOM keys would be too short.
    """
    q_len = lengths.q_len
    kv_len = lengths.kv_len
    row_blocks = tl.cdiv(q_len, ROW_BLOCK)
    group = tl.program_id(0) // row_blocks
    first_row = tl.program_id(0) % row_blocks * ROW_BLOCK
    batch = group // lengths.heads
    head = group % lengths.heads
    kv_head = head // (lengths.heads // lengths.kv_heads)
    if scoring.slopes is not None:  # noqa: SIM102 (one is decided at compile time)
        if tl.load(scoring.slopes + head) != 0.0:
            return
    rows = first_row + tl.arange(0, R) * (ROW_BLOCK // R)
    start, stop = visible_interval(masks, batch, rows, q_len, kv_len)
    length = stop - start
    if tl.max(length, 0) <= ROOM:
        return
    low = tl.min(tl.where(length > 0, start, kv_len), 0)
    high = tl.max(tl.where(length > 0, stop, 0), 0)

    # one key in each of SAMPLE equal ranges, at a place that does not repeat with any period of the keys
    keys_for_one = (high - low).to(tl.float32) / SAMPLE
    number = tl.arange(0, SAMPLE)
    place = ((number * 40503) & 0xFFFF).to(tl.float32) * 2.0**-16 + number.to(tl.float32)
    sampled = low + (place * keys_for_one).to(tl.int32)
    sampled = tl.minimum(sampled, high - 1)
    dim = tl.arange(0, D)
    q_pointer = query.pointer + batch.to(tl.int64) * query.batch + head.to(tl.int64) * query.head
    k_pointer = key.pointer + batch.to(tl.int64) * key.batch + kv_head.to(tl.int64) * key.head
    q_mask = (rows < q_len)[:, None] & (dim[None, :] < HEAD_DIM)
    k_mask = (sampled >= 0)[:, None] & (sampled < kv_len)[:, None] & (dim[None, :] < HEAD_DIM)
    q = tl.load(q_pointer + rows.to(tl.int64)[:, None] * query.row + dim[None, :], mask=q_mask, other=0.0)
    k = tl.load(k_pointer + sampled.to(tl.int64)[:, None] * key.row + dim[None, :], mask=k_mask, other=0.0)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scoring.scale
    seen = (sampled[None, :] >= start[:, None]) & (sampled[None, :] < stop[:, None])
    if masks.key_valid is not None:
        valid = tl.load(masks.key_valid + batch.to(tl.int64) * kv_len + sampled, mask=sampled >= 0, other=0)
        seen = seen & (valid != 0)[None, :]
    score = tl.where(seen, score, float("-inf"))

    top = tl.max(score, 1)
    votes = top > float("-inf")
    top = tl.where(votes, top, 0.0)
    q = q.to(tl.float32)
    highest = tl.sqrt(tl.sum(q * q, 1)) * (tl.load(largest_key + batch * lengths.kv_heads + kv_head) * scoring.scale)
    hidden = tl.full([R], _HIDDEN_KEYS, tl.float32)
    # a lower bound: the larger of the taus of the largest sampled key alone and of the hidden keys alone
    tau = tl.maximum(
        top - 1.0 / entmax_norm(keys_for_one, scoring.exponent),
        highest - 1.0 / entmax_norm(hidden, scoring.exponent),
    )
    for _ in tl.static_range(_STEPS):
        p, s = support_powers(tl.maximum(score - tau[:, None], 0.0), scoring.exponent)
        hidden_p, hidden_s = support_powers(tl.maximum(highest - tau, 0.0), scoring.exponent)
        total = tl.sum(p, 1) * keys_for_one + hidden * hidden_p
        slope = tl.sum(s, 1) * keys_for_one + hidden * hidden_s
        _, step = newton_step(total, slope, scoring.exponent)
        tau += tl.maximum(step, 0.0)
    count = tl.sum(tl.where(score > tau[:, None], 1.0, 0.0), 1)
    votes = votes & (count >= _ENOUGH_KEYS) & (count * keys_for_one > ROOM)
    for_dense = tl.sum(votes.to(tl.float32), 0)
    rows_there = tl.sum((rows < q_len).to(tl.float32), 0)
    if for_dense >= tl.maximum(rows_there * _ENOUGH_ROWS, 1.0):
        tl.store(overflow + tl.program_id(0).to(tl.int64), tl.full([], 1, tl.uint8))
