"""The grid for compute-sanitizer runs; what its calls compute, the other tests say."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import run_small_grid


@pytest.mark.slow
def test_the_grid_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run_small_grid, "LISTS", run_small_grid.LISTS[:1])
    run_small_grid.main(["--share", "20"])
    assert capsys.readouterr().out.startswith("ran 9 calls on ")
