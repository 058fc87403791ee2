"""The attention benchmark's inputs from a trained model are those of the layer asked for, with its slopes."""

from __future__ import annotations

from pathlib import Path

import torch

from recipes.benchmark.capture import capture
from recipes.synthetic import train

SIZES = ["--layers", "2", "--hidden", "16", "--heads", "4", "--head-dim", "8", "--ffn", "32"]


def test_captured_tensors_are_a_layers(tmp_path: Path) -> None:
    train.main(["--task", "mqmtar", "--device", "cpu", "--out", str(tmp_path), "--steps", "1", "--batch", "2", *SIZES])
    run = tmp_path / "mqmtar-asentmax-nape" / "seed0"
    first, last = (capture(run, 64, layer, torch.device("cpu")) for layer in (0, -1))
    for tensors in (first, last):
        query, key, slopes = tensors["query"], tensors["key"], tensors["alibi_slopes"]
        assert query is not None and key is not None and slopes is not None
        assert query.dtype == torch.bfloat16 and query.shape == key.shape and query.shape[:2] == (1, 4)
        assert query.shape[2] >= 48 and query.shape[3] == 8
        assert slopes.tolist() == [1.0, 0.5, 0.0, 0.0]
    assert not torch.equal(first["key"], last["key"])  # type: ignore[arg-type]
