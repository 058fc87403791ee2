"""Launches that remember what an equal call compiled.

Triton looks at every argument of every launch to find the compiled kernel, 25 to 55 microseconds of the host's time:
more than many kernels take the GPU, and a call launches up to 30. What it finds depends on shapes, strides, types,
alignment and options alone, so calls that agree in these launch the same kernels in the same order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch

__all__ = ["Launcher", "forget", "signature_of"]

_REMEMBERED_CALLS = 512


class _Launch(NamedTuple):
    kernel: Any  # JITFunction
    compiled: Any  # triton.compiler.CompiledKernel
    options: tuple[str, ...]  # the arguments given by name, in the kernel's order


_remembered: OrderedDict[Hashable, list[_Launch]] = OrderedDict()


def signature_of(operation: str, tensors: Iterable[torch.Tensor | None], options: Iterable[Hashable]) -> Hashable:
    """What the launches of a call depend on: of its tensors all but their values, its options, deterministic mode."""
    return (
        operation,
        torch.are_deterministic_algorithms_enabled(),
        *options,
        *(
            None
            if tensor is None
            else (tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16, tensor.device.index)
            for tensor in tensors
        ),
    )


def forget() -> None:
    """Forgets all calls: for tests that change a constant of the launches."""
    _remembered.clear()


class Launcher:
    """The launches of one call, in order; on the current device.

    signature: what calls with the same launches share (see signature_of); None: nothing is remembered.
    """

    def __init__(self, signature: Hashable = None) -> None:
        self._signature = signature
        self._known = None if signature is None else _remembered.get(signature)
        self._made: list[_Launch] = []
        self._next = 0

    def __call__(self, kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        """kernel[(programs,)](*arguments, **options)"""
        if self._known is None:
            compiled = kernel[(programs,)](*arguments, **options)
            if self._signature is not None and compiled is not None:  # None: the interpreter compiles nothing
                by_name = tuple(kernel.arg_names[len(arguments) :])
                self._made.append(_Launch(kernel, compiled, by_name))
            return
        known = self._known[self._next]
        self._next += 1
        assert known.kernel is kernel, f"expected a launch of {known.kernel}, got {kernel}"
        known.compiled[(programs, 1, 1)](*arguments, *[options[name] for name in known.options])

    def done(self) -> None:
        """The call has launched all that it launches: equal calls may go by it."""
        if self._made:
            _remembered[self._signature] = self._made
            while len(_remembered) > _REMEMBERED_CALLS:
                _remembered.popitem(last=False)
