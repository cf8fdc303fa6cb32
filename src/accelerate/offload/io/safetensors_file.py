"""Safetensors files, with the header validated against the length of the file and the tensors mapped from it.

Nothing is read before it is used. The mapping is private: a write to a tensor copies its pages, and the file is unchanged.
The safetensors library maps files likewise; reading the header once for all tensors makes this faster.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...runtime.system.file_names import parse_json, require_regular_file, short_repr
from ..sizes import is_shape
from .mmap_reader import Span

_LARGEST_HEADER = 100_000_000  # as in the safetensors library

FORMATS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class SafetensorsFile(Mapping[str, torch.Tensor]):
    """Maps names to the tensors of a safetensors file.

    Args:
        path: The file.

    Attributes:
        path: The file.
        shapes: Shapes by name.

    Raises:
        OSError, ValueError: if the file cannot be read, or its header is damaged or does not cover the data exactly.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        require_regular_file(path)
        self._identity = _identity(path)
        self._size = path.stat().st_size
        header, self._start = _read_header(path, self._size)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[int, int, str]] = {}
        for name, entry in header.items():
            self.shapes[name], self._places[name] = _entry_span(name, entry)
        _check_spans(sorted(self._places.values()), self._size - self._start)
        self._storage: Any = None
        for name, (_, _, kind) in self._places.items():
            if kind not in FORMATS:
                self._by_the_library(name)  # raises for a dtype that the library does not support either

    def spans(self) -> dict[str, Span]:
        """Returns the span of each tensor, except those that only the library can read."""
        return {
            name: Span(self._start + begin, self._start + end, FORMATS[kind], self.shapes[name])
            for name, (begin, end, kind) in self._places.items()
            if kind in FORMATS and sys.byteorder == "little"
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        begin, end, kind = self._places[name]
        if kind not in FORMATS or sys.byteorder == "big":
            return self._by_the_library(name)
        empty, shape = torch.empty(0, dtype=FORMATS[kind]), self.shapes[name]
        if begin == end:
            return empty.reshape(shape)
        whole: Any = self._storage
        if whole is None:
            if _identity(self.path) != self._identity:  # the header may not match the file any more
                raise RuntimeError(
                    f"{self.path} was changed or replaced while a model has weights in it. Keep the file unchanged while "
                    "the model is in use, or load the model again."
                )
            whole = self._storage = torch.UntypedStorage.from_file(os.fspath(self.path), False, self._size)
        # Each tensor has its own storage, so that copying, saving or comparing one does not involve the whole file.
        part = whole[self._start + begin : self._start + end]
        return empty.set_(part, 0, shape)  # type: ignore[call-overload,no-any-return]

    def _by_the_library(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        library: Any = safe_open
        with library(self.path, framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _identity(path: Path) -> tuple[int, ...]:
    """Returns numbers that differ between files and between versions of one file."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """Reads the header; returns its entries and the offset of the data."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"its header should end at byte {8 + length}, and it has {size} bytes")
        if length > _LARGEST_HEADER:
            raise ValueError(f"its header has {length} bytes, more than the {_LARGEST_HEADER} that the format allows")
        text = file.read(length)
    header = parse_json(text) if text[:1] == b"{" else None
    if not isinstance(header, dict):
        raise ValueError("it does not start with a safetensors header")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise ValueError(
            f"the '__metadata__' of its header is {short_repr(notes)}; expected a mapping of names to strings"
        )
    return header, 8 + length


def _entry_span(name: str, entry: Any) -> tuple[tuple[int, ...], tuple[int, int, str]]:
    """Parses a header entry; returns the shape, and the begin, end and dtype of the data."""
    try:
        (begin, end), shape, kind = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"its header has no dtype, shape and offsets for {name!r}") from None
    offsets = all(type(number) is int and 0 <= number < 2**63 for number in (begin, end))
    if not isinstance(kind, str) or not offsets or not is_shape(shape):
        raise ValueError(f"its header has no usable dtype, shape and offsets for {name!r}")
    dtype = FORMATS.get(kind)
    if dtype is not None and end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} has {end - begin} bytes, which does not match its shape {shape} in {kind}")
    return shape, (begin, end, kind)


def _check_spans(places: list[tuple[int, int, str]], size: int) -> None:
    """Raises ValueError if the sorted spans overlap or do not cover the data exactly."""
    reached = 0
    for begin, end, _ in places:
        if begin != reached or end < begin:
            raise ValueError(f"its tensors overlap or leave a gap at byte {reached} of the data")
        reached = end
    if reached != size:
        raise ValueError(f"its tensors take {reached} bytes, but the data has {size}")
