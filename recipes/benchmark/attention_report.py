"""The table and the plot of attention.json: what attention.py measured, ours beside its peers.

python -m recipes.benchmark.attention_report            # writes attention.md and attention.png beside the JSON
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from recipes.common import OTHERS, OURS, markdown_table, save_figure, short_commit

PEERS = ("sdpa cuDNN", "sdpa flash-2", "flex alibi", "adasplash v2", "adasplash v1")


def by_case(results: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """(kind, length, head_dim, batch, heads, commit) -> method -> its row; failed rows are left out.

    A file may hold several runs: times of one are compared with each other only, and the commit tells runs apart.
    """
    grouped: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in results:
        if "failed" not in row:
            case = tuple(row[name] for name in ("kind", "length", "head_dim", "batch", "heads"))
            case += (row.get("commit", ""),)
            grouped[case][row["method"]] = row
    return dict(grouped)


def times(row: dict[str, Any]) -> str:
    """forward / forward and backward (in a graph)"""
    graph = row.get("graph_ms")
    in_graph = f" ({graph:.2f})" if graph else ""
    return f"{row['forward_ms']:.2f} / {row['forward_backward_ms']:.2f}{in_graph}"


def table(content: dict[str, Any]) -> str:
    """Markdown: a line per case with the times of ours and of each peer, and the peer's over ours."""
    cases = by_case(content["results"])
    peers = [peer for peer in PEERS if any(peer in rows for rows in cases.values())]
    columns = ["input", "N", "D", "B x H", "support", "error", "ours", *peers, "memory, ours / cuDNN", "commit"]
    rows_shown: list[list[str]] = []
    for (kind, length, head_dim, batch, heads, commit), rows in sorted(cases.items(), key=lambda item: str(item[0][0])):
        ours = rows.get("ours")
        if ours is None:
            continue
        cells = [kind, f"{length:,}", str(head_dim), f"{batch} x {heads}", str(ours.get("support", "-"))]
        cells.append(f"{ours['error']:.1e}" if "error" in ours else "-")
        cells.append(times(ours))
        for peer in peers:
            row = rows.get(peer)
            if row is None:
                cells.append("-")
                continue
            ratios = f"{row['forward_backward_ms'] / ours['forward_backward_ms']:.2f}x"
            if row.get("graph_ms") and ours.get("graph_ms"):
                ratios += f", {row['graph_ms'] / ours['graph_ms']:.2f}x"
            cells.append(f"{times(row)}: {ratios}")
        softmax = rows.get("sdpa cuDNN")
        cells.append("-" if softmax is None else f"{ours['peak_mib'] / softmax['peak_mib']:.2f}")
        cells.append(commit or short_commit(content["commit"]))
        rows_shown.append(cells)
    device, versions = content["device"]["name"], content["versions"]["torch"]
    origin = (
        f"Milliseconds, medians: forward / forward and backward, called from Python (both passes in a CUDA graph): the "
        f"peer's time over ours, called and in a graph. bfloat16, causal, {device}, torch {versions}, "
        f"commit {short_commit(content['commit'])}, `{content['command']}`."
    )
    return f"{markdown_table(columns, rows_shown)}\n\n{origin}\n"


def plot(content: dict[str, Any], path: Path, head_dim: int = 64) -> None:
    """Forward and backward per length, one panel per kind of input, those of three lengths or more if there are any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    for (kind, length, dim, batch, heads, _), rows in by_case(content["results"]).items():
        if dim == head_dim and "many rows" not in kind:
            for method, row in rows.items():
                # per sequence and head, since the batch shrinks as the length grows
                curves[kind][method][length] = row["forward_backward_ms"] / (batch * heads)
    long = {kind: methods for kind, methods in curves.items() if any(len(points) > 2 for points in methods.values())}
    curves = long or curves  # two points say little about how a time grows
    figure, axes = pyplot.subplots(
        1, max(1, len(curves)), figsize=(3.4 * max(1, len(curves)), 3.4), dpi=160, sharey=True, squeeze=False
    )
    lines: dict[str, Any] = {}
    for panel, (kind, methods) in zip(axes[0], curves.items(), strict=False):
        styles = {"ours": OURS, **dict(zip(PEERS, OTHERS, strict=False))}
        for name in (name for name in styles if name in methods):
            colour, marker = styles[name]
            lengths, times = zip(*sorted(methods[name].items()), strict=True)
            (lines[name],) = panel.plot(lengths, times, color=colour, marker=marker, markersize=4)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_title(kind, fontsize=10)
        panel.set_xlabel("length")
        panel.grid(color="#e5e5e5", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("forward and backward, ms a head")
    axes[0][-1].legend(list(lines.values()), list(lines), frameon=False, fontsize=7)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path(__file__).with_name("attention.json"))
    arguments = parser.parse_args()
    content = json.loads(arguments.results.read_text(encoding="utf-8"))
    arguments.results.with_suffix(".md").write_text(table(content), encoding="utf-8")
    plot(content, arguments.results.with_suffix(".png"))
    print(table(content))


if __name__ == "__main__":
    main()
