"""What the kernels share: their arguments' groups, visible keys, scores, and the two powers of alpha-entmax.

Kernels keep scores multiplied by alpha - 1, u = (alpha - 1) z. A weight is then

    p = r^(1/(alpha-1)),   s = p^(2-alpha) = p / r,   r = [u - tau]_+

The backward pass needs s: dz = s (dp - sum(s dp) / sum(s)) (Peters, Niculae & Martins 2019).

Groups of arguments are NamedTuples. A group that a kernel builds holds no compile-time constants, because Triton turns
them into run-time values on assignment. No field may be called `values` or `type`, which are names of Triton's own
tuples. Groups of tensors are flat: launching.py looks for tensors one level deep.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = [
    "BLOCK_FULL",
    "BLOCK_MASKED",
    "Dims",
    "KernelMasks",
    "KernelScoring",
    "Lengths",
    "QueryTile",
    "Rows",
    "entmax_norm",
    "excess_over",
    "head_slope",
    "load_rows",
    "newton_step",
    "products_to_scores",
    "query_tile",
    "scaled_weights",
    "score_derivative",
    "store_rows",
    "support_powers",
    "tile_scores",
    "tile_sees",
    "visible_interval",
    "visible_pairs",
]


# Kinds of blocks in the block map, besides 0: no key of the block has a weight in these rows.
BLOCK_FULL = tl.constexpr(1)  # all of the rows see all keys of the block
BLOCK_MASKED = tl.constexpr(2)  # some of the rows see some of the keys


class Rows(NamedTuple):
    """A (batch, heads, length, head_dim) tensor with unit stride in head_dim: its pointer and its other strides."""

    pointer: Any
    batch: Any
    head: Any
    row: Any


class Lengths(NamedTuple):
    """Query heads, key heads, queries and keys of a call: ints."""

    heads: Any
    kv_heads: Any
    q_len: Any
    kv_len: Any


class Dims(NamedTuple):
    """head_dim and value_dim as compile-time constants; D and DV are the powers of two that hold them."""

    D: Any
    HEAD_DIM: Any
    DV: Any
    VALUE_DIM: Any


class KernelMasks(NamedTuple):
    """A call's masks as kernels read them, see row_ranges.RowRanges. What is None is compiled away.

    Attributes:
        causal: constexpr bool.
        window: int or None, the sliding window.
        start, stop: (batch or 1, q_len) int32, the interval of keys that a row may see.
        range_batch: stride of start and stop over the batch; 0 where they have one row for the whole batch.
        key_valid: (batch, kv_len) uint8, 0 for padding.
        has_holes: (batch,) int32, 1 where key_valid has to be read inside of the intervals.
        dense: (batch, 1 or heads, q_len, kv_len) uint8, the 4D mask, with its four strides.
    """

    causal: Any
    window: Any
    start: Any
    stop: Any
    range_batch: Any
    key_valid: Any
    has_holes: Any
    dense: Any
    dense_batch: Any
    dense_head: Any
    dense_row: Any
    dense_key: Any


class KernelScoring(NamedTuple):
    """How kernels make scores of products, and weights of scores.

    Attributes:
        scale: (alpha - 1) times the caller's scale, or the caller's scale where softcap is given.
        softcap: c of c tanh(x / c), or None.
        after_cap: alpha - 1; None without softcap.
        slopes: (heads,) float32 ALiBi slopes, or None.
        slope_factor: alpha - 1; None without slopes.
        exponent: constexpr, 1 / (alpha - 1): 2 for alpha = 1.5 and 1 for alpha = 2 have code of their own.
    """

    scale: Any
    softcap: Any
    after_cap: Any
    slopes: Any
    slope_factor: Any
    exponent: Any


class QueryTile(NamedTuple):
    """The query rows that a program works on.

    Attributes:
        batch, head, kv_head: which batch entry, query head and key head; ints.
        rows: (rows,) int32, their numbers.
        start, stop: (rows,) int32, the interval of keys that each may see, see `visible_interval`.
        position: (rows,) float32, their positions, counted from key `base`.
        base: int, the key that positions are counted from, so that float32 holds the distances within a tile exactly.
        slope: ALiBi's slope of the head times alpha - 1; 0 without ALiBi.
    """

    batch: Any
    head: Any
    kv_head: Any
    rows: Any
    start: Any
    stop: Any
    position: Any
    base: Any
    slope: Any


@triton.jit
def visible_interval(masks, batch, rows, q_len, kv_len):
    """(start, stop) int32: each row sees at most the keys start <= j < stop, with start >= 0 and stop <= kv_len.

    Rows that see no key and rows that do not exist have start >= stop.
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
def head_slope(scoring, head):
    """ALiBi's slope of a head times alpha - 1; 0 without ALiBi."""
    slope = 0.0
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + head) * scoring.slope_factor
    return slope


