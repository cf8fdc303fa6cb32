"""Broadcasts batches from rank 0: one byte buffer per step, without pickle.

A message is ``[header][tensor bytes][scalars][spec]``. The spec (containers, dtypes, shapes) is sent only if it differs
from the previous one. All ranks hold buffers of the same size; before a message that does not fit, rank 0 broadcasts a
header with the new size.
"""

from __future__ import annotations

import functools
import importlib
import struct
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from ...runtime.collective_backend import Collectives
from ...runtime.tensors.pytree import is_namedtuple
from .batch_sharding import StepSizes

# kind, last step, -, bytes of the spec, of scalars and of tensors, new buffer size, rows of data
_HEADER = struct.Struct("<BBHIQQQq")
_ALIGNMENT = 64  # bytes reserved for the header, and alignment of every tensor
_SAME, _NEW, _END, _ERROR, _RESIZE = range(1, 6)
_SCALARS = frozenset({str, int, float, bool, bytes, type(None)})
_HISTORY = 16  # number of messages after which a buffer that is too large shrinks


class CannotDispatchError(TypeError):
    """A batch holds an object that cannot be broadcast to other ranks."""


class ReadingRankError(RuntimeError):
    """Reading failed on rank 0, which reads for all ranks."""


@dataclass(frozen=True)
class DispatchedStep:
    """One step of this rank.

    Attributes:
        batch: The batch of this rank.
        rows: Rows of data on all ranks; None if unknown.
        step_sizes: The `StepSizes` of the step.
        last: Whether it is the last step.
    """

    batch: Any
    rows: int | None
    step_sizes: StepSizes | None
    last: bool


@dataclass(frozen=True)
class Message:
    """A message of one step, before rank 0 broadcasts it."""

    spec: list[Any]
    spec_bytes: bytes
    tensors: list[torch.Tensor]
    value_bytes: bytes
    rows: int | None
    last: bool


# Flattening ---------------------------------------------------------------------------------------------------------


def flatten(data: Any, tensors: list[torch.Tensor], values: list[Any], path: str = "batch") -> tuple[Any, ...]:
    """Flattens a batch: returns its spec, and appends its tensors and scalars to the two lists, in order.

    Args:
        data: Tensors, numpy arrays, strings, numbers, bytes, None, in lists, tuples, named tuples and mappings.
        tensors: Receives the tensors (and arrays).
        values: Receives the scalars; a list of scalars only is appended as one value.
        path: Path of `data` in the batch, for errors.

    Raises:
        CannotDispatchError: For an object of another type.
    """
    kind = type(data)
    if isinstance(data, torch.Tensor):
        _check_tensor(data, path)
        tensors.append(data)
        return ("t", data.dtype, tuple(data.shape))
    if kind in _SCALARS:
        _check_value(data, path)
        values.append(data)
        return ("v",)
    if isinstance(data, (list, tuple)):
        return _flatten_sequence(data, tensors, values, path)
    if isinstance(data, Mapping):
        keys = list(data)
        if any(type(key) not in _SCALARS for key in keys):
            raise CannotDispatchError(
                _cannot_send(f"{path} is a {kind.__name__} whose keys are not strings or numbers")
            )
        nodes = tuple(flatten(data[key], tensors, values, f"{path}[{key!r}]") for key in keys)
        name = "" if kind is dict else _class_name(data, path)
        return ("d", name, tuple(keys), nodes)
    if isinstance(data, (np.ndarray, np.generic)):
        return _flatten_array(data, tensors, values, path)
    raise CannotDispatchError(_cannot_send(f"{path} is a {kind.__module__}.{kind.__qualname__}"))


def _flatten_sequence(data: Any, tensors: list[torch.Tensor], values: list[Any], path: str) -> tuple[Any, ...]:
    kind = type(data)
    if kind in (list, tuple) and all(type(item) in _SCALARS for item in data):
        for item in data:
            _check_value(item, path)
        values.append(list(data))
        return ("w" if kind is list else "x",)
    nodes = tuple(flatten(item, tensors, values, f"{path}[{index}]") for index, item in enumerate(data))
    if kind in (list, tuple):
        return ("l" if kind is list else "u", nodes)
    return ("n", _class_name(data, path), nodes)


def _flatten_array(data: Any, tensors: list[torch.Tensor], values: list[Any], path: str) -> tuple[Any, ...]:
    if isinstance(data, np.str_):
        values.append(str(data))
        return ("v",)
    try:
        tensor = torch.from_numpy(np.array(data))
    except TypeError:
        raise CannotDispatchError(_cannot_send(f"{path} is a numpy array of dtype {data.dtype}")) from None
    tensors.append(tensor)
    return ("g" if isinstance(data, np.generic) else "a", tensor.dtype, tuple(tensor.shape))


