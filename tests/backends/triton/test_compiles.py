"""Every kernel compiles for a Hopper GPU. The interpreter would not show that, and this needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = (
    "block_maxima_kernel",
    "candidates_kernel",
    "column_gradient_kernel",
    "decode_flat_kernel",
    "decode_output_kernel",
    "decode_scores_kernel",
    "dense_forward_kernel",
    "expand_kernel",
    "key_gradient_kernel",
    "key_norm_kernel",
    "list_backward_kernel",
    "list_forward_kernel",
    "pilot_kernel",
    "query_gradient_kernel",
    "row_bounds_kernel",
    "row_products_kernel",
    "short_backward_kernel",
    "short_forward_kernel",
)


@pytest.mark.slow
def test_compiles_for_sm90(tmp_path: Path) -> None:
    repository = Path(__file__).resolve().parents[3]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(repository), str(repository / "tests"))),
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    environment.pop("TRITON_INTERPRET", None)
    program = Path(__file__).with_name("compile_for_sm90.py")
    result = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert set(KERNELS) <= set(result.stdout.split())
