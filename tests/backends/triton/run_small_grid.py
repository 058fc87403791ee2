"""Every kernel on the small grid, without anything beside them, for compute-sanitizer on a GPU.

    export PYTHONPATH=.:tests PYTORCH_NO_CUDA_MEMORY_CACHING=1    # memcheck then sees where each tensor ends
    compute-sanitizer --tool memcheck python tests/backends/triton/run_small_grid.py
    compute-sanitizer --tool racecheck python tests/backends/triton/run_small_grid.py --share 3

The tests compare the same calls with the definition; under the sanitizer that takes most of the time, so here they
only run: forward and backward of the training cases, lists and dense tiles side by side, and decoding.
"""

from __future__ import annotations

import argparse
from unittest.mock import patch

import torch

from hf_asentmax import entmax_attention
from hf_asentmax.backends.triton import planning
from hf_asentmax.backends.triton.common import launching
from hf_asentmax.backends.triton.decode import launch as decode_launch

from kernel_cases import SMALL_CASES, Case, options, tensors
from test_decode import SMALL as DECODING
from test_regimes import mixed

LISTS = [
    Case("lists", q_len=256, kv_len=290, heads=2, kv_heads=1, head_dim=16),
    Case("lists-half", q_len=300, heads=2, head_dim=32, dtype=torch.float16, alibi=True),
    Case("lists-left", q_len=260, batch=2, head_dim=16, mask="left"),
]
FLAT = [
    Case("flat", q_len=1, kv_len=1300, heads=4, kv_heads=2, kind="near-uniform", dtype=torch.float16),
    Case("flat-alibi", q_len=2, kv_len=1300, heads=4, kv_heads=2, kind="near-uniform", alibi=True),
]


def trained(case: Case, device: str, inputs: list[torch.Tensor]) -> None:
    """Forward and backward."""
    *leaves, grad = inputs
    leaves = [tensor.detach().requires_grad_() for tensor in leaves]
    torch.autograd.grad(entmax_attention(*leaves, backend="triton", **options(case, device)), leaves, grad)


@torch.no_grad()
def decoded(case: Case, device: str) -> None:
    """One call of the decoding kernels."""
    query, key, value, _ = tensors(case, device)
    entmax_attention(query, key, value, backend="triton", **options(case, device))


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=int, default=1, help="only one of so many cases of training (default: all)")
    share = parser.parse_args(arguments).share
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ran = 0
    for case in SMALL_CASES[::share]:
        trained(case, device, tensors(case, device))
        ran += 1
    with patch.object(planning, "LISTS_FROM", 128):
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            for case in LISTS:
                launching.forget()
                trained(case, device, mixed(case, device))
                ran += 1
    torch.use_deterministic_algorithms(False)
    for case in DECODING[::share]:
        decoded(case, device)
        ran += 1
    with patch.object(decode_launch, "_SHORT_TILES", 4), patch.object(decode_launch, "_MOST_TILES_LISTED", 4):
        for case in FLAT:
            launching.forget()
            decoded(case, device)
            ran += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"ran {ran} calls on {device}")


if __name__ == "__main__":
    main()