def _check_tensor(tensor: torch.Tensor, path: str) -> None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        raise CannotDispatchError(_cannot_send(f"{path} is a tensor with layout {tensor.layout} on {tensor.device}"))


def _check_value(value: Any, path: str) -> None:
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise CannotDispatchError(_cannot_send(f"{path} holds an integer of more than 64 bits"))


def _cannot_send(found: str) -> str:
    return (
        f"cannot send this batch to the other ranks: {found}. Supported are tensors, numpy arrays of numbers, strings, "
        "numbers, bytes and None, in lists, tuples, named tuples and mappings with such keys. Return these from "
        "collate_fn, or let every rank read its own shard: DataLoaderConfiguration(dispatch_batches=False)."
    )


def _class_name(data: Any, path: str) -> str:
    """Returns the name by which other ranks import the class; imports it here first, so that rank 0 raises."""
    kind = type(data)
    if kind in _class_names:
        return _class_names[kind]
    name = f"{kind.__module__}:{kind.__qualname__}"
    if not (isinstance(data, Mapping) or is_namedtuple(data)) or "<locals>" in name:
        raise CannotDispatchError(_cannot_send(f"{path} is a {name.replace(':', '.')}, which other ranks cannot build"))
    try:
        if find_class(name) is not kind:
            raise LookupError(name)
        if isinstance(data, Mapping):
            kind(dict(data))
    except (ImportError, LookupError, TypeError, AttributeError) as error:
        reason = f"{path} is a {name.replace(':', '.')}, which cannot be built from its items on another rank ({error})"
        raise CannotDispatchError(_cannot_send(reason)) from error
    _class_names[kind] = name
    return name


_class_names: dict[type, str] = {}


@functools.cache
def find_class(name: str) -> Any:
    """Imports the mapping or named tuple class ``module:qualified.name``.

    Raises:
        LookupError: If the name is that of another object.
    """
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    if not (isinstance(found, type) and (issubclass(found, Mapping) or hasattr(found, "_fields"))):
        raise LookupError(f"{name} is not a class of mappings or named tuples")
    return found


def encode_spec(node: Any) -> bytes:
    """Encodes a spec, or a list of specs, as bytes."""
    return msgspec.msgpack.encode(_encodable(node))


def _encodable(node: Any) -> Any:
    if isinstance(node, torch.dtype):
        return str(node).removeprefix("torch.")
    return [_encodable(part) for part in node] if isinstance(node, (tuple, list)) else node


def unflatten(node: Sequence[Any], tensors: Iterator[torch.Tensor], values: Iterator[Any]) -> Any:
    """Rebuilds a batch from its (decoded) spec and its tensors and scalars, in order."""
    tag = node[0]
    if tag == "t":
        return next(tensors)
    if tag in ("v", "w"):
        return next(values)
    if tag == "x":
        return tuple(next(values))
    if tag == "d":
        _, name, keys, nodes = node
        items = {key: unflatten(part, tensors, values) for key, part in zip(keys, nodes, strict=True)}
        return find_class(name)(items) if name else items
    if tag in ("a", "g"):
        array = next(tensors).cpu().numpy()
        return array if tag == "a" else array[()]
    parts = [unflatten(part, tensors, values) for part in node[-1]]
    if tag == "n":
        return find_class(node[1])(*parts)
    return parts if tag == "l" else tuple(parts)


def tensor_specs(node: Sequence[Any]) -> Iterator[tuple[torch.dtype, tuple[int, ...]]]:
    """Yields dtype and shape of the tensors of a (decoded) spec, in order."""
    tag = node[0]
    if tag in ("t", "a", "g"):
        dtype = node[1] if isinstance(node[1], torch.dtype) else getattr(torch, node[1])
        yield dtype, tuple(node[2])
    elif tag in ("d", "l", "u", "n"):
        for part in node[-1]:
            yield from tensor_specs(part)


# Messages -----------------------------------------------------------------------------------------------------------


