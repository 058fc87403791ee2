"""Fixtures of the integration tests: saved checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tiny_models import perturbed_model, tiny_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """A saved ASEntmax Llama with NAPE, and the model that was saved."""
    model = perturbed_model(flags={"positions": "nape"})
    model.save_pretrained(tmp_path)
    return tmp_path, model


@pytest.fixture
def softmax_checkpoint(tmp_path: Path) -> Path:
    """A saved softmax Llama."""
    tiny_model("llama").save_pretrained(tmp_path / "softmax")
    return tmp_path / "softmax"
