"""CUDA devices that record the order of streams, made of meta tensors: what a race needs is found without a GPU.

Tensors on a device are meta tensors that report ``cuda:N``. Streams and events have the signatures of torch's. Copies are
taken to be as late as the order allows, so that reading before an event, filling pinned memory before it is free, or freeing
memory that another stream still reads is found whether or not it would have gone wrong.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accelerate.runtime import devices

_REAL_TO, _REAL_COPY, _REAL_EMPTY, _REAL_DEVICE = (
    torch.Tensor.to,
    torch.Tensor.copy_,
    torch.empty,
    torch.Tensor.device,
)


class Stream(torch.Stream):
    """A stream: how many operations it was given, how many the host knows to be done, and what it waits for."""

    machine: Machine

    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Stream:
        index = cls.machine.index_of(device)
        return super().__new__(cls, stream_id=cls.machine.number(), device_index=index, device_type=1)

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.given = self.done = 0
        self.seen: dict[int, int] = {}

    def wait_event(self, event: Any) -> None:
        """Orders what comes next behind an event."""
        if event.stream is not None:
            number = event.stream.stream_id
            self.seen[number] = max(self.seen.get(number, 0), event.at)

    def wait_stream(self, stream: Any) -> None:
        """Orders what comes next behind all that a stream was given."""
        self.seen[stream.stream_id] = stream.given

    def record_event(self, event: Any = None) -> Any:
        """Records an event here."""
        event = self.machine.Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Waits for all of it."""
        self.done = self.given
        self.machine.host_waits.append(threading.current_thread().name)


class Event:
    """An event, with the signature of `torch.cuda.Event`."""

    machine: Machine

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> None:
        self.stream: Stream | None = None
        self.at = 0

    def record(self, stream: Stream | None = None) -> None:
        """Marks the stream's place."""
        self.stream = self.machine.current_stream() if stream is None else stream
        self.at = self.stream.given

    def wait(self, stream: Stream | None = None) -> None:
        """See `Stream.wait_event`."""
        (self.machine.current_stream() if stream is None else stream).wait_event(self)

    def query(self) -> bool:
        """Whether it is over."""
        return self.stream is None or self.stream.done >= self.at

    def synchronize(self) -> None:
        """Waits for it."""
        if self.stream is not None:
            self.stream.done = max(self.stream.done, self.at)
        self.machine.host_waits.append(threading.current_thread().name)