class BatchBroadcaster:
    """Broadcasts batches from rank 0. All ranks take the same number of steps: rank 0 sends, the others receive.

    Args:
        collectives: Broadcast the bytes.
        staged: Pack messages in host memory and copy them to `collectives.device`; None: if that is not the CPU.
        host_collectives: Broadcast headers, scalars and specs in host memory, so that reading them does not synchronize
            with the device, while `collectives` broadcast the bytes of tensors; None: `collectives` broadcast all.
    """

    def __init__(
        self, collectives: Collectives, staged: bool | None = None, host_collectives: Collectives | None = None
    ) -> None:
        self.collectives = collectives
        self._host_collectives = host_collectives
        self._header_buffer = torch.empty(_ALIGNMENT, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None  # set when the last message has been copied from pinned memory
        self._staged = collectives.device.type != "cpu" if staged is None else staged
        self._spec: Any = None
        self._lengths: deque[int] = deque(maxlen=_HISTORY)
        self._resize(_ALIGNMENT)

    def _resize(self, size: int) -> None:
        self._buffer = torch.empty(size, dtype=torch.uint8, device=self.collectives.device)
        pinned = self._staged and self._buffer.device.type == "cuda"
        self._host_buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned) if self._staged else self._buffer
        self._copied = torch.cuda.Event() if pinned and self._host_collectives is not None else None
        host: Any = self._host_buffer.numpy()
        self._host_bytes = memoryview(host)
        self._views: list[list[torch.Tensor]] | None = None

    # Sending

    def pack(self, parts: Sequence[Any], rows: int | None, step_sizes: StepSizes | None, last: bool) -> Message:
        """Builds the message with the shard of each rank, without sending it.

        Args:
            parts: One batch per shard, in the order of the shards.
            rows: Rows of data in all shards; None if unknown.
            step_sizes: The `StepSizes` of this step.
            last: Whether this is the last step.

        Raises:
            CannotDispatchError: If a batch holds an object that cannot be sent.
        """
        tensors: list[torch.Tensor] = []
        values: list[list[Any]] = [[] for _ in parts]
        spec = [flatten(part, tensors, held) for part, held in zip(parts, values, strict=True)]
        value_bytes = b""
        if step_sizes is not None or any(values):
            value_bytes = msgspec.msgpack.encode(
                [step_sizes and [step_sizes.sizes, step_sizes.rows, step_sizes.counts_batches], values]
            )
        return Message(spec, encode_spec(spec) if spec != self._spec else b"", tensors, value_bytes, rows, last)

    def send(self, message: Message) -> None:
        """Sends a message of `pack`."""
        if message.spec_bytes:
            self._set_spec(message.spec)
        length = _ALIGNMENT + self._tensor_bytes + len(message.value_bytes) + len(message.spec_bytes)
        self._ensure_capacity(length, slack=len(message.value_bytes) // 4)
        if self._copied is not None:
            self._copied.synchronize()
        views = (view for part in self._tensor_views() for view in part)
        for view, tensor in zip(views, message.tensors, strict=True):
            view.copy_(tensor.detach())
        kind = _NEW if message.spec_bytes else _SAME
        self._broadcast_message(
            kind, message.last, message.rows, self._tensor_bytes, message.value_bytes, message.spec_bytes
        )

    def send_end(self) -> None:
        """Sends the end of the data."""
        self._broadcast_message(_END, True)

    def send_error(self, error: Exception) -> None:
        """Sends an error of rank 0, which `receive` raises on the other ranks."""
        text = "".join(traceback.format_exception(error))
        blob = msgspec.msgpack.encode([type(error).__name__, str(error), text])
        self._ensure_capacity(_ALIGNMENT + len(blob), slack=0)
        self._broadcast_message(_ERROR, True, values=blob)

    def _ensure_capacity(self, length: int, slack: int) -> None:
        """Resizes the buffers to hold `length` bytes, or to shrink if they exceed recent messages by far."""
        self._lengths.append(length)
        size = self._host_buffer.numel()
        enough = max(self._lengths)
        shrinks = len(self._lengths) == _HISTORY and size > 2 * (enough + slack) + 4096
        if length > size or shrinks:
            buffer_size = -(-(enough + slack) // _ALIGNMENT) * _ALIGNMENT
            self._broadcast_message(_RESIZE, False, buffer_size=buffer_size)
            self._resize(buffer_size)

    def _broadcast_message(
        self,
        kind: int,
        last: bool,
        rows: int | None = None,
        tensor_bytes: int = 0,
        values: bytes = b"",
        spec: bytes = b"",
        buffer_size: int = 0,
    ) -> None:
        known = -1 if rows is None else rows
        header = kind, last, 0, len(spec), len(values), tensor_bytes, buffer_size, known
        if self._host_collectives is not None:
            self._send_on_host(self._host_collectives, header, values + spec)
            self._send_tensors(tensor_bytes)
            return
        _HEADER.pack_into(self._host_bytes, 0, *header)
        start = _ALIGNMENT + tensor_bytes
        self._host_bytes[start : start + len(values)] = values
        self._host_bytes[start + len(values) : start + len(values) + len(spec)] = spec
        if self._staged:
            self._buffer.copy_(self._host_buffer)
        self.collectives.broadcast(self._buffer, src=0)

    def _send_on_host(self, host_collectives: Collectives, header: tuple[int, ...], text: bytes) -> None:
        _HEADER.pack_into(memoryview(self._header_buffer.numpy()), 0, *header)  # type: ignore[arg-type]
        host_collectives.broadcast(self._header_buffer, src=0)
        if text:
            host_collectives.broadcast(torch.frombuffer(bytearray(text), dtype=torch.uint8), src=0)

    def _send_tensors(self, length: int) -> None:
        if not length:
            return
        buffer = self._buffer[_ALIGNMENT : _ALIGNMENT + length]
        if self._staged:
            buffer.copy_(self._host_buffer[_ALIGNMENT : _ALIGNMENT + length], non_blocking=self._copied is not None)
            if self._copied is not None:
                self._copied.record()
        self.collectives.broadcast(buffer, src=0)

    # Receiving

    def receive(self, index: int) -> DispatchedStep | None:
        """Receives the next message of rank 0.

        Args:
            index: Index of this rank's shard.

        Returns:
            This rank's step, with new tensors on the collectives' device; None at the end of the data.

        Raises:
            ReadingRankError: If rank 0 failed.
        """
        header = self._receive_header()
        kind, last, _, spec_length, value_length, tensor_bytes, buffer_size, rows = _HEADER.unpack(header)
        if kind == _RESIZE:
            self._resize(buffer_size)
            return self.receive(index)
        if kind == _END:
            return None
        text = self._receive_payload(_ALIGNMENT + tensor_bytes, value_length, spec_length)
        payload = text[:value_length]
        if kind == _ERROR:
            name, message, text = msgspec.msgpack.decode(payload)
            raise ReadingRankError(f"rank 0 reads for all ranks, and failed with {name}: {message}\nOn rank 0:\n{text}")
        if kind == _NEW:
            self._set_spec(msgspec.msgpack.decode(text[value_length:]))
        if self._host_collectives is not None and tensor_bytes:
            self.collectives.broadcast(self._buffer[_ALIGNMENT : _ALIGNMENT + tensor_bytes], src=0)
        step_sizes, values = msgspec.msgpack.decode(payload) if payload else (None, None)
        held = iter(values[index] if values else ())
        batch = unflatten(self._spec[index], (view.clone() for view in self._tensor_views()[index]), held)
        step_sizes = step_sizes and StepSizes(tuple(step_sizes[0]), step_sizes[1], step_sizes[2])
        return DispatchedStep(batch, None if rows < 0 else rows, step_sizes, bool(last))

    def _receive_header(self) -> bytes:
        if self._host_collectives is None:
            self.collectives.broadcast(self._buffer, src=0)
            return self._read(0, _HEADER.size)
        self._host_collectives.broadcast(self._header_buffer, src=0)
        return self._header_buffer.numpy().tobytes()[: _HEADER.size]

    def _receive_payload(self, start: int, value_length: int, spec_length: int) -> bytes:
        """Receives the scalars and the spec of a message."""
        length = value_length + spec_length
        if not length or self._host_collectives is None:
            return self._read(start, start + length) if length else b""
        return self._host_collectives.broadcast(torch.empty(length, dtype=torch.uint8), src=0).numpy().tobytes()

    def _read(self, start: int, end: int) -> bytes:
        if self._staged:
            self._host_buffer[start:end].copy_(self._buffer[start:end])
        return bytes(self._host_bytes[start:end])

    # Both

    def _set_spec(self, spec: list[Any]) -> None:
        self._spec = spec
        self._views = None
        self._offsets: list[list[tuple[int, int, torch.dtype, tuple[int, ...]]]] = []
        position = _ALIGNMENT
        for part in spec:
            offsets = []
            for dtype, shape in tensor_specs(part):
                length = dtype.itemsize * int(np.prod(shape))
                offsets.append((position, position + length, dtype, shape))
                position += -(-length // _ALIGNMENT) * _ALIGNMENT
            self._offsets.append(offsets)
        self._tensor_bytes = position - _ALIGNMENT

    def _tensor_views(self) -> list[list[torch.Tensor]]:
        """Returns views of the buffer as the tensors of the current spec, by shard: written by rank 0, read by others."""
        if self._views is None:
            # Rank 0 writes to the staging buffer, other ranks read from the device.
            buffer = self._host_buffer if self.collectives.rank == 0 else self._buffer
            self._views = [
                [buffer[start:end].view(dtype).view(shape) for start, end, dtype, shape in part]
                for part in self._offsets
            ]
        return self._views
