"""A call that equals earlier ones launches the same kernels with the same arguments, without looking kernels up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_asentmax.backends.triton.common.launching import signature_of


@pytest.mark.slow
def test_equal_calls_launch_the_same(tmp_path: Path) -> None:
    here = Path(__file__).resolve()
    folders = os.pathsep.join((str(here.parents[3]), str(here.parents[2])))
    environment = {**os.environ, "PYTHONPATH": folders, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    program = here.with_name("launch_twice.py")
    result = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split()[::2] == [
        "head", "odd-alignment", "fused", "short", "dense", "padded", "lists", "decode", "deterministic", "aliases",
    ]  # fmt: skip


def test_the_signature_sees_what_launches_depend_on() -> None:
    base = torch.zeros(64, dtype=torch.bfloat16)
    tensors = {
        "as it is": base[:32],
        "shape": base[:31],
        "stride": base[::2],
        "alignment": base[1:33],
        "type": base[:32].view(torch.float16),
        "none": None,
    }
    signatures = {name: signature_of("forward", (tensor,), (1.5,)) for name, tensor in tensors.items()}
    signatures["operation"] = signature_of("backward", (base[:32],), (1.5,))
    signatures["options"] = signature_of("forward", (base[:32],), (2.0,))
    torch.use_deterministic_algorithms(True)
    try:
        signatures["deterministic"] = signature_of("forward", (base[:32],), (1.5,))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(set(signatures.values())) == len(signatures)
    assert signature_of("forward", (base[:32].clone(),), (1.5,)) == signatures["as it is"]