class Machine:
    """So many devices; what is wrong is listed in `problems`.

    Attributes:
        reads: How often weights on a device were read.
        host_waits: The threads that waited for a device, once for each time.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.problems: list[str] = []
        self.reads = 0
        self.host_waits: list[str] = []
        self._numbers = iter(range(1, 1 << 30))
        self._local = threading.local()
        self._memory: dict[int, SimpleNamespace] = {}  # by storage of a tensor on a device
        self._kept: list[Any] = []  # storages, so that no address comes twice
        self._pinned: list[tuple[int, int]] = []
        self._pending: list[tuple[int, int, Stream, int]] = []  # copies out of pinned memory
        self.Stream = type("Stream", (Stream,), {"machine": self})
        self.Event = type("Event", (Event,), {"machine": self})
        self._default = [self.Stream(torch.device("cuda", index)) for index in range(count)]

    # torch.cuda's functions

    def number(self) -> int:
        """A stream's number."""
        return next(self._numbers)

    def index_of(self, device: Any) -> int:
        """A device's index, as torch's own function has it."""
        if device is None:
            return self.current_device()
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        assert device.type == "cuda", device
        return self.current_device() if device.index is None else device.index

    def is_available(self) -> bool:
        """See `torch.cuda`."""
        return self.count > 0

    def device_count(self) -> int:
        """See `torch.cuda`."""
        return self.count

    def current_device(self) -> int:
        """See `torch.cuda`; each thread has its own."""
        return getattr(self._local, "device", 0)

    def current_stream(self, device: Any = None) -> Stream:
        """See `torch.cuda`; each thread has its own."""
        index = self.index_of(device)
        found: Stream = getattr(self._local, "streams", {}).get(index, self._default[index])
        return found

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """See `torch.cuda`."""
        streams, device = dict(getattr(self._local, "streams", {})), self.current_device()
        self._local.streams, self._local.device = {**streams, stream.device_index: stream}, stream.device_index
        try:
            yield
        finally:
            self._local.streams, self._local.device = streams, device

    def empty_cache(self) -> None:
        """See `torch.cuda`."""

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """See `torch.cuda`."""
        return 1 << 34, 1 << 34

    # Tensors

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Takes a tensor's memory to be pinned."""
        self._kept.append(tensor)
        self._pinned.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
        return tensor

    def is_pinned(self, tensor: torch.Tensor, device: Any = None) -> bool:
        """See `torch.Tensor.is_pinned`."""
        return not tensor.is_meta and any(start <= tensor.data_ptr() < stop for start, stop in self._pinned)

    def memory_of(self, tensor: torch.Tensor) -> SimpleNamespace | None:
        """What is known of a tensor on a device; None for others."""
        return self._memory.get(tensor.untyped_storage()._cdata) if tensor.is_meta else None

    def device_of(self, tensor: torch.Tensor) -> torch.device:
        """The device that a tensor reports."""
        found = self.memory_of(tensor)
        real: torch.device = _REAL_DEVICE.__get__(tensor)
        return real if found is None else found.device

    def made(self, shape: Any, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
        """A tensor on a device, in memory of its current stream."""
        index = self.index_of(device)
        stream = self.current_stream(device)
        tensor = _REAL_EMPTY(shape, dtype=dtype, device="meta")
        self._kept.append(tensor.untyped_storage())
        self._memory[tensor.untyped_storage()._cdata] = SimpleNamespace(
            device=torch.device("cuda", index), stream=stream, written=(stream, stream.given), users=set()
        )
        return tensor

    def copied(self, source: torch.Tensor, target: torch.Tensor, non_blocking: bool) -> None:
        """Notes a copy from the host to a device, on the device's current stream."""
        memory = self.memory_of(target)
        assert memory is not None
        stream = self.current_stream(memory.device)
        stream.given += 1
        memory.written = stream, stream.given
        if self.is_pinned(source) and non_blocking:
            start = source.data_ptr()
            self._pending.append((start, start + source.nbytes, stream, stream.given))
        else:
            stream.synchronize()

    def filled(self, tensor: torch.Tensor) -> None:
        """Checks that no copy is under way out of memory that the host writes to."""
        start = tensor.data_ptr()
        for first, last, stream, at in self._pending:
            if first < start + tensor.nbytes and start < last and stream.done < at:
                self.problems.append(f"pinned memory was filled before copy {at} out of it was done")

    def read(self, *tensors: torch.Tensor) -> None:
        """Notes that a kernel on the current stream reads some tensors, and checks that it may."""
        for tensor in tensors:
            memory = self.memory_of(tensor)
            if memory is None:
                self.problems.append(f"a weight is on {tensor.device}, and not on a device")
                continue
            self.reads += 1
            stream, (writer, at) = self.current_stream(memory.device), memory.written
            stream.given += 1
            if writer is not stream and stream.seen.get(writer.stream_id, 0) < at and writer.done < at:
                self.problems.append("a weight was read before the copy of it was done")
            if memory.stream is not stream and stream.stream_id not in memory.users:
                self.problems.append("memory of another stream was read without record_stream")


def install(monkeypatch: pytest.MonkeyPatch, count: int = 1) -> Machine:
    """Has the process see so many CUDA devices, until the end of the test."""
    machine = Machine(count)

    class Kind(devices.DeviceKind):
        def torch_module(self) -> Any:
            return machine

        def is_available(self) -> bool:
            return machine.is_available()

    real = devices.DEVICES["cuda"]
    kind = Kind(real.name, real.distributed_type, real.backends, real.visible_devices)
    monkeypatch.setitem(devices.DEVICES, "cuda", kind)
    monkeypatch.setattr(devices, "_ROWS", tuple(kind if row is real else row for row in devices._ROWS))
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: machine)

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        target = kwargs.get("device", args[0] if args and isinstance(args[0], (int, str, torch.device)) else None)
        here = machine.memory_of(tensor)
        dtype = kwargs.get("dtype", next((each for each in args if isinstance(each, torch.dtype)), tensor.dtype))
        dtype = tensor.dtype if dtype is None else dtype
        target = None if target is None else torch.device("cuda", target) if isinstance(target, int) else target
        kind = None if target is None else torch.device(target).type
        if kind == "cuda":
            there = torch.device("cuda", machine.index_of(target))
            if here is not None and here.device == there and dtype == tensor.dtype:
                return tensor
            moved = machine.made(tensor.shape, dtype, there)
            if here is None:
                machine.copied(tensor, moved, bool(kwargs.get("non_blocking", False)))
            return moved
        if kind == "cpu" and here is not None:
            machine.current_stream(here.device).synchronize()
            return torch.zeros(tensor.shape, dtype=dtype)
        return _REAL_TO(tensor, *args, **kwargs)

    def copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if machine.memory_of(target) is not None:
            machine.copied(source, target, non_blocking)
            return target
        if machine.is_pinned(target):
            machine.filled(target)
        return _REAL_COPY(target, source, non_blocking)

    def empty(*size: Any, pin_memory: bool = False, device: Any = None, dtype: Any = None, **kwargs: Any) -> Any:
        if device is not None and torch.device(device).type == "cuda":
            return machine.made(size[0] if len(size) == 1 else size, dtype, torch.device(device))
        made = _REAL_EMPTY(*size, dtype=dtype, device=device, **kwargs)
        return machine.pin(made) if pin_memory else made

    def record_stream(tensor: torch.Tensor, stream: torch.Stream) -> None:
        assert isinstance(stream, torch.Stream)
        memory = machine.memory_of(tensor)
        assert memory is not None, "only a device's allocator takes it"
        memory.users.add(stream.stream_id)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor, device=None: machine.is_pinned(tensor))
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    monkeypatch.setattr(torch.Tensor, "device", property(machine.device_of))
    monkeypatch.setattr(torch, "empty", empty)
    return machine
