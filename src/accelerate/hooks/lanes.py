"""How weights get from memory to a device while it computes: a stream for copies, and a ring of pinned buffers.

A `Lane` leads to one device. The one to the CPU does nothing, for weights are used where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..placement.mapped import Interrupted, Stop

_BUFFER = 32 << 20
_BUFFERS = 2
# Devices whose module in torch has streams, events and pinned memory as CUDA's has.
_WITH_STREAMS = ("cuda", "xpu")


class Brought:
    """Weights on their way.

    Args:
        values: The weights by name.
        device: Where they go; None: they are there.
        ready: The event after which they can be used; None: now.
    """

    def __init__(
        self, values: dict[str, torch.Tensor], device: torch.device | None = None, ready: Any | None = None
    ) -> None:
        self._values = values
        self._device = device
        self._ready = ready

    def wait(self) -> dict[str, torch.Tensor]:
        """Has the device's current stream wait for the weights, and gives them."""
        if self._ready is not None:
            assert self._device is not None
            stream = torch.get_device_module(self._device).current_stream(self._device)
            stream.wait_event(self._ready)
            for value in self._values.values():
                if value.device == self._device:
                    value.record_stream(stream)  # their memory came from the other stream
        return self._values


class Lane:
    """To the CPU, and to devices that copies cannot run beside: weights are left where they are.

    Attributes:
        copies: Whether it brings them elsewhere.
    """

    copies = False

    def mark(self) -> Any:
        """A point in what the device was told to do so far; called by who computes."""
        return None

    def bring(self, values: dict[str, torch.Tensor], mark: Any, stop: Stop) -> Brought:
        """Starts to bring weights to the device; called by who reads ahead.

        Args:
            values: The weights by name.
            mark: Wait until the device has come this far: what it computed with before is free then.
            stop: Asked between pieces; true gives up.
        """
        return Brought(values)


class StreamLane(Lane):
    """To a device with streams. Copies run on a stream of their own, out of pinned memory.

    Weights that are in pinned memory already are copied from there; others pass through a ring of pinned buffers.

    Args:
        device: The device.
    """

    copies = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream(device=device)
        self._ring: Ring | None = None

    def mark(self) -> Any:
        """See `Lane.mark`."""
        mark = self._module.Event()
        mark.record(self._module.current_stream(self._device))
        return mark

    def bring(self, values: dict[str, torch.Tensor], mark: Any, stop: Stop) -> Brought:
        """See `Lane.bring`."""
        mark.synchronize()  # else copies would run ahead of the computation, and fill the device
        with self._module.stream(self._stream):
            moved = {name: self._copied(value, stop) for name, value in values.items()}
            ready = self._module.Event()
            ready.record(self._stream)
        return Brought(moved, self._device, ready)

    def _copied(self, value: torch.Tensor, stop: Stop) -> torch.Tensor:
        if value.device.type != "cpu" or type(value) not in (torch.Tensor, torch.nn.Parameter):
            return value
        value = value.detach()
        if value.is_pinned():
            return value.to(self._device, non_blocking=True)
        if not value.is_contiguous() or not value.numel():
            return value.to(self._device)
        if self._ring is None:
            self._ring = Ring([torch.empty(_BUFFER, dtype=torch.uint8, pin_memory=True) for _ in range(_BUFFERS)])
        target = torch.empty(value.shape, dtype=value.dtype, device=self._device)
        for event in self._ring.copy(value, target, stop, self._module.Event):
            event.record(self._stream)
        return target


class Ring:
    """Buffers that are used in turns, each only after the copy out of it is done.

    Args:
        buffers: The buffers, flat and of bytes.
    """

    def __init__(self, buffers: list[torch.Tensor]) -> None:
        self._buffers = buffers
        self._events: list[Any | None] = [None] * len(buffers)
        self._turn = 0

    def copy(self, source: torch.Tensor, target: torch.Tensor, stop: Stop, event: Any) -> Iterator[Any]:
        """Copies through the buffers, and yields an event to record after each piece.

        Args:
            source: Where from; contiguous.
            target: Where to; contiguous, of the same shape and format.
            stop: Asked between pieces; true gives up.
            event: Makes an event.
        """
        from_bytes, to_bytes = source.reshape(-1).view(torch.uint8), target.view(-1).view(torch.uint8)
        room = len(self._buffers[0])
        for start in range(0, len(from_bytes), room):
            if stop():
                raise Interrupted
            turn, self._turn = self._turn, (self._turn + 1) % len(self._buffers)
            before = self._events[turn]
            if before is not None:
                before.synchronize()
            piece = from_bytes[start : start + room]
            buffer = self._buffers[turn][: len(piece)]
            buffer.copy_(piece)
            to_bytes[start : start + room].copy_(buffer, non_blocking=True)
            self._events[turn] = event()
            yield self._events[turn]


def lane_to(device: torch.device | None) -> Lane:
    """The lane to a device; None: weights stay where they are."""
    return StreamLane(device) if device is not None and device.type in _WITH_STREAMS else Lane()
