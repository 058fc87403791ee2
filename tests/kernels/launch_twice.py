"""Makes every call twice for sm_90 on a machine without a GPU; run by test_launching.py, in its own process.

Nothing is computed: what would be launched is compared. The second call goes by what the first one compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compile_for_sm90 import TargetOnly
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hf_asentmax.kernels import entmax_attention_triton

launches: list[Any] = []
looked_up: list[str] = []


def described(argument: Any) -> Any:
    """What the launch sees of an argument: of a tensor, all but its place."""
    if isinstance(argument, torch.Tensor):
        return (argument.dtype, argument.shape, argument.stride(), argument.data_ptr() % 16)
    if isinstance(argument, tuple):
        return tuple(described(part) for part in argument)
    return argument


def run(self: CompiledKernel) -> Callable[..., None]:
    def launch(x: int, y: int, z: int, stream: int, function: Any, metadata: Any, *rest: Any) -> None:
        arguments = rest[3:]  # after launch_metadata and the two hooks
        launches.append((self.name, (x, y, z), metadata, tuple(described(argument) for argument in arguments)))

    return launch


def counted(function: JITFunction, grid: Any) -> Any:
    def launch(*arguments: Any, **options: Any) -> Any:
        looked_up.append(function.__name__)
        return function.run(*arguments, grid=grid, warmup=False, **options)

    return launch


driver.set_active(TargetOnly())
CompiledKernel._init_handles = lambda self: None
CompiledKernel.run = property(run)
JITFunction.__getitem__ = counted


def twice(name: str, call: Callable[[], None]) -> None:
    runs = []
    for _ in range(2):
        launches.clear()
        looked_up.clear()
        call()
        runs.append((list(launches), len(looked_up)))
    (first, looked_up_first), (second, looked_up_second) = runs
    assert looked_up_first == len(first) > 0, (name, looked_up_first, len(first))
    assert looked_up_second == 0, (name, looked_up_second)
    assert first == second, (name, first, second)
    print(name, len(first))


def trained(length: int, head_dim: int, *, offset: int = 0, **options: Any) -> Callable[[], None]:
    """A forward and a backward pass; offset: elements from the start of the memory to the first of the query."""
    memory = torch.randn(3, 2 * length * head_dim + offset, dtype=torch.bfloat16)
    inputs = [part[offset:].view(1, 2, length, head_dim).requires_grad_() for part in memory]

    def call() -> None:
        attended = entmax_attention_triton(*inputs, alpha=1.5, scale=0.1, is_causal=True, **options)
        torch.autograd.grad(attended, inputs, torch.randn(1, length, 2, head_dim).bfloat16().transpose(1, 2))

    return call


def decoded() -> None:
    query, key, value = (torch.randn(1, 2, length, 64, dtype=torch.bfloat16) for length in (1, 600, 600))
    entmax_attention_triton(query, key, value, alpha=1.5, scale=0.1, is_causal=True)


twice("single", trained(100, 32))
twice("odd-alignment", trained(100, 32, offset=3))
twice("short", trained(200, 32))
twice("dense", trained(700, 32, alibi_slopes=torch.tensor([1.0, 0.0])))
twice("padded", trained(100, 32, attention_mask=torch.ones(1, 100, dtype=torch.bool)))
twice("lists", trained(6200, 64))
twice("decode", decoded)
