r"""Decoding, first kernel: the scores of a few query rows against all keys, each key read once.

The query rows that share a key head (its query heads times q_len) are the rows of one matrix product. The span is the
range of tiles that causality, window and ALiBi's reach leave visible to any of them. It is split evenly over programs;
each writes its float32 scores, and each row's maximum in each tile, to the row's workspace. So the time of a head with
ALiBi does not grow with the cache, but for the start of programs that find nothing to do.

ALiBi is measured from a row's position to the key, less the distance to the first key of the tile. These differences
are small integers, so float32 keeps them exact in a cache of any length. The second kernel adds the tile's part,
measured from the nearest tile that holds a visible key (as ``masks.alibi_positions`` does, and as exactly).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common.device import load_rows, products_to_scores, visible_interval, visible_pairs

__all__ = ["SPAN", "KeyNormBound", "Queries", "Workspace", "decode_scores_kernel"]

_FAR = tl.constexpr(1 << 30)
SPAN = tl.constexpr(16)  # place of the span in a workspace's state


class Queries(NamedTuple):
    """Query heads, key heads, and queries of a head: ints. kv_len is an argument of its own, never specialised."""

    heads: Any
    kv_heads: Any
    q_len: Any


class KeyNormBound(NamedTuple):
    """A bound on the Euclidean norms of keys.

    Attributes:
        bound: float32, at place batch_stride * batch + kv_head at least the norm of every key; None: not known.
        batch_stride: 0 where all batch entries have one row of bounds.
    """

    bound: Any
    batch_stride: Any


class Workspace(NamedTuple):
    """One record of 32-bit words for each query row (batch, head, row), and the places of its parts, in words.

    A record begins with the scores; tiles without a visible key stay unwritten. Counts and indices are int32, the rest
    is float32.

    Attributes:
        pointer: the first record; row: words from one record to the next.
        maxima: the maximum of each tile of the row's span.
        active: the numbers of the tiles above the bound.
        listed_keys, listed_scores: the candidates.
        partial: partial outputs of the programs that share the row.
        state: the number of programs that have arrived; the number of active tiles if the third kernel has the row,
            else 0; the bound; each part's number of candidates; and, from SPAN on, the first tile of the row's span and
            the one after its last.
    """

    pointer: Any
    row: Any
    maxima: Any
    active: Any
    listed_keys: Any
    listed_scores: Any
    partial: Any
    state: Any


class _QueryRows(NamedTuple):
    """The BM query rows of a program, of one key head.

    Attributes:
        batch, kv_head: numbers; head, row, position: (BM,), each row's head, its number in it, and its key.
        exists: (BM,) bool; slope: (BM,) float32, of ALiBi, times alpha - 1.
    """

    batch: Any
    kv_head: Any
    head: Any
    row: Any
    position: Any
    exists: Any
    slope: Any


@triton.jit
def _nearest_visible(rows, masks, kv_len, LEVELS: tl.constexpr):
    """A distance at which each of the _QueryRows sees a key for certain, _FAR where none was found.

    Mostly the row sees its own key. Where a mask hides it (a static cache's unfilled slots), the search looks at 64
    evenly spaced keys, then at 64 behind the last visible of them, and so on, and takes the last visible key.
    """
    position = rows.position
    own = rows.exists & (position >= 0) & (position < kv_len)
    known = _shown(masks, rows.batch, rows.head, rows.row, position, own, kv_len)
    distance = tl.where(known, 0, _FAR)
    if (masks.dense is not None) or (masks.key_valid is not None):  # noqa: SIM102 (one is decided at compile time)
        if tl.max((rows.exists & (known == 0)).to(tl.int32), 0) > 0:
            best = position * 0
            found = best != 0
            step = position * 0 + 64 ** (LEVELS - 1)
            for _ in tl.static_range(LEVELS):
                sample = best[:, None] + step[:, None] * tl.arange(0, 64)[None, :]
                inside = rows.exists[:, None] & (sample < kv_len) & (sample <= position[:, None])
                if masks.window is not None:
                    inside = inside & (sample > position[:, None] - masks.window)
                seen = _shown(masks, rows.batch, rows.head[:, None], rows.row[:, None], sample, inside, kv_len)
                last = tl.max(tl.where(seen, sample, -1), 1)
                found = found | (last >= 0)
                best = tl.maximum(best, last)
                step = step // 64
            distance = tl.where(known, 0, tl.where(found, position - best, _FAR))
    return distance


@triton.jit
def _shown(masks, batch, head, rows, keys, inside, kv_len):
    """Which of the keys, where `inside`, the padding mask and the 4D mask show."""
    seen = inside
    if masks.key_valid is not None:
        seen = seen & (tl.load(masks.key_valid + batch.to(tl.int64) * kv_len + keys, mask=seen, other=0) != 0)
    if masks.dense is not None:
        offset = batch.to(tl.int64) * masks.dense_batch + head.to(tl.int64) * masks.dense_head
        offset += rows.to(tl.int64) * masks.dense_row + keys.to(tl.int64) * masks.dense_key
        seen = seen & (tl.load(masks.dense + offset, mask=seen, other=0) != 0)
    return seen


@triton.jit
def _reach(q, largest_key, scoring, slope):
    """How much farther than the nearest visible key a key may lie and still have a weight: an int for each row.

    With b = |q| max|k|, times the scale, the scores without ALiBi lie in [-b, b]. So the row's maximum is at least
    -b - m d for the slope m and the nearest distance d. A key at distance d + x has a score of at most b - m (d + x),
    which lies below the maximum by 1 if x m > 2b + 1.
    """
    q = q.to(tl.float32)
    most = tl.sqrt(tl.sum(q * q, 1)) * (largest_key * tl.abs(scoring.scale))
    if scoring.softcap is not None:
        most *= scoring.after_cap
    reach = (2.02 * most + 1.01) / tl.where(slope > 0, slope, 1.0)
    return tl.where((slope > 0) & (reach < _FAR // 2), reach, _FAR // 2).to(tl.int32) + 1


@triton.jit
def _visible_span(masks, batch, low, high, first_key, q_len, kv_len, Q: tl.constexpr, SPAN: tl.constexpr):
    """[low, high) narrowed to keys of [first_key, first_key + SPAN) that the masks show."""
    keys = first_key + tl.arange(0, SPAN)
    seen = (keys >= low) & (keys < high) & (keys >= 0) & (keys < kv_len)
    if masks.key_valid is not None:
        seen = seen & (tl.load(masks.key_valid + batch.to(tl.int64) * kv_len + keys, mask=seen, other=0) != 0)
    if masks.dense is not None:
        row = tl.arange(0, Q)
        pointers = masks.dense + batch.to(tl.int64) * masks.dense_batch
        pointers = pointers + row.to(tl.int64)[:, None] * masks.dense_row
        pointers = pointers + keys.to(tl.int64)[None, :] * masks.dense_key
        some = tl.load(pointers, mask=(row < q_len)[:, None] & seen[None, :], other=0) != 0
        seen = seen & (tl.max(some.to(tl.int32), 0) != 0)
    return tl.min(tl.where(seen, keys, _FAR), 0), tl.max(tl.where(seen, keys + 1, 0), 0)


@triton.jit(do_not_specialize=["kv_len", "splits"])
def decode_scores_kernel(
    query, key, workspace, norms, masks, scoring, queries, kv_len, splits,
    BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, Q: tl.constexpr, SEARCH: tl.constexpr,
    LEVELS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Scores u_ij = (alpha-1)(softcap(scale q_i k_j) - slope |i - j|), ALiBi relative to the tile, and tile maxima.

    Grid: `splits` programs for every BM of the query rows that share a key head. A program reads its rows of query and
    an even share of the tiles of their span, at most TILES of BN keys. It writes its scores and maxima to the records
    of its rows; the first program writes their spans and sets the count of arrivals to 0.

    Args:
        query, key: Rows; workspace: Workspace; norms: KeyNormBound; queries: Queries.
        splits: ceil(kv_len / (BN TILES)).
        Q: a power of two of at least q_len. SEARCH: skip tiles at either end that the masks hide.
        LEVELS: 64^LEVELS >= kv_len.
        OVERLAPS: started before the kernel ahead of it has ended.
    """
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    q_len = queries.q_len
    group_size = queries.heads // queries.kv_heads
    row_tiles = tl.cdiv(group_size * q_len, BM)
    pid = tl.program_id(0)
    split = pid % splits
    group = pid // splits // row_tiles
    batch = group // queries.kv_heads
    kv_head = group % queries.kv_heads
    index = (pid // splits % row_tiles) * BM + tl.arange(0, BM)
    exists = index < group_size * q_len
    row = index % q_len
    head = tl.where(exists, kv_head * group_size + index // q_len, 0)
    record = workspace.pointer + ((batch * queries.heads + head) * q_len + row).to(tl.int64) * workspace.row
    dim = tl.arange(0, D)
    pointers = query.pointer + batch.to(tl.int64) * query.batch + head.to(tl.int64) * query.head + row * query.row
    q = tl.load(pointers[:, None] + dim[None, :], mask=exists[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    position = row + (kv_len - q_len)
    start, stop = visible_interval(masks, batch, row, q_len, kv_len)
    slope = tl.zeros([BM], tl.float32)
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + head, mask=exists, other=0.0) * scoring.slope_factor
    rows = _QueryRows(batch, kv_head, head, row, position, exists, slope)
    if (scoring.slopes is not None) and (norms.bound is not None):
        reach = _reach(q, tl.load(norms.bound + batch * norms.batch_stride + kv_head), scoring, slope)
        reach += _nearest_visible(rows, masks, kv_len, LEVELS)
        start = tl.maximum(start, position - reach)
        stop = tl.minimum(stop, position + reach + 1)
    start = tl.maximum(start, 0)
    stop = tl.where(exists, tl.minimum(stop, kv_len), 0)

    low = tl.min(tl.where(start < stop, start, _FAR), 0)
    high = tl.max(tl.where(start < stop, stop, 0), 0)
    span_first = tl.where(low < high, low // BN, 0)
    span_last = tl.where(low < high, tl.cdiv(high, BN), 0)
    share = tl.cdiv(span_last - span_first, splits)
    first_tile = span_first + split * share
    last_tile = tl.minimum(first_tile + share, span_last)
    low = tl.maximum(low, first_tile * BN)
    high = tl.minimum(high, last_tile * BN)
    if SEARCH:
        low, high = _visible_span(masks, batch, low, high, first_tile * BN, q_len, kv_len, Q, TILES * BN)
    first = first_tile
    last = first_tile
    if low < high:
        first = low // BN
        last = tl.cdiv(high, BN)
    tile = first_tile + tl.arange(0, TILES)
    unseen = ((tile < first) | (tile >= last)) & (tile < last_tile)
    nothing = tl.full([BM, TILES], float("-inf"), tl.float32)
    tl.store(record[:, None] + workspace.maxima + tile[None, :], nothing, mask=exists[:, None] & unseen[None, :])
    if split == 0:
        words = record.to(tl.pointer_type(tl.int32)) + workspace.state
        nought = tl.zeros([BM], tl.int32)
        tl.store(words, nought, mask=exists)
        tl.store(words + SPAN, nought + span_first, mask=exists)
        tl.store(words + SPAN + 1, nought + span_last, mask=exists)

    at_once = tl.zeros([1, 1], tl.float32)
    for t in range(first, last):
        first_key = t * BN
        keys = first_key + tl.arange(0, BN)
        k = load_rows(key, batch, kv_head, first_key, BN, kv_len, True, D, HEAD_DIM)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        score = products_to_scores(product, scoring, slope[:, None], at_once, at_once)
        if scoring.slopes is not None:
            farther = tl.abs(position[:, None] - keys[None, :]) - tl.abs(position - first_key)[:, None]
            score -= slope[:, None] * farther.to(tl.float32)
        seen = visible_pairs(masks, batch, head[:, None], row, keys, start, stop, q_len, kv_len)
        score = tl.where(score == score, score, float("inf"))  # NaN must show in the output
        score = tl.where(seen, score, float("-inf"))
        tl.store(record[:, None] + keys[None, :], score, mask=exists[:, None] & (keys >= 0)[None, :])
        tl.store(record + workspace.maxima + t, tl.max(score, 1), mask=exists)
