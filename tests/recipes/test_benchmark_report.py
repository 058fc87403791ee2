"""The table and plot of the attention benchmark, from a small made-up results file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from recipes.benchmark import attention_report


def test_table_and_plot_come_from_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    case = {"kind": "random", "head_dim": 64, "batch": 1, "heads": 16, "support": 20.0}
    rows = []
    for length in (1024, 2048):
        for method, time in (("ours", 2.0), ("sdpa cuDNN", 3.0)):
            rows.append(
                {
                    **case,
                    "length": length,
                    "method": method,
                    "forward_ms": 1.0,
                    "forward_backward_ms": time,
                    "peak_mib": 8,
                }
            )
        rows.append({**case, "length": length, "method": "flex alibi", "failed": "RuntimeError"})
    content = {
        "command": "python x", "commit": "0123456789abcdef", "device": {"name": "a GPU"}, "versions": {"torch": "2"},
        "results": rows,
    }  # fmt: skip
    path = tmp_path / "attention.json"
    path.write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["report", str(path)])
    attention_report.main()
    text = path.with_suffix(".md").read_text()
    assert (
        "1.00 / 3.00: 1.50x" in text
        and "| 1,024 | 64 | 1 x 16 | 20.0 |" in text
        and "a GPU" in text
        and "flex" not in text
    )
    assert path.with_suffix(".png").stat().st_size > 1000
