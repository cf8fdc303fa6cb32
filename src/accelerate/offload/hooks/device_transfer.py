"""Copies weights from memory to a device while it computes: a stream for copies, and a ring of pinned buffers.

A `TransferStream` leads to one device; the one to the CPU copies nothing.

Rules that keep this free of races, for each weight:

- Its memory is allocated on the copy stream, so the forward's stream waits for the event behind the copy before it reads.
- `record_stream` names the forward's stream before the first read: the allocator does not reuse the memory before that
  stream is done with it, although the copy stream, to whose pool it returns, never waits.
- A pinned buffer is filled again only after the event behind the last copy out of it.
- A copy starts after the event of an earlier layer (`mark`), or copies would run ahead and fill the device.

Only the thread that reads ahead blocks on the device; the caller of the forward makes its stream wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...runtime.devices import device_kind
from ..io.mmap_reader import ReadInterruptedError, Stop

_BUFFER = 32 << 20
_BUFFERS = 2
# Kinds of device whose module in torch has streams and pinned memory as CUDA's has, and how each makes an event for which
# the host sleeps instead of spinning.
_WITH_STREAMS: dict[str, dict[str, Any]] = {"cuda": {"blocking": True}, "xpu": {}}


class PendingTransfer:
    """Weights on their way.

    Args:
        values: The weights by name.
        device: Where they go; None: they are there.
        ready: The event after which they can be used; None: now.
        copies: Those of them in memory of the stream that copied them.
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
        """Makes the device's current stream wait for the weights, and returns them."""
        if self._ready is not None:
            assert self._device is not None
            stream = _module(self._device).current_stream(self._device)
            stream.wait_event(self._ready)
            for copy in self._copies:  # not chosen by comparing devices: "cuda" equals no tensor's
                copy.record_stream(stream)
        return self._values


class TransferStream:
    """To the CPU, and to devices that copies cannot run beside: weights are left where they are.

    Attributes:
        copies: Whether it brings them elsewhere.
    """

    copies = False

    def mark(self) -> Any:
        """Returns a point in what the device was given to do so far; called by the thread that computes."""
        return None

    def copy_async(self, values: dict[str, torch.Tensor], mark: Any, stop: Stop) -> PendingTransfer:
        """Starts to bring weights to the device; called by the thread that reads ahead.

        Args:
            values: The weights by name.
            mark: Wait until the device has come this far: what it computed with before is free then.
            stop: Asked between pieces; true gives up.
        """
        return PendingTransfer(values)


class DeviceTransferStream(TransferStream):
    """To a device with streams. Copies run on a stream of their own, out of pinned memory.

    Weights that are in pinned memory already are copied from there; others pass through a ring of pinned buffers.

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
        """Makes an event that the host waits for."""
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
        """Returns a copy in memory of the current stream; the value itself where another copies it."""
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
    """Pinned buffers, filled one after the other; each is filled again only after the copies out of it are done.

    Small tensors share a buffer: if each took one, the host would wait for the copy of every large one before it fills
    the next.

    Args:
        buffers: The buffers, flat, of bytes and of one size.
        make_event: Makes an event.
    """

    def __init__(self, buffers: list[torch.Tensor], make_event: Callable[[], Any]) -> None:
        self._buffers = buffers
        self._events = [make_event() for _ in buffers]  # behind the last copy out of each
        self._turn = 0
        self._used = 0  # bytes of the buffer whose turn it is

    def copy(self, source: torch.Tensor, target: torch.Tensor, stream: Any, stop: Stop) -> None:
        """Copies through the buffers.

        Args:
            source: Where from; on the CPU, contiguous.
            target: Where to; on a device, contiguous, of the same shape and dtype.
            stream: The device's current stream, on which the copies run.
            stop: Asked between pieces; true gives up.

        Raises:
            Interrupted: when `stop` returned true.
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
    """Returns the transfer stream of a device (with an index); None: weights stay in CPU memory."""
    return DeviceTransferStream(device) if device is not None and device.type in _WITH_STREAMS else TransferStream()


def _module(device: torch.device) -> Any:
    return device_kind(device).torch_module()
