"""From candidate words to the rows' lists of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import LISTERS

__all__ = ["expand_kernel"]


@triton.jit
def _count_bits(word):
    """How many bits of each 16-bit word are 1."""
    word = word - ((word >> 1) & 0x5555)
    word = (word & 0x3333) + ((word >> 2) & 0x3333)
    word = (word + (word >> 4)) & 0x0F0F
    return (word + (word >> 8)) & 0x1F


@triton.jit
def _in_lists(CHUNK: tl.constexpr):
    """(lister, number) of each of CHUNK words, the first words of all lists."""
    word = tl.arange(0, CHUNK)
    each: tl.constexpr = CHUNK // LISTERS
    return word // each, word % each


@triton.jit
def _load_words(entries, source, first, written, ROOM: tl.constexpr, CHUNK: tl.constexpr):
    """(rows, CHUNK) entries: of each list as many, from number `first` on; 0 beyond what was `written`."""
    lister, number = _in_lists(CHUNK)
    number += first
    place = source[:, None] * ROOM + (lister * (ROOM // LISTERS) + number)[None, :]
    return tl.load(entries + place, mask=number[None, :] < written, other=0)


@triton.jit(do_not_specialize=["first_tile"])
def expand_kernel(
    words, lists, used, q_len, capacity, first_tile,
    ROOM: tl.constexpr, LIST_ROOM: tl.constexpr, CHUNK: tl.constexpr, ROW_BLOCK: tl.constexpr, BM: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """The keys that the words of R rows stand for, written one row's list after another's.

    Bit a + 8b of a word of list w, with number n, stands for key 64 n + 8a + 2w + b (`candidates.py`).

    Grid: BM / R programs for each row tile, R rows each. A program reads the rows' `words` and writes their part of
    `lists`. Programs reserve space in a head's `listed` by atomic additions, in no particular order.

    Args:
        words: CandidateWords, from `candidates_kernel`.
        lists: Lists, written but for column_counts. Rows that do not fit get 0 keys and their row block an overflow.
        used: (batch * heads,) int32, how much of `lists.listed` is taken; added to.
        capacity: keys that a head's lists have room for together.
        first_tile: number of this launch's first tile.
        ROOM: words that a row has room for; LIST_ROOM: the most keys of a row; CHUNK: words read at a time.
    """
    parts: tl.constexpr = BM // R
    slot = tl.program_id(0) // parts
    row_tiles = tl.cdiv(q_len, BM)
    tile = first_tile + slot
    group = (tile // row_tiles).to(tl.int64)
    in_tile = (tl.program_id(0) % parts) * R + tl.arange(0, R)
    rows = (row_tiles - 1 - tile % row_tiles) * BM + in_tile
    exists = rows < q_len
    source = slot.to(tl.int64) * BM + in_tile
    lister, _ = _in_lists(CHUNK)
    written = tl.load(words.counts + source[:, None] * LISTERS + lister[None, :], mask=exists[:, None], other=0)
    fits = tl.max(written, 1) < ROOM // LISTERS - 1
    written = tl.where(fits[:, None], written, 0)
    longest = tl.max(tl.max(written, 1), 0)
    total = tl.zeros([R], tl.int32)
    for first in range(0, longest, CHUNK // LISTERS):
        total += tl.sum(_count_bits(_load_words(words.entries, source, first, written, ROOM, CHUNK) & 0xFFFF), 1)
    fits = fits & (total <= LIST_ROOM)
    total = tl.where(fits, total, 0)
    all_rows = tl.sum(total, 0)
    begin = tl.atomic_add(used + group, all_rows, sem="relaxed")
    fits = fits & (begin + all_rows <= capacity)
    total = tl.where(fits, total, 0)
    offset = begin + tl.cumsum(total, 0) - total
    row_number = group * q_len + rows
    tl.store(lists.counts + row_number, total, mask=exists)
    tl.store(lists.offsets + row_number, offset, mask=exists)
    row_blocks = tl.cdiv(q_len, ROW_BLOCK)
    tl.store(
        lists.overflow + group * row_blocks + rows // ROW_BLOCK, tl.full([R], 1, tl.uint8), mask=exists & (fits == 0)
    )

    written = tl.where(fits[:, None], written, 0)
    target = lists.listed + group * capacity + offset[:, None]
    for first in range(0, tl.max(tl.max(written, 1), 0), CHUNK // LISTERS):
        entry = _load_words(words.entries, source, first, written, ROOM, CHUNK)
        word = entry & 0xFFFF
        first_key = ((entry >> 16) & 0xFFFF) * 64 + lister[None, :] * 2
        ones = _count_bits(word)
        place = tl.cumsum(ones, 1) - ones
        for step in range(0, tl.max(tl.max(ones, 1), 0)):
            lowest = word & (-word)
            bit = _count_bits(lowest - 1)
            key = first_key + (bit & 7) * 8 + (bit >> 3)
            tl.store(target + place + step, key, mask=word != 0)
            word = word ^ lowest
        target += tl.sum(ones, 1)[:, None]
