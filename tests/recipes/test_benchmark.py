"""The benchmarks without a GPU: their cases, what they measure with a made-up clock, and the figure."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.benchmark import attention, decode, figure, generate, results, timing, training_step

SCRIPTS = [
    *(f"benchmark.{name}" for name in ("attention", "capture", "decode", "figure", "generate", "training_step")),
    *("pretrain.perplexity", "pretrain.pretrain", "quickstart.report", "quickstart.run", "tables.__main__"),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_explain_themselves(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"recipes.{script}")
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0 and f"python -m recipes.{script.removesuffix('.__main__')}" in capsys.readouterr().out


@pytest.fixture
def a_made_up_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is made once, on the CPU, and takes 1.5 ms."""

    def clock(run: Callable[[], Any], *_: Any) -> float:
        run()
        return 1.5

    for name in ("median_ms", "graph_ms", "host_ms", "peak_mib"):
        monkeypatch.setattr(timing, name, clock)
    monkeypatch.setattr(timing, "capture", lambda run, warm_up: (warm_up(), run()))
    monkeypatch.setattr(timing, "replay_ms", lambda graph: 24.0)
    monkeypatch.setattr(timing, "kernel_us", lambda run, calls: (run(), {"a_kernel": 1.0})[1])
    monkeypatch.setattr(decode, "ROTATED_BYTES", 300_000)


@pytest.mark.parametrize("kind", attention.KINDS)
def test_attention_is_measured_and_compared_with_the_definition(kind: str, a_made_up_clock: None) -> None:
    case = attention.Case(kind, 320, 16, 1)
    ours, flash, cudnn = attention.run_case(case, ["ours", "sdpa flash-2", "sdpa cuDNN"], "cpu", "eager")
    assert [row["method"] for row in (ours, flash, cudnn)] == ["ours", "sdpa flash-2", "sdpa cuDNN"]
    assert ours["graph_ms"] == 1.5 and ours["error"] < 4e-3 and "error" not in flash
    assert cudnn["failed"].startswith("RuntimeError")
    assert {"sharp": 0, "near-uniform": 60}.get(kind, 4) < ours["support"] < {"sharp": 4}.get(kind, 170)


def test_attention_cases_come_in_their_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tensors = {name: torch.zeros(1, 4, 48, 8) for name in ("query", "key", "value")}
    torch.save({**tensors, "alibi_slopes": None}, tmp_path / "layer.pt")
    arguments = attention.parse_arguments(["--captured", str(tmp_path / "layer.pt")])
    jobs = attention.jobs(arguments)
    kinds = [case.kind for case, names in jobs if "ours" in names]
    assert len(kinds) == len(attention.TABLE) + 1 + len(attention.SHORT) + len(
        set(attention.GROWTH) - {*attention.TABLE}
    )
    assert kinds[len(attention.TABLE)] == "captured layer"
    assert all(case.length in (8192, 32768, 131072) for case, names in jobs if "flex alibi" in names)
    captured = next(case for case, _ in jobs if case.file)
    inputs, slopes = captured.make("cpu")
    assert (captured.length, captured.head_dim) == (48, 8) and inputs[0].shape == (1, 4, 48, 8) and slopes is None


@pytest.mark.parametrize("kind", decode.KINDS)
def test_a_decoding_step_is_measured_and_compared_with_the_definition(kind: str, a_made_up_clock: None) -> None:
    case = decode.Case(heads=4, kv_heads=2, head_dim=16, kv_len=256, batch=2, kind=kind)
    sets = decode.make_inputs(case, "cpu")
    row = decode.measure_ours(case, sets, bandwidth=1e6, backend="eager")
    assert len(sets) == 5 and row["ms"] == 24.0 / 15 and row["kernels_us"] == {"a_kernel": 1.0}
    if kind not in decode.WITH_ALIBI:
        assert row["error"] < 4e-3 and row["floor_ms"] > (0.75 if kind == "static" else 1.0) * case.key_bytes / 1e6
    for name in ("sdpa flash-2", "sdpa repeated keys, mask"):
        step = decode.peer(name, case, "cpu")
        assert (step is None) == (kind == "static" if name == "sdpa flash-2" else kind != "random")
        if step is not None:
            assert step(sets[0]).shape == (2, 4, 1, 16)


def test_generation_and_training_steps_run_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    shared = ["--sharpen", "4", "1", "--out", str(out)]
    generate.main(["--sizes", "tiny", "--context", "40", "--new", "12", *shared])
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == 2 * generate.COMPARED
    assert [row["sharpen"] for row in rows] == 3 * [4] + 3 * [1]
    assert rows[0]["times_faster_than_sdpa"] == 1.0 and all(row["step_ms"] > 0 for row in rows)
    training_step.main(["--size", "tiny", "--lengths", "32", "--steps", "1", "--compile", "layers", *shared])
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 6 and rows[0]["times_faster_than_sdpa"] == rows[1]["times_faster_than_sdpa"] == 1.0


def test_scripts_that_need_a_gpu_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for main in (attention.main, decode.main, generate.main, training_step.main):
        with pytest.raises(SystemExit):
            main([])
        assert "expected a CUDA GPU" in capsys.readouterr().err


def test_a_method_is_compared_with_ours_in_its_own_run() -> None:
    case = {"kind": "random", "length": 8, "head_dim": 4, "batch": 1, "heads": 1}
    rows = [
        {**case, "method": "ours", "graph_ms": 2.0, "commit": "a"},
        {**case, "method": "ours", "graph_ms": 3.0, "commit": "b"},
        {**case, "method": "sdpa cuDNN", "graph_ms": 6.0, "commit": "b"},
        {**case, "method": "sdpa flash-2", "failed": "RuntimeError", "commit": "b"},
    ]
    first, second = results.by_case(rows, results.ATTENTION_CASE).values()
    assert list(first) == ["ours"] and list(second) == ["ours", "sdpa cuDNN"]
    assert results.times_faster(second["ours"], second["sdpa cuDNN"], "graph_ms") == 2.0
    assert results.times_faster(second["ours"], second["sdpa cuDNN"], "forward_ms") is None
    assert results.times_faster({"ms": 1.0}, {"ms": 6.0, "ours_ms": 2.0}, "ms") == 3.0


def test_the_figure_shows_the_time_of_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "kind": kind,
            "length": length,
            "head_dim": 64,
            "batch": 2,
            "heads": 4,
            "method": method,
            "forward_backward_ms": 8.0,
        }
        for kind in ("nape", "topical", "random")
        for length in (1024, 2048, 4096)
        for method in ("ours", "sdpa cuDNN", "adasplash v2")
    ]
    found = figure.curves(rows, 64)
    assert set(found) == {"nape", "topical"} and set(found["nape"]) == {"ours", "sdpa cuDNN"}
    assert found["nape"]["ours"] == {1024: 1.0, 2048: 1.0, 4096: 1.0}
    (tmp_path / "attention.json").write_text(json.dumps({"results": rows}))
    figure.main([str(tmp_path / "attention.json")])
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
