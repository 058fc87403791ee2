"""Compile the tile sizes that adasplash v2 tries, by several processes at once, into Triton's cache.

    python recipes/benchmark/adasplash_tiles.py --processes 8      # needs a CUDA GPU and adasplash; about two minutes
    python recipes/benchmark/attention.py --methods ours "adasplash v2"

For each length and head dimension adasplash v2 compiles 30 candidates of each of its kernels, one after the other, and
keeps the fastest. attention.py finds them compiled after this, and only times them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from recipes.benchmark.attention import HEADS, ONLY_AT, TOKENS


def compile_share(share: int, shares: int, lengths: list[int], head_dims: list[int]) -> None:
    """Every `shares`-th candidate of each kernel, from `share` on."""
    import adasplash.adasplash_v2 as kernels
    from adasplash import adasplash_v2
    from triton import TritonError
    from triton.runtime.autotuner import Autotuner

    def compiled_only(call: Any, quantiles: Any = None) -> list[float]:
        call()
        return [1.0, 1.0, 1.0]

    for tuner in vars(kernels).values():
        if isinstance(tuner, Autotuner):
            tuner.configs = tuner.configs[share::shares] or tuner.configs[:1]
            tuner._do_bench = compiled_only
    for head_dim in head_dims:
        for length in lengths:
            shape = (max(1, TOKENS // length), HEADS, length, head_dim)
            inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
            try:
                adasplash_v2(*inputs)  # another kernel than with a backward pass
                adasplash_v2(*(tensor.requires_grad_() for tensor in inputs)).sum().backward()
                torch.cuda.synchronize()
            except (RuntimeError, TritonError) as error:  # a candidate that does not fit
                print(f"share {share}, {length} x {head_dim}: {type(error).__name__}: {str(error)[:120]}", flush=True)


def main() -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(ONLY_AT["adasplash v2"]))
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--share", type=int, help="do this share alone, in this process")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU here: adasplash's kernels compile for one alone")
    if arguments.share is not None:
        compile_share(arguments.share, arguments.processes, arguments.lengths, arguments.head_dims)
        return
    command = [sys.executable, *sys.argv, "--processes", str(arguments.processes), "--share"]
    running = [subprocess.Popen([*command, str(share)]) for share in range(arguments.processes)]
    failed = [share for share, process in enumerate(running) if process.wait() != 0]
    if failed:
        sys.exit(f"shares {failed} failed; what they would have compiled, attention.py compiles itself")


if __name__ == "__main__":
    main()
