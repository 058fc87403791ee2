"""Reads the rows of attention.json and decode.json: which belong together, and how much faster ours is."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

__all__ = ["ATTENTION_CASE", "DECODE_CASE", "PEERS", "Case", "Row", "by_case", "times_faster"]

Row = dict[str, Any]
Case = tuple[Any, ...]

# Names of the methods in the results files, and how tables and figures write them.
PEERS = {
    "sdpa cuDNN": "cuDNN softmax",
    "sdpa flash-2": "FlashAttention-2",
    "flex alibi": "FlexAttention + ALiBi",
    "flex": "FlexAttention",
    "sdpa repeated keys, mask": "SDPA with a mask",
    "adasplash v2": "AdaSplash v2",
    "adasplash v1": "AdaSplash v1",
}
ATTENTION_CASE = ("kind", "length", "head_dim", "batch", "heads", "commit")
DECODE_CASE = ("kind", "heads", "kv_heads", "head_dim", "kv_len", "batch")


def by_case(results: list[Row], case: tuple[str, ...]) -> dict[Case, dict[str, Row]]:
    """For each case, which the entries named in `case` tell apart, the row of each method. Failed rows are left out.

    The commit belongs to a case of attention.json: the file holds several runs, and a method is compared with ours in
    the same run only.
    """
    grouped: dict[Case, dict[str, Row]] = defaultdict(dict)
    for row in results:
        if "failed" not in row:
            grouped[tuple(row.get(name, "") for name in case)][row["method"]] = row
    return dict(grouped)


def times_faster(ours: Row, peer: Row, entry: str) -> float | None:
    """The peer's time over ours, by one entry of their rows. None if one of them has no such time.

    A peer that was measured in a later run than our row brings our time in that run along, as `ours_ms`.
    """
    mine, its = peer.get("ours_ms") or ours.get(entry), peer.get(entry)
    return its / mine if mine and its else None