@triton.jit
def visible_pairs(
    masks, batch, head, rows, keys, start, stop, q_len, kv_len, KEYS_FIRST: tl.constexpr = False
):  # fmt: skip
    """Whether each row sees each key: bool (rows, keys), or (keys, rows) if KEYS_FIRST.

    Args:
        head: one number, or expanded as rows are in the result.
        rows, keys: one axis each; keys >= 0.
        start, stop: what `visible_interval` gave for the rows. Where only causality limits the rows, start is 0 and is
            not compared.
    """
    KEYS_AT: tl.constexpr = 1 if KEYS_FIRST else 0
    key = tl.expand_dims(keys, KEYS_AT)
    visible = key < tl.expand_dims(stop, 1 - KEYS_AT)
    if (masks.window is not None) or (masks.start is not None):
        visible = visible & (key >= tl.expand_dims(start, 1 - KEYS_AT))
    if masks.key_valid is not None:
        # Loaded with one axis: with two axes, Triton (3.6) gives all scores the layout of this load
        valid = tl.load(masks.key_valid + batch.to(tl.int64) * kv_len + keys, mask=keys < kv_len, other=0)
        visible = visible & tl.expand_dims(valid != 0, KEYS_AT)
    if masks.dense is not None:
        row = tl.expand_dims(rows, 1 - KEYS_AT)
        offset = batch.to(tl.int64) * masks.dense_batch + head.to(tl.int64) * masks.dense_head
        offset += row.to(tl.int64) * masks.dense_row + key.to(tl.int64) * masks.dense_key
        shown = tl.load(masks.dense + offset, mask=visible & (row < q_len), other=0) != 0
        # Adding a product of zeros gives the mask the layout of the scores. Otherwise Triton lays out the scores as the
        # mask was loaded, which makes three to five times as much code.
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


# A sum of powers below it may consist of numbers that a GPU rounds to 0.
_LEAST_SUM = tl.constexpr(2.0**-100)


@triton.jit
def products_to_scores(product, scoring, slope, row_position, key_position):
    """u = (alpha - 1) (softcap(scale q k) - slope |i - j|) of q k; positions are float32, counted from the same key."""
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
def tile_scores(product, scoring, tile, keys):
    """u (rows, keys) of a QueryTile's rows and some keys, from their products; nothing is masked."""
    return products_to_scores(
        product, scoring, tile.slope, tile.position[:, None], (keys - tile.base).to(tl.float32)[None, :]
    )


@triton.jit
def tile_sees(masks, tile, keys, lengths):
    """bool (rows, keys): whether each row of a QueryTile sees each key, keys >= 0."""
    return visible_pairs(
        masks, tile.batch, tile.head, tile.rows, keys, tile.start, tile.stop, lengths.q_len, lengths.kv_len
    )


@triton.jit
def score_derivative(product, scoring):
    """d softcap(scale q k) / d(scale q k): 1 - tanh^2."""
    capped = 2.0 / (1.0 + tl.exp(-2.0 * (product * scoring.scale / scoring.softcap))) - 1.0
    return 1.0 - capped * capped


@triton.jit
def query_tile(group, first_row, masks, scoring, lengths, BM: tl.constexpr):
    """The QueryTile of BM rows from first_row on, of head `group` counted over all batch entries."""
    batch = group // lengths.heads
    head = group % lengths.heads
    kv_head = head // (lengths.heads // lengths.kv_heads)
    rows = first_row + tl.arange(0, BM)
    base = first_row + lengths.kv_len - lengths.q_len
    start, stop = visible_interval(masks, batch, rows, lengths.q_len, lengths.kv_len)
    position = tl.arange(0, BM).to(tl.float32)
    return QueryTile(batch, head, kv_head, rows, start, stop, position, base, head_slope(scoring, head))


