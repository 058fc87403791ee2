"""What every kernel shares: which keys a row sees, how a product becomes a score, and the two powers of alpha-entmax.

Scores are kept multiplied by alpha - 1 throughout, so that a weight is

    p = r^(1/(alpha-1)),   s = p^(2-alpha) = p / r,   r = [(alpha-1) z - tau]_+

where s is the derivative that the backward pass needs (Peters, Niculae & Martins 2019): dz = s (dp - sum(s dp)/sum(s)).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = [
    "Masks",
    "Rows",
    "Scoring",
    "entmax_norm",
    "excess_over",
    "load_rows",
    "newton_step",
    "products_to_scores",
    "score_derivative",
    "store_rows",
    "support_powers",
    "visible_interval",
    "visible_pairs",
]


class Rows(NamedTuple):
    """A (batch, heads, length, head_dim) tensor with unit stride in head_dim: its pointer and its other strides."""

    pointer: Any
    batch: Any
    head: Any
    row: Any


class Masks(NamedTuple):
    """Row ranges (see row_ranges.RowRanges) as kernel arguments; what is None is compiled away."""

    causal: Any  # constexpr bool
    window: Any  # int or None
    start: Any
    stop: Any
    range_batch: Any  # stride of start and stop over the batch, 0 where they have one row of the batch
    key_valid: Any
    has_holes: Any
    dense: Any
    dense_batch: Any
    dense_head: Any
    dense_row: Any
    dense_key: Any


class Scoring(NamedTuple):
    """How scores and weights are made.

    Attributes:
        scale: (alpha - 1) x the caller's scale, or the plain scale where softcap is given.
        softcap: c of c tanh(x / c), or None.
        after_cap: alpha - 1 (used with softcap only).
        slopes: (heads,) float32 ALiBi slopes, or None.
        slope_factor: alpha - 1.
        exponent: constexpr, 1 / (alpha - 1): 2 for alpha = 1.5 and 1 for alpha = 2 have code of their own.
    """

    scale: Any
    softcap: Any
    after_cap: Any
    slopes: Any
    slope_factor: Any
    exponent: Any


@triton.jit
def visible_interval(masks, batch, rows, q_len, kv_len):
    """(start, stop) int32 of the keys that each row may see, start >= 0 and stop <= kv_len.

    start >= stop for rows that see none or do not exist.
    """
    position = rows + (kv_len - q_len)
    start = rows * 0
    stop = start + kv_len
    if masks.causal:
        stop = tl.minimum(position + 1, kv_len)
    if masks.window is not None:
        start = tl.maximum(start, position - masks.window + 1)
        stop = tl.minimum(stop, position + masks.window)
    if masks.start is not None:
        offset = batch * masks.range_batch + rows
        start = tl.maximum(start, tl.load(masks.start + offset, mask=rows < q_len, other=0))
        stop = tl.minimum(stop, tl.load(masks.stop + offset, mask=rows < q_len, other=0))
    return start, tl.where(rows < q_len, stop, 0)


@triton.jit
def visible_pairs(
    masks, batch, head, rows, keys, start, stop, q_len, kv_len, KEYS_FIRST: tl.constexpr = False
):  # fmt: skip
    """bool (rows, keys), or (keys, rows) if KEYS_FIRST: does the row see the key?

    rows, start and stop have one axis, as has keys >= 0; head is one number, or expanded as rows are in the result.
    start and stop are visible_interval's: where nothing but causality limits the rows, start is 0 and is not looked at.
    """
    KEYS_AT: tl.constexpr = 1 if KEYS_FIRST else 0
    key = tl.expand_dims(keys, KEYS_AT)
    visible = key < tl.expand_dims(stop, 1 - KEYS_AT)
    if (masks.window is not None) or (masks.start is not None):
        visible = visible & (key >= tl.expand_dims(start, 1 - KEYS_AT))
    if masks.key_valid is not None:
        # Loaded with one axis: with two, Triton (3.6) gives all scores the layout of this load
        valid = tl.load(masks.key_valid + batch.to(tl.int64) * kv_len + keys, mask=keys < kv_len, other=0)
        visible = visible & tl.expand_dims(valid != 0, KEYS_AT)
    if masks.dense is not None:
        row = tl.expand_dims(rows, 1 - KEYS_AT)
        offset = batch.to(tl.int64) * masks.dense_batch + head.to(tl.int64) * masks.dense_head
        offset += row.to(tl.int64) * masks.dense_row + key.to(tl.int64) * masks.dense_key
        shown = tl.load(masks.dense + offset, mask=visible & (row < q_len), other=0) != 0
        # Through an empty product, which gives it the layout of scores; without, Triton lays out the scores by the load
        nothing = tl.zeros([shown.shape[0], 16], tl.bfloat16), tl.zeros([16, shown.shape[1]], tl.bfloat16)
        visible = visible & (tl.dot(nothing[0], nothing[1], shown.to(tl.float32)) > 0.5)
    return visible


@triton.jit
def load_rows(rows, batch, head, first, count, length, MASKED: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(count, D) elements from row `first` on; zeros beyond head_dim and, if MASKED, beyond `length`."""
    index = tl.arange(0, count)
    dim = tl.arange(0, D)
    pointer = rows.pointer + batch.to(tl.int64) * rows.batch + head.to(tl.int64) * rows.head
    pointer += first.to(tl.int64) * rows.row
    pointers = pointer + index[:, None] * rows.row + dim[None, :]
    if MASKED:
        inside = (first + index)[:, None] < length
        if HEAD_DIM != D:
            inside = inside & (dim[None, :] < HEAD_DIM)
        return tl.load(pointers, mask=inside, other=0.0)
    if HEAD_DIM != D:
        return tl.load(pointers, mask=dim[None, :] < HEAD_DIM, other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(rows, batch, head, first, values, length, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Writes (count, D) values from row `first` on, within `length` and head_dim."""
    index = tl.arange(0, values.shape[0])
    dim = tl.arange(0, D)
    pointer = rows.pointer + batch.to(tl.int64) * rows.batch + head.to(tl.int64) * rows.head
    pointer += first.to(tl.int64) * rows.row
    inside = (first + index)[:, None] < length
    if HEAD_DIM != D:
        inside = inside & (dim[None, :] < HEAD_DIM)
    tl.store(pointer + index[:, None] * rows.row + dim[None, :], values.to(rows.pointer.dtype.element_ty), mask=inside)


@triton.jit
def products_to_scores(product, scoring, slope, row_position, key_position):
    """(alpha - 1) (softcap(scale q k) - slope |i - j|) from q k; positions are float32, relative to the same key."""
    if scoring.softcap is not None:
        # tanh(x) = 2 sigmoid(2x) - 1
        capped = 2.0 / (1.0 + tl.exp(-2.0 * (product * scoring.scale / scoring.softcap))) - 1.0
        score = capped * (scoring.softcap * scoring.after_cap)
    else:
        score = product * scoring.scale
    if scoring.slopes is not None:
        score -= slope * tl.abs(row_position - key_position)
    return score


@triton.jit
def score_derivative(product, scoring):
    """d softcap(scale q k) / d(scale q k): 1 - tanh^2."""
    capped = 2.0 / (1.0 + tl.exp(-2.0 * (product * scoring.scale / scoring.softcap))) - 1.0
    return 1.0 - capped * capped


@triton.jit
def excess_over(score, tau):
    """[score - tau]_+, NaN where the score is: a bad input must show in the output."""
    return tl.maximum(score - tau, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def support_powers(excess, exponent: tl.constexpr):
    """(p, s) of r = excess >= 0: r^exponent and r^(exponent - 1), both 0 where r = 0."""
    if exponent == 2.0:
        return excess * excess, excess
    if exponent == 1.0:
        return excess, tl.where(excess > 0, 1.0, 0.0)
    slope = tl.where(excess == 0, 0.0, tl.exp2(tl.log2(excess) * (exponent - 1.0)))
    return slope * excess, slope


@triton.jit
def entmax_norm(total, exponent: tl.constexpr):
    """(sum of p)^(1/exponent): the norm of r whose value 1 defines tau."""
    if exponent == 2.0:
        return tl.sqrt(total)
    if exponent == 1.0:
        return total
    return tl.exp2(tl.log2(total) * (1.0 / exponent))


@triton.jit
def newton_step(total, slope_sum, exponent: tl.constexpr):
    """(norm, step) from sum p and sum s: the norm of r at tau, and Newton's step on it. Where total is 0, both are."""
    some = total > 0
    norm = entmax_norm(tl.where(some, total, 1.0), exponent)
    step = (norm - 1.0) * total / (norm * tl.where(some, slope_sum, 1.0))
    return tl.where(some, norm, 0.0), step
