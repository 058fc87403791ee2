"""Makes calls again and again for sm_90 on a machine without a GPU; run by test_launching.py, in its own process.

Nothing is computed: what is launched is compared. The first and the second call launch in the ordinary way, the second
keeps a record, the third and fourth repeat it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compile_for_sm90 import TargetOnly
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hf_asentmax.backends.triton.common import launching

from calls import triton_attention

launches: list[Any] = []
looked_up: list[str] = []
kept: list[torch.Tensor] = []  # what recorded calls made, so that no address comes back
Results = list[torch.Tensor]


def flat(argument: Any) -> list[Any]:
    """An argument's parts, tensors as ("address", number), what is compiled in as its value."""
    if isinstance(argument, tuple):
        return [part for each in argument for part in flat(each)]
    if isinstance(argument, torch.Tensor):
        return [("address", argument.data_ptr())]
    return [getattr(argument, "value", argument)]


def run(self: CompiledKernel) -> Callable[..., None]:
    def launch(x: int, y: int, z: int, stream: int, function: Any, metadata: Any, *rest: Any) -> None:
        arguments = rest[3:]  # after launch_metadata and the two hooks
        launches.append(((self.name, x, y, z, metadata), [part for each in arguments for part in flat(each)]))

    return launch


def counted(function: JITFunction, grid: Any) -> Any:
    def launch(*arguments: Any, **options: Any) -> Any:
        looked_up.append(function.__name__)
        return function.run(*arguments, grid=grid, warmup=False, **options)

    return launch


def registered(self: Any, tensor: torch.Tensor, zero: bool = False) -> torch.Tensor:
    kept.append(tensor)
    return register(self, tensor, zero)


register = launching._Recorder._register
launching._Recorder._register = registered
driver.set_active(TargetOnly())
CompiledKernel._init_handles = lambda self: None
CompiledKernel.run = property(run)
JITFunction.__getitem__ = counted


def check_same(
    name: str, ordinary: tuple[list[Any], Results, Results], repeated: tuple[list[Any], Results, Results]
) -> None:
    """The same kernels and numbers; addresses of inputs and results where they are now, of workspace in one memory."""
    first, inputs, results = ordinary
    second, new_inputs, new_results = repeated
    assert [launch[0] for launch in first] == [launch[0] for launch in second], name
    known = {
        old.data_ptr(): new.data_ptr()
        for old, new in zip([*inputs, *results], [*new_inputs, *new_results], strict=True)
        if old.numel()
    }
    seen: dict[int, int] = {}
    uses: dict[int, list[int]] = {}
    for step, ((_, before), (_, after)) in enumerate(zip(first, second, strict=True)):
        assert len(before) == len(after), name
        for old, new in zip(before, after, strict=True):
            if isinstance(old, tuple):
                address = old[1]
                assert isinstance(new, int) and new % 16 == address % 16, (name, old, new)
                assert known.get(address, new) == new, (name, "an input or a result elsewhere")
                if address:
                    assert seen.setdefault(address, new) == new, (name, "one memory at two addresses")
                    uses.setdefault(address, []).append(step)
            else:
                assert old == new, (name, old, new)
    for one, at in seen.items():
        for other, at_other in seen.items():
            apart = uses[one][-1] < uses[other][0] or uses[other][-1] < uses[one][0]
            assert one == other or at != at_other or apart, (name, "two memories at one address while both in use")


def again(name: str, call: Callable[[Results], Results], make: Callable[[], Results]) -> None:
    runs = []
    kept.clear()
    for _ in range(4):
        launches.clear()
        looked_up.clear()
        inputs = make()
        results = call(inputs)
        runs.append((list(launches), inputs, results, len(looked_up)))
    assert [count > 0 for *_, count in runs] == [True, True, False, False], (name, [count for *_, count in runs])
    for repeated in runs[2:]:
        check_same(name, runs[1][:3], repeated[:3])
    print(name, len(runs[0][0]))


def trained(length: int, head_dim: int, *, offset: int = 0, fused: bool = False, **options: Any) -> None:
    """Forward and backward passes; offset: elements from the beginning of the memory to a tensor's first."""

    def make() -> Results:
        if fused:  # query, key and value beside each other, as one projection gives them
            parts = torch.randn(1, length, 3, 2, head_dim, dtype=torch.bfloat16).transpose(1, 3).unbind(2)
        else:
            memory = torch.randn(3, 2 * length * head_dim + offset, dtype=torch.bfloat16)
            parts = tuple(part[offset:].view(1, 2, length, head_dim) for part in memory)
        grad = torch.randn(1, length, 2, head_dim, dtype=torch.bfloat16).transpose(1, 2)
        return [*(part.detach().requires_grad_() for part in parts), grad]

    def call(tensors: Results) -> Results:
        *inputs, grad = tensors
        output = triton_attention(*inputs, alpha=1.5, scale=0.1, is_causal=True, **options)
        return [output, *torch.autograd.grad(output, inputs, grad)]

    name = options.pop("name")
    again(name, call, make)


def decoded() -> None:
    def make() -> Results:
        return [torch.randn(1, 2, length, 64, dtype=torch.bfloat16) for length in (1, 600, 600)]

    again("decode", lambda inputs: [triton_attention(*inputs, alpha=1.5, scale=0.1, is_causal=True)], make)


trained(100, 32, name="head")
trained(100, 32, offset=3, name="odd-alignment")
trained(100, 32, fused=True, name="fused")
trained(200, 32, name="short")
trained(700, 32, alibi_slopes=torch.tensor([1.0, 0.0]), name="dense")
trained(100, 32, attention_mask=torch.ones(1, 100, dtype=torch.bool), name="padded")
trained(6200, 64, name="lists")
decoded()
torch.use_deterministic_algorithms(True)
trained(6200, 64, name="deterministic")
torch.use_deterministic_algorithms(False)

# One tensor for all three, then three: what was recorded holds for neither place
launching.forget()
one = torch.randn(1, 2, 100, 32, dtype=torch.bfloat16)
three = [one.clone() for _ in range(3)]
for inputs in ([one] * 3, [one] * 3, [one] * 3, three):
    launches.clear()
    triton_attention(*inputs, alpha=1.5, scale=0.1, is_causal=True)
    flags = [part[1] if isinstance(part, tuple) else part for part in launches[0][1]]
    assert all(tensor.data_ptr() in flags for tensor in inputs)
print("aliases", len(launches))