@triton.jit
def excess_over(score, tau):
    """[score - tau]_+; NaN where the score is NaN, because a bad input must show in the output."""
    return tl.maximum(score - tau, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def support_powers(excess, exponent: tl.constexpr):
    """(p, s) of r = excess >= 0: r^exponent and r^(exponent - 1), both 0 where r = 0.

    A whole exponent (alpha = 1 + 1/2, 1 + 1/3, 1 + 1/4, ...) needs multiplications only. Another one needs a logarithm
    and an exponential, which cost several times as much.
    """
    if exponent == 2.0:
        return excess * excess, excess
    if exponent == 1.0:
        return excess, tl.where(excess > 0, 1.0, 0.0)
    if exponent % 1.0 == 0.0:
        slope = _whole_power(excess, exponent - 1.0)
    else:
        slope = tl.where(excess == 0, 0.0, tl.exp2(tl.log2(excess) * (exponent - 1.0)))
    return slope * excess, slope


@triton.jit
def _whole_power(base, exponent: tl.constexpr):
    """base^exponent by squaring, for a whole exponent from 1 to 31."""
    result = base
    square = base
    started: tl.constexpr = exponent % 2.0 == 1.0
    if exponent >= 2.0:
        square = square * square
        if exponent // 2.0 % 2.0 == 1.0:
            result = result * square if started else square
    if exponent >= 4.0:
        square = square * square
        if exponent // 4.0 % 2.0 == 1.0:
            result = result * square if exponent % 4.0 != 0.0 else square
    if exponent >= 8.0:
        square = square * square
        if exponent // 8.0 % 2.0 == 1.0:
            result = result * square if exponent % 8.0 != 0.0 else square
    if exponent >= 16.0:
        square = square * square
        result = result * square if exponent % 16.0 != 0.0 else square
    return result


@triton.jit
def scaled_weights(weights, P_SCALE: tl.constexpr, dtype: tl.constexpr):
    """weights times P_SCALE in the values' type. float16 holds no weight above 2, which float32's rounding of tau can
    leave where scores are in the millions, so those are cut."""
    scaled = weights * P_SCALE
    if P_SCALE != 1.0:
        scaled = tl.minimum(scaled, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return scaled.to(dtype)


@triton.jit
def entmax_norm(total, exponent: tl.constexpr):
    """(sum of p)^(1/exponent): the norm of r whose value 1 defines tau."""
    if exponent == 2.0:
        return tl.sqrt(total)
    if exponent == 1.0:
        return total
    if exponent == 4.0:
        return tl.sqrt(tl.sqrt(total))
    return tl.exp2(tl.log2(total) * (1.0 / exponent))


@triton.jit
def newton_step(total, slope_sum, exponent: tl.constexpr):
    """(norm, step) from sum p and sum s: the norm of r at tau, and Newton's step on it. Both are 0 where sum p is 0.

    For alpha below 1.5 the sums themselves can leave float32. Then the step is 0, and the norm says on which side tau
    is: 0 where it lies above all that counts, inf where a score lies so far above it that r^exponent overflows.
    """
    if exponent > 2.0:
        finite = total < float("inf")
        good = finite & (total > _LEAST_SUM)
        norm = entmax_norm(tl.where(good, total, 1.0), exponent)
        # (norm - 1) total / (norm sum s) in an order whose products stay in float32
        step = (norm - 1.0) / norm * (total / tl.where(good, slope_sum, 1.0))
        # total itself where it is inf or NaN
        return tl.where(good, norm, tl.where(finite, 0.0, total)), tl.where(good, step, 0.0)
    some = total > 0
    norm = entmax_norm(tl.where(some, total, 1.0), exponent)
    step = (norm - 1.0) * total / (norm * tl.where(some, slope_sum, 1.0))
    return tl.where(some, norm, 0.0), step
