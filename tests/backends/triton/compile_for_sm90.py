"""Compiles the kernels of some calls for sm_90 on a machine without a GPU; run by test_compiles.py, in its own process.

Triton is told of a target instead of a device, and launches only compile: the results are never computed.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hf_asentmax.backends.triton import row_products_kernel
from hf_asentmax.backends.triton.common.launching import Launcher
from hf_asentmax.backends.triton.decode import launch as decode_launch

from calls import triton_attention

SHARED_MEMORY = 227 * 1024  # of one program on sm_90, in bytes


class TargetOnly:
    """The part of a Triton driver that compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


lines_of_code: dict[str, int] = {}  # of the kernels compiled last


def compile_only(function: JITFunction, grid: Any) -> Any:
    def launch(*args: Any, **options: Any) -> None:
        compiled = function.warmup(*args, grid=(1,), **options)
        lines_of_code[function.__name__] = compiled.asm["ptx"].count("\n")
        assert compiled.metadata.shared <= SHARED_MEMORY, (function.__name__, compiled.metadata.shared)
        print(function.__name__)

    return launch


def main() -> None:
    driver.set_active(TargetOnly())
    JITFunction.__getitem__ = compile_only
    for length, head_dim, dtype, alibi in (
        (6200, 64, torch.bfloat16, False),
        (6200, 128, torch.bfloat16, True),
        (100, 32, torch.bfloat16, False),
        (200, 64, torch.float16, False),
    ):
        inputs = [torch.randn(1, 2, length, head_dim, dtype=dtype).requires_grad_() for _ in range(3)]
        slopes = torch.tensor([1.0, 0.0]) if alibi else None
        triton_attention(*inputs, alpha=1.5, scale=0.1, is_causal=True, alibi_slopes=slopes).sum().backward()
    with torch.no_grad():  # the same kernels, which keep nothing for a backward pass
        alone = torch.randn(1, 2, 6200, 64, dtype=torch.bfloat16)
        triton_attention(alone, alone, alone, alpha=1.5, scale=0.1, is_causal=True)

    # A mask must not make Triton lay out the scores by its load: that made three to five times as much code, and slow
    for length in (100, 500):
        inputs = [torch.randn(1, 2, length, 32, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
        sizes = []
        for shape in ((), (1, length), (1, 1, length, length)):
            mask = torch.ones(shape, dtype=torch.bool) if shape else None
            causal = len(shape) < 4
            output = triton_attention(*inputs, alpha=1.5, scale=0.1, is_causal=causal, attention_mask=mask)
            output.sum().backward()
            sizes.append(dict(lines_of_code))
        for masked, most in zip(sizes[1:], (1.5, 2.3), strict=True):
            assert all(masked[name] < most * size for name, size in sizes[0].items()), (length, sizes)

    rows = torch.randn(2, 91, 4, 32, dtype=torch.bfloat16).transpose(1, 2)
    row_products_kernel.launch(Launcher(rows.device), rows, rows)

    decode_launch._overlaps = lambda device: True  # as on the GPU that this compiles for
    for head_dim, heads, kv_heads, kv_len, alibi, mask in (
        (128, 8, 2, 131072, False, None),
        (128, 8, 2, 131072, True, None),
        (128, 8, 2, 32768, True, (1, 1, 1, 32768)),
        (64, 4, 4, 3000, False, (1, 3000)),
    ):
        query = torch.randn(1, heads, 1, head_dim, dtype=torch.bfloat16)
        cache = torch.randn(1, kv_heads, kv_len, head_dim, dtype=torch.bfloat16)
        triton_attention(
            query,
            cache,
            cache,
            alpha=1.5,
            scale=0.1,
            is_causal=mask is None or len(mask) == 2,
            alibi_slopes=torch.ones(heads) if alibi else None,
            key_norm_bound=torch.ones(1, kv_heads) if alibi else None,
            attention_mask=None if mask is None else torch.ones(mask, dtype=torch.bool),
        )


if __name__ == "__main__":
    main()
