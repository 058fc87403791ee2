"""Importing the package imports no other package, registers the presets, and needs neither Triton nor a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import transformers.modeling_utils, transformers.masking_utils, transformers.trainer_pt_utils  # none of them heavy
before = set(sys.modules)
sys.modules["triton"] = None  # import triton now fails, as on a machine without it
import hf_asentmax
import hf_asentmax
new = {name.split(".")[0] for name in set(sys.modules) - before}
print("new:", sorted(new - {"hf_asentmax", "triton"}))
from transformers import AttentionInterface
print("registered:", all(name in AttentionInterface() for name in
      ("asentmax", "entmax", "ssmax", "adaptive_temperature", "topk_softmax")))
import torch
x = torch.randn(1, 2, 5, 8)
print("shape:", tuple(hf_asentmax.entmax_attention(x, x, x).shape))
"""


@pytest.mark.slow
def test_import() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines == ["new: []", "registered: True", "shape: (1, 2, 5, 8)"]
