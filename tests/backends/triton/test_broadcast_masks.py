"""4D masks of one row for the batch, the heads or the queries equal the same masks written out."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from calls import triton_attention
from kernel_cases import Case, tensors

CASES = [
    Case("head", q_len=40, batch=2),
    pytest.param(Case("dense", q_len=150, batch=2), marks=pytest.mark.slow),
    Case("decode", q_len=1, kv_len=300, batch=2),
    Case("decode-few-queries", q_len=3, kv_len=300, batch=2),
]


@pytest.mark.parametrize("rows", ["batch", "queries", "both", "per head"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_mask_written_out(case: Case, rows: str, device: str) -> None:
    batch = 1 if rows in ("batch", "both") else case.batch
    heads = case.heads if rows == "per head" else 1
    q_len = case.q_len if rows == "batch" else 1
    mask = (torch.rand(batch, heads, q_len, case.keys, generator=torch.Generator().manual_seed(0)) < 0.6).to(device)
    full = mask.expand(case.batch, heads, case.q_len, case.keys).contiguous()
    results = []
    for given in (mask, full):
        *leaves, grad = tensors(case, device)
        leaves = [leaf.requires_grad_(not case.name.startswith("decode")) for leaf in leaves]
        output = triton_attention(*leaves, attention_mask=given, is_causal=False)
        grads = torch.autograd.grad(output, leaves, grad) if output.requires_grad else ()
        results.append((output, *grads))
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=0, atol=1e-5)
