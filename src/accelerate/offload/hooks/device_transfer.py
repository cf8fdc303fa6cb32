"""Copies weights from CPU memory to a device while the device computes, on a side stream and through pinned buffers.

A `TransferStream` serves one device; the one for the CPU copies nothing.

Races are avoided as follows, for each weight:

- Its memory is allocated on the copy stream, so the compute stream waits for the event after the copy before it reads.
- `record_stream` is called with the compute stream before the first read. The allocator returns the memory to the pool of
  the copy stream, which never waits; this keeps it from reusing the memory before the compute stream is done with it.
- A pinned buffer is refilled only after the event of the last copy out of it.
- A copy starts after the event of an earlier layer (`mark`); otherwise copies would run ahead and fill the device.

Only the prefetch thread blocks on the device; the caller of the forward makes its stream wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...runtime.devices import device_kind
from ..io.mmap_reader import ReadInterruptedError, Stop

_BUFFER = 32 << 20
_BUFFERS = 2
# Device types whose torch module has streams and pinned memory like CUDA's, with the options of an event on which the host
# sleeps instead of spinning.
_WITH_STREAMS: dict[str, dict[str, Any]] = {"cuda": {"blocking": True}, "xpu": {}}


class PendingTransfer:
    """Weights whose copy to a device may not have finished.

    Args:
        values: The weights by name.
        device: The target device; None: the weights are in place.
        ready: Event after which the weights may be used; None: at once.
        copies: Weights in memory allocated on the copy stream.
    """

    def __init__(
        self,
        values: dict[str, torch.Tensor],
        device: torch.device | None = None,
        ready: Any | None = None,
        copies: Sequence[torch.Tensor] = (),
    ) -> None:
        self._values = values
        self._device = device
        self._ready = ready
        self._copies = copies

    def wait(self) -> dict[str, torch.Tensor]:
        """Makes the device's current stream wait for the copies, and returns the weights."""
        if self._ready is not None:
            assert self._device is not None
            stream = _module(self._device).current_stream(self._device)
            stream.wait_event(self._ready)
            for copy in self._copies:  # listed rather than compared by device: "cuda" equals no tensor's device
                copy.record_stream(stream)
        return self._values


class TransferStream:
    """Transfers to the CPU, and to devices without streams: weights stay where they are.

    Attributes:
        copies: Whether weights are copied.
    """

    copies = False

    def mark(self) -> Any:
        """Returns an event for the work queued on the device so far; called by the thread that computes."""
        return None

    def copy_async(self, values: dict[str, torch.Tensor], mark: Any, stop: Stop) -> PendingTransfer:
        """Starts to copy weights to the device; called by the prefetch thread.

        Args:
            values: The weights by name.
            mark: Event to wait for first; the memory of the layers before it is free then.
            stop: Checked between chunks; returns true to interrupt.
        """
        return PendingTransfer(values)


class DeviceTransferStream(TransferStream):
    """Transfers to a device with streams, on a stream of its own and from pinned memory.

    Weights in pinned memory are copied directly; others pass through a ring of pinned buffers.

    Args:
        device: The device, with its index.
    """

    copies = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = _module(device)
        self._stream = self._module.Stream(device=device)
        self._ring: PinnedRingBuffer | None = None

    def mark(self) -> Any:
        """See `TransferStream.mark`."""
        mark = self._event()
        mark.record(self._module.current_stream(self._device))
        return mark

    def _event(self) -> Any:
        """Creates an event on which the host can wait."""
        return self._module.Event(**_WITH_STREAMS[self._device.type])

    def copy_async(self, values: dict[str, torch.Tensor], mark: Any, stop: Stop) -> PendingTransfer:
        """See `TransferStream.copy_async`."""
        mark.synchronize()
        if stop():
            raise ReadInterruptedError
        with self._module.stream(self._stream):
            moved = {name: self._copied(value, stop) for name, value in values.items()}
            ready = self._module.Event()
            ready.record(self._stream)
        copies = [value for name, value in moved.items() if value is not values[name]]
        return PendingTransfer(moved, self._device, ready, copies)

    def _copied(self, value: torch.Tensor, stop: Stop) -> torch.Tensor:
        """Copies a value to memory allocated on the current stream; returns it unchanged if it is no plain CPU tensor."""
        if value.device.type != "cpu" or type(value) not in (torch.Tensor, torch.nn.Parameter):
            return value
        value = value.detach()
        if value.is_pinned():
            return value.to(self._device, non_blocking=True)
        if not value.is_contiguous() or not value.numel():
            return value.to(self._device)
        if self._ring is None:
            self._ring = PinnedRingBuffer(
                [torch.empty(_BUFFER, dtype=torch.uint8, pin_memory=True) for _ in range(_BUFFERS)], self._event
            )
        target = torch.empty(value.shape, dtype=value.dtype, device=self._device)
        self._ring.copy(value, target, self._stream, stop)
        return target


class PinnedRingBuffer:
    """Pinned buffers that are filled in turn; each is refilled only after the copies out of it are done.

    Small tensors share a buffer. If each took its own, the host would wait for the copy of every large one before it could
    fill the next buffer.

    Args:
        buffers: Flat byte tensors of equal size.
        make_event: Creates an event.
    """

    def __init__(self, buffers: list[torch.Tensor], make_event: Callable[[], Any]) -> None:
        self._buffers = buffers
        self._events = [make_event() for _ in buffers]  # the last copy out of each
        self._turn = 0
        self._used = 0  # bytes in use of the current buffer

    def copy(self, source: torch.Tensor, target: torch.Tensor, stream: Any, stop: Stop) -> None:
        """Copies a tensor through the buffers.

        Args:
            source: Contiguous CPU tensor.
            target: Contiguous tensor on a device, of the same shape and dtype.
            stream: The device's current stream, on which the copies run.
            stop: Checked between chunks; returns true to interrupt.

        Raises:
            ReadInterruptedError: if `stop` returned true.
        """
        from_bytes, to_bytes = source.reshape(-1).view(torch.uint8), target.view(-1).view(torch.uint8)
        room = len(self._buffers[0])
        start = 0
        while start < len(from_bytes):
            if stop():
                raise ReadInterruptedError
            if self._used == room:
                self._turn, self._used = (self._turn + 1) % len(self._buffers), 0
                self._events[self._turn].synchronize()
            piece = from_bytes[start : start + room - self._used]
            part = self._buffers[self._turn][self._used : self._used + len(piece)]
            part.copy_(piece)
            to_bytes[start : start + len(piece)].copy_(part, non_blocking=True)
            self._events[self._turn].record(stream)
            self._used += len(piece)
            start += len(piece)


def stream_to(device: torch.device | None) -> TransferStream:
    """Returns the transfer stream of a device (with an index); None stands for CPU memory."""
    return DeviceTransferStream(device) if device is not None and device.type in _WITH_STREAMS else TransferStream()


def _module(device: torch.device) -> Any:
    return device_kind(device).torch_module()
