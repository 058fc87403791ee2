"""The table of decode.json: one decoding step, ours beside softmax attention.

python -m recipes.benchmark.decode_report            # writes decode.md beside the JSON
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from recipes.benchmark.decode import PEERS
from recipes.common import markdown_table, short_commit

CASE = ("kind", "heads", "kv_heads", "head_dim", "kv_len", "batch")


def by_case(results: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """Case -> method -> its row, in the order of the results; failed rows are left out."""
    grouped: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in results:
        if "failed" not in row:
            grouped[tuple(row[name] for name in CASE)][row["method"]] = row
    return dict(grouped)


def times_faster(ours: dict[str, Any], peer: dict[str, Any]) -> float:
    """The peer's time over ours in the peer's run: `ours_ms`, where that is not the run of our row."""
    return float(peer["ms"] / peer.get("ours_ms", ours["ms"]))


def table(content: dict[str, Any]) -> str:
    """Markdown: a line per case; microseconds, and in brackets the peer's time over ours."""
    cases = by_case(content["results"])
    peers = [peer for peer in PEERS if any(peer in rows for rows in cases.values())]
    columns = ["input", "heads x D", "keys", "batch", "support", "error", "ours", "share of the byte floor", *peers]
    rows_shown: list[list[str]] = []
    for (kind, heads, kv_heads, head_dim, kv_len, batch), rows in cases.items():
        ours = rows.get("ours")
        if ours is None:
            continue
        cells = [kind, f"{heads}/{kv_heads} x {head_dim}", f"{kv_len:,}", str(batch), str(ours.get("support", "-"))]
        cells.append(f"{ours['error']:.1e}" if "error" in ours else "-")
        cells.append(f"{1e3 * ours['ms']:.1f}")
        cells.append(f"{ours['share_of_floor']:.2f}" if "share_of_floor" in ours else "-")
        for peer in peers:
            row = rows.get(peer)
            cells.append("-" if row is None else f"{1e3 * row['ms']:.1f} ({times_faster(ours, row):.2f}x)")
        rows_shown.append(cells)
    device, versions = content["device"]["name"], content["versions"]["torch"]
    origin = (
        "Microseconds of one step inside a CUDA graph, medians; in brackets the peer's time over ours in the same run. "
        f"bfloat16, {device} (copies {content['copy_tb_per_s']} TB/s), torch {versions}, "
        f"commit {short_commit(content['commit'])}, `{content['command']}`."
    )
    return f"{markdown_table(columns, rows_shown)}\n\n{origin}\n"


def main() -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path(__file__).with_name("decode.json"))
    arguments = parser.parse_args()
    content = json.loads(arguments.results.read_text(encoding="utf-8"))
    text = table(content)
    arguments.results.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
