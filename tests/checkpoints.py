"""Checkpoints of tiny models, and how tests compare and edit them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tiny_models import PRESETS, random_ids

IDS = random_ids(2, 9)
# Each preset, and flags that differ from every preset
VARIANTS: dict[str, tuple[str, dict[str, Any] | None]] = {
    **{name: (name, None) for name in PRESETS},
    "nape": ("asentmax", {"positions": "nape", "alibi_heads": 1, "alibi_slopes": "geometric", "alpha": 1.25}),
    "learned": ("entmax", {"scaling": "learned", "positions": "alibi", "delta": 0.5}),
    "topk of 3": ("topk_softmax", {"top_k": 3, "positions": "nope"}),
}


def logits(model: PreTrainedModel) -> torch.Tensor:
    """The model's logits of `IDS`."""
    with torch.no_grad():
        return model(IDS).logits


def assert_same_parameters(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Equal names and bit-equal values."""
    actual_parameters, expected_parameters = dict(actual.named_parameters()), dict(expected.named_parameters())
    assert actual_parameters.keys() == expected_parameters.keys()
    for name, parameter in expected_parameters.items():
        assert torch.equal(actual_parameters[name], parameter), name


def config_file(path: Path) -> dict[str, Any]:
    """The entries of a checkpoint's config.json."""
    return json.loads((path / "config.json").read_text())


def edit_config_file(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the entries of a checkpoint's config.json in place."""
    entries = config_file(path)
    edit(entries)
    (path / "config.json").write_text(json.dumps(entries))
