"""Records a call's kernel launches and replays them for equal calls.

Triton looks at every argument of every launch to find the compiled kernel, and Python plans the launches. That costs
the host about a millisecond a call, more than many calls take on the GPU. The result depends only on shapes, strides,
types, alignment and options. So the second of several equal calls records its new tensors and launches, and later calls
repeat them with other addresses.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["Launcher", "forget", "on_device", "run", "signature_of"]

_REMEMBERED_CALLS = 512
_ALIGNMENT = 512  # bytes, as PyTorch's own allocations


class Launcher:
    """Makes the tensors of a call and launches its kernels, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A new contiguous tensor."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A new contiguous tensor of zeros."""
        return torch.zeros(tuple(shape), dtype=dtype, device=self.device)

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new tensor, laid out as another."""
        return torch.empty_like(tensor)

    def torch(self, function: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        """function(*tensors), where function is of PyTorch's operations and returns None or one new tensor."""
        return function(*tensors)

    def __call__(self, kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        """kernel[(programs,)](*arguments, **options)"""
        kernel[(programs,)](*arguments, **options)


class _Place(NamedTuple):
    """An address: bytes after the beginning of a buffer."""

    buffer: int
    offset: int


class _View(NamedTuple):
    place: _Place
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Kernel(NamedTuple):
    """A launch: `values` in the kernel's order, without addresses. `places` has these, and `within` those in tuples."""

    compiled: Any  # triton.compiler.CompiledKernel
    grid: tuple[int, int, int]
    values: list[Any]
    places: list[tuple[int, _Place]]
    within: list[tuple[int, list[Any], list[tuple[int, _Place]]]]


class _Operation(NamedTuple):
    """A PyTorch operation; `result` is the buffer that it makes, or None."""

    function: Callable[..., Any]
    views: list[_View]
    result: int | None


class _New(NamedTuple):
    buffer: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    zero: bool


class _Recorder(Launcher):
    """Launches and keeps a record. Buffers are numbered: the call's tensors come first, then the new ones."""

    def __init__(self, device: torch.device, tensors: Sequence[torch.Tensor | None]) -> None:
        super().__init__(device)
        self.count = len(tensors)
        self.steps: list[_Kernel | _Operation] = []
        self.new: dict[int, _New] = {}
        self.made_at: dict[int, int] = {}
        self.last_use: dict[int, int] = {}
        self.bytes: dict[int, int] = {}
        self.numbers: dict[int, int] = {}  # of the new tensors, by id; the latest of those with the same id lives
        self.aliases: list[tuple[int, int, int]] = []
        self.complete = True  # false in the interpreter, which compiles nothing that could be launched again
        # The record keeps no tensor alive. If a storage's address comes back, the earlier tensor is gone.
        self._owners: dict[int, tuple[int, int]] = {}  # address of a storage -> (buffer, its address)
        for index, tensor in enumerate(tensors):
            if tensor is not None and tensor.numel():
                storage, address = tensor.untyped_storage().data_ptr(), tensor.data_ptr()
                owner, begin = self._owners.setdefault(storage, (index, address))
                if owner != index:
                    self.aliases.append((index, owner, address - begin))

    def _register(self, tensor: torch.Tensor, zero: bool = False) -> torch.Tensor:
        index = self.count
        self.count += 1
        self.new[index] = _New(index, tuple(tensor.shape), tensor.stride(), tensor.dtype, zero)
        self.made_at[index] = len(self.steps)
        self.numbers[id(tensor)] = index
        if tensor.numel():
            storage = tensor.untyped_storage()
            self.bytes[index] = storage.nbytes()
            self._owners[storage.data_ptr()] = (index, tensor.data_ptr())
        return tensor

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._register(super().empty(shape, dtype))

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._register(super().zeros(shape, dtype), zero=True)

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._register(super().empty_like(tensor))

    def _place(self, tensor: torch.Tensor) -> _Place:
        owner = self._owners.get(tensor.untyped_storage().data_ptr())
        if owner is None:
            self.complete = False
            message = (
                "hf_asentmax cannot repeat a call's launches (a tensor of unknown origin); it stays slower to launch"
            )
            warnings.warn(message, stacklevel=2)
            return _Place(0, 0)
        index, begin = owner
        self.last_use[index] = len(self.steps)
        return _Place(index, tensor.data_ptr() - begin)

    def torch(self, function: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        views = [_View(self._place(t), tuple(t.shape), t.stride(), t.dtype) for t in tensors]
        result = function(*tensors)
        made = isinstance(result, torch.Tensor)
        step = _Operation(function, views, self.count if made else None)
        if made:
            self._register(result)
        self.steps.append(step)
        return result

    def __call__(self, kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        compiled = kernel[(programs,)](*arguments, **options)
        if compiled is None:
            self.complete = False
            return
        values: list[Any] = [*arguments, *(options[name] for name in kernel.arg_names[len(arguments) :])]
        step = _Kernel(compiled, (programs, 1, 1), values, [], [])
        for index, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                if value.numel():
                    step.places.append((index, self._place(value)))
                values[index] = 0
            elif isinstance(value, tuple):
                inner = [0 if isinstance(part, torch.Tensor) else part for part in value]
                found = [(at, part) for at, part in enumerate(value) if isinstance(part, torch.Tensor)]
                places = [(at, self._place(part)) for at, part in found if part.numel()]
                values[index] = tuple(inner)
                if places:
                    step.within.append((index, inner, places))
        self.steps.append(step)


class _Recording:
    """A call's new tensors and launches, to be repeated with other tensors of the same kind."""

    def __init__(self, recorder: _Recorder, results: Sequence[torch.Tensor]) -> None:
        self.device = recorder.device
        self.steps = recorder.steps
        self.aliases = recorder.aliases
        self.results = [recorder.numbers[id(tensor)] for tensor in results]
        self.count = recorder.count
        made = {step.result for step in self.steps if isinstance(step, _Operation)}
        used = {view.place.buffer for step in self.steps if isinstance(step, _Operation) for view in step.views}
        # Tensors that PyTorch has to know are made one by one; the rest is workspace
        known = {index for index, new in recorder.new.items() if index in used or index in self.results or new.zero}
        self.new = [new for index, new in recorder.new.items() if index in known and index not in made]
        workspace = [index for index in recorder.new if index not in known and index not in made]
        self.offsets, self.workspace_bytes = _packed(
            [
                (index, recorder.made_at[index], recorder.last_use[index], recorder.bytes[index])
                for index in workspace
                if index in recorder.last_use  # others are made and never used
            ]
        )

    def repeat(self, tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor] | None:
        """The results; None if tensors that shared a storage in the recorded call lie apart now."""
        addresses: list[int] = [0] * self.count
        buffers: dict[int, torch.Tensor] = {}
        for index, tensor in enumerate(tensors):
            if tensor is not None:
                buffers[index] = tensor
                addresses[index] = tensor.data_ptr()
        for index, other, distance in self.aliases:
            if addresses[index] - addresses[other] != distance:
                return None
        device = self.device
        for number, shape, stride, dtype, zero in self.new:
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            buffers[number] = tensor.zero_() if zero else tensor
            addresses[number] = tensor.data_ptr()
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)
        begin = workspace.data_ptr()
        for number, offset in self.offsets:
            addresses[number] = begin + offset
        with on_device(device):
            stream = _stream(device)
            for step in self.steps:
                if isinstance(step, _Kernel):
                    compiled, grid, template, places, within = step
                    values = template.copy()
                    for at, (number, offset) in places:
                        values[at] = addresses[number] + offset
                    for at, inner, inner_places in within:
                        parts = inner.copy()
                        for part, (number, offset) in inner_places:
                            parts[part] = addresses[number] + offset
                        values[at] = tuple(parts)
                    compiled[grid](*values, stream=stream)
                else:
                    result = step.function(*(_viewed(buffers, view) for view in step.views))
                    if step.result is not None:
                        buffers[step.result] = result
                        addresses[step.result] = result.data_ptr()
        return [buffers[index] for index in self.results]


def _packed(wanted: list[tuple[int, int, int, int]]) -> tuple[list[tuple[int, int]], int]:
    """Offsets in one workspace for (number, first step, last step, bytes), and its size.

    Buffers that are in use in the same step do not overlap.
    """
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first, last
    offsets = []
    for number, first, last, size in sorted(wanted, key=lambda item: -item[3]):
        offset = 0
        for begin, end, other_first, other_last in sorted(placed):
            if other_first <= last and first <= other_last and begin < offset + size and offset < end:
                offset = end
        placed.append((offset, offset + -(-size // _ALIGNMENT) * _ALIGNMENT, first, last))
        offsets.append((number, offset))
    return offsets, max((end for _, end, _, _ in placed), default=0)


def _viewed(buffers: dict[int, torch.Tensor], view: _View) -> torch.Tensor:
    buffer = buffers[view.place.buffer]
    if view.dtype != buffer.dtype:
        buffer = buffer.view(view.dtype)
    offset = buffer.storage_offset() + view.place.offset // view.dtype.itemsize
    return buffer.as_strided(view.shape, view.stride, offset)


def _stream(device: torch.device) -> int:
    from triton.runtime import driver

    return driver.active.get_current_stream(0 if device.index is None else device.index)


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which launches go to this GPU; a null context where they do anyway, and for the interpreter."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def signature_of(
    operation: str, tensors: Sequence[torch.Tensor | None], options: Sequence[Hashable]
) -> tuple[Hashable, ...]:
    """What the launches of a call depend on: its options, deterministic mode, and all of its tensors but the values."""
    return (
        operation,
        torch.are_deterministic_algorithms_enabled(),
        *options,
        *(
            None
            if tensor is None
            else (tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16, tensor.get_device())
            for tensor in tensors
        ),
    )


# None where such a call was made once and not recorded yet.
_remembered: OrderedDict[Hashable, _Recording | None] = OrderedDict()


def forget() -> None:
    """Forgets all calls, for tests that change a constant of the launches."""
    _remembered.clear()


def run(
    operation: str,
    tensors: Sequence[torch.Tensor | None],
    options: Sequence[Hashable],
    body: Callable[[Launcher], Sequence[torch.Tensor]],
) -> Sequence[torch.Tensor]:
    """What `body` returns, or the same from the recorded launches of an equal call.

    Args:
        operation: a name for the body.
        tensors: all tensors whose values or addresses the body uses; the first says where it runs.
        options: whatever else the launches depend on.
        body: makes new tensors and launches through the launcher that it gets, and returns new tensors.

    Returns:
        What `body` returns.
    """
    first = tensors[0]
    assert first is not None
    signature = signature_of(operation, tensors, options)
    recording = _remembered.get(signature)
    if recording is not None:
        repeated = recording.repeat(tensors)
        if repeated is not None:
            return repeated
        _remembered.pop(signature, None)
    if signature not in _remembered:
        results = body(Launcher(first.device))
        _remember(signature, None)
        return results
    recorder = _Recorder(first.device, tensors)
    results = body(recorder)
    if recorder.complete:
        _remember(signature, _Recording(recorder, results))
    return results


def _remember(signature: Hashable, recording: _Recording | None) -> None:
    _remembered[signature] = recording
    while len(_remembered) > _REMEMBERED_CALLS:
        _remembered.popitem(last=False)
