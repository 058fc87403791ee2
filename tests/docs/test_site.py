"""The site builds without a warning, has every public name, and its guide names every flag and preset."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import hf_asentmax
from hf_asentmax.config import PRESETS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = ["-m", "sphinx", "--builder", "html", "--fail-on-warning", "--nitpicky", "--quiet", "docs", str(tmp_path)]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    reference = (tmp_path / "api.html").read_text(encoding="utf-8")
    missing = [name for name in hf_asentmax.__all__ if f'id="hf_asentmax.{name}"' not in reference]
    assert missing == ["__version__"]


def test_the_guide_names_every_flag_and_preset() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    flags = [field.name for field in fields(hf_asentmax.ASEntmaxConfig) if not field.name.startswith("_")]
    assert [name for name in [*flags, *PRESETS] if f"`{name}`" not in guide] == []
