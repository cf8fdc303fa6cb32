"""Reads folders that torch.distributed.checkpoint wrote: what is in them first, then one tensor at a time.

torch's own reader unpickles the description of such a folder without restriction, and values that are no tensors too; this
one takes plain data and nothing else. Nothing needs a process group.
"""

from __future__ import annotations

import io
import math
import operator
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import torch

from ...offload.sizes import is_shape
from ...runtime.system.file_names import (
    MAX_METADATA_BYTES,
    FileNameError,
    file_size,
    path_inside,
    read_bytes,
    short_repr,
)
from ..errors import LoadError, Problem, bullet_list
from ..storage.thread_map import thread_map
from .shard_layout import Chunk, is_tiled, narrow_to, overlap

METADATA_FILE = ".metadata"
"""The file that says which tensors there are, and where each piece of them lies."""
_READ_SIZE = 2**20
_MAX_METADATA_SIZE = 4 * MAX_METADATA_BYTES
_THREADS = 4

# Module -> the names in it that a description is made of.
_ALLOWED: dict[str, frozenset[str]] = {
    "builtins": frozenset({"set", "frozenset", "slice"}),
    "collections": frozenset({"OrderedDict"}),
    "torch": frozenset({"Size"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    # where earlier releases of torch had two of them
    "torch.distributed._shard.sharded_tensor.metadata": frozenset({"MEM_FORMAT_ENCODING", "TensorProperties"}),
}


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler that knows the types of a description, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "pathlib":  # the folder's name when it was saved, perhaps on another system
            return PurePath
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which has no place in it")


@dataclass(frozen=True)
class StoredChunk:
    """A part of a tensor, or a whole value: where it belongs, and the bytes of a file that hold it."""

    file: str
    start: int
    length: int
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class StoredEntry:
    """A tensor of the folder; a value that is none has no dtype.

    Attributes:
        path: The keys that lead to it in the state that was saved, such as ``("model", "layer.weight")``.
        shape, dtype: The tensor's.
        pieces: What to put it together from.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    chunks: tuple[StoredChunk, ...]

    def is_tiled(self) -> bool:
        """Whether every element of the tensor lies in exactly one piece."""
        return is_tiled(self.shape, [(chunk.offsets, chunk.sizes) for chunk in self.chunks])

    def exceeds(self, chunk: StoredChunk) -> bool:
        """Whether the values of a piece take more bytes than its file has for it: they are not compressed."""
        return self.dtype is not None and math.prod(chunk.sizes) * self.dtype.itemsize > chunk.length


class DCPReader:
    """A folder of torch.distributed.checkpoint, checked as far as that is possible without reading the values.

    Args:
        folder: The folder with the file `METADATA_FILE`.

    Attributes:
        entries: What is in it, by the dotted name.

    Raises:
        LoadError: when the description is missing, damaged or not trustworthy, or a file is missing or too short: all of
            them in one error.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries = _parse_entries(_read_metadata(folder), folder)
        problems = list(self._problems())
        if problems:
            raise LoadError(f"{folder} cannot be read:\n{bullet_list(problems)}", problems)

    def _problems(self) -> Iterator[Problem]:
        needed: dict[str, int] = {}
        for name, entry in self.entries.items():
            for chunk in entry.chunks:
                needed[chunk.file] = max(needed.get(chunk.file, 0), chunk.start + chunk.length)
                if chunk.start < 0 or chunk.length < 0 or entry.exceeds(chunk):
                    end = chunk.start + chunk.length
                    text = f"{name}: bytes {chunk.start} to {end} of {short_repr(chunk.file)} cannot hold it"
                    yield Problem(METADATA_FILE, "corrupt", text)
            if entry.dtype is not None and not entry.is_tiled():
                text = f"{name}: its pieces overlap or do not make up the shape {entry.shape}"
                yield Problem(METADATA_FILE, "corrupt", text)
        for file, end in sorted(needed.items()):
            try:
                size = file_size(path_inside(self.folder, file))
            except FileNameError as error:
                yield Problem(METADATA_FILE, "corrupt", f"it names a file that is not read: {error}")
                continue
            if size is None:
                yield Problem(file, "missing", f"{METADATA_FILE} names it; copy it here from where it was saved")
            elif size < end:
                yield Problem(file, "corrupt", f"it has {size} bytes, at least {end} expected")

    def verify(self) -> None:
        """Reads everything and compares it with the checksums that `torch.save` wrote.

        Raises:
            LoadError: naming every damaged file.
        """
        chunks = [chunk for entry in self.entries.values() for chunk in entry.chunks]
        damaged: dict[str, str] = {}
        for chunk, text in zip(chunks, thread_map(self._checksum_error, chunks, _THREADS), strict=True):
            if text is not None:
                damaged.setdefault(chunk.file, text)
        if damaged:
            problems = [Problem(file, "corrupt", text) for file, text in sorted(damaged.items())]
            raise LoadError(f"{self.folder} is damaged:\n{bullet_list(problems)}", problems)

    def _checksum_error(self, chunk: StoredChunk) -> str | None:
        with open(self.folder / chunk.file, "rb") as file:
            try:
                _verify_zip(_FileView(file, chunk.start, chunk.length))
            except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
                return _first_line(error)
        return None

    def read_tensor(self, name: str) -> torch.Tensor:
        """Reads a tensor, one piece after the other.

        Raises:
            LoadError: when a piece is damaged.
        """
        entry = self.entries[name]
        result = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(name, (0,) * len(entry.shape), result)
        return result

    def read_into(self, name: str, offsets: tuple[int, ...], target: torch.Tensor) -> None:
        """Reads a part of a tensor, one piece after the other.

        Args:
            name: The tensor.
            offsets: Where the part begins.
            target: Where it goes; its shape says how far the part goes.

        Raises:
            LoadError: when a piece is damaged.
        """
        wanted = Chunk(offsets, tuple(target.shape))
        for chunk in self.entries[name].chunks:
            shared = overlap(wanted, chunk.offsets, chunk.sizes)
            if shared is not None:
                part = narrow_to(self._read_chunk(name, chunk), shared, chunk.offsets)
                narrow_to(target, shared, offsets).copy_(part)

    def _read_chunk(self, name: str, chunk: StoredChunk) -> torch.Tensor:
        part, dtype = self._load(name, chunk), self.entries[name].dtype
        if not isinstance(part, torch.Tensor) or (tuple(part.shape), part.dtype) != (chunk.sizes, dtype):
            found = f"{part.dtype} {tuple(part.shape)}" if isinstance(part, torch.Tensor) else type(part).__name__
            raise self._corrupt_error(name, chunk, f"expected {dtype} {chunk.sizes}, found {found}")
        return part

    def read_value(self, name: str) -> Any:
        """Reads a value that is no tensor; one that is more than plain data is refused.

        Raises:
            LoadError: when it is damaged, or refused.
        """
        return self._load(name, self.entries[name].chunks[0])

    def _load(self, name: str, chunk: StoredChunk) -> Any:
        with open(self.folder / chunk.file, "rb") as file:
            part = _FileView(file, chunk.start, chunk.length)
            try:
                return torch.load(part, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
            except pickle.UnpicklingError as error:
                text = "it holds something else than tensors and plain data, which is not loaded"
                raise self._corrupt_error(name, chunk, text) from error
            except Exception as error:
                raise self._corrupt_error(name, chunk, _first_line(error)) from error

    def _corrupt_error(self, name: str, chunk: StoredChunk, text: str) -> LoadError:
        problem = Problem(chunk.file, "corrupt", f"{name}: {text}")
        return LoadError(f"{self.folder} is damaged:\n{bullet_list([problem])}", [problem])


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"


def _read_metadata(folder: Path) -> Any:
    path = folder / METADATA_FILE
    if folder.exists() and not folder.is_dir():
        raise LoadError(
            f"{folder} is a file; expected a folder of shards.", [Problem(str(folder), "missing", "no folder")]
        )
    if not folder.is_dir():
        raise LoadError(
            f"{folder}: there is no such folder.", [Problem(str(folder), "missing", "there is no such folder")]
        )
    if not path.exists():
        raise LoadError(
            f"{folder} holds no sharded checkpoint: there is no file {METADATA_FILE} in it.{_hint(folder)}",
            [Problem(METADATA_FILE, "missing", "it says what is in the folder")],
        )
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        found = _MetadataUnpickler(io.BytesIO(read_bytes(path, _MAX_METADATA_SIZE))).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"expected a description of a checkpoint, found {type(found).__name__}")
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        raise LoadError(f"{path} is damaged: {text}", [Problem(METADATA_FILE, "corrupt", text)]) from error
    return found


def _hint(folder: Path) -> str:
    found = sorted(path.parent.name for path in folder.glob(f"*/{METADATA_FILE}"))
    return f" Name one of the folders in it: {', '.join(found)}." if found else ""


def _parse_entries(metadata: Any, folder: Path) -> dict[str, StoredEntry]:
    """The description in our own words."""
    paths = metadata.planner_data or {}
    infos: dict[str, dict[tuple[int, ...] | None, Any]] = {}
    entries = {}
    try:
        for index, info in metadata.storage_data.items():
            if getattr(info, "transform_descriptors", None):
                raise ValueError(f"{index.fqn} is stored through {info.transform_descriptors}, which is not known here")
            infos.setdefault(index.fqn, {})[None if index.offset is None else tuple(index.offset)] = info
        for name, facts in metadata.state_dict_metadata.items():
            path = tuple(str(part) for part in paths.get(name, (name,)))
            is_tensor = hasattr(facts, "chunks")
            boxes = (
                [(_int_tuple(box.offsets), _int_tuple(box.sizes)) for box in facts.chunks or ()] if is_tensor else []
            )
            chunks = [_stored_chunk(infos[name][offsets], offsets, sizes) for offsets, sizes in boxes]
            if not is_tensor:
                chunks = [_stored_chunk(infos[name][None])]
            shape, dtype = (_int_tuple(facts.size), facts.properties.dtype) if is_tensor else ((), None)
            if not path or not is_shape(shape) or (is_tensor and not isinstance(dtype, torch.dtype)):
                raise ValueError(
                    f"{short_repr(name)} has the keys {short_repr(path)}, the shape {short_repr(shape)} and the dtype "
                    f"{short_repr(dtype)}"
                )
            entries[name] = StoredEntry(path, shape, dtype, tuple(chunks))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        text = f"{type(error).__name__}: {error}"
        raise LoadError(
            f"{folder / METADATA_FILE} is damaged: {text}", [Problem(METADATA_FILE, "corrupt", text)]
        ) from error
    return entries


def _int_tuple(values: Any) -> tuple[int, ...]:
    return tuple(map(operator.index, values))


def _stored_chunk(info: Any, offsets: tuple[int, ...] = (), sizes: tuple[int, ...] = ()) -> StoredChunk:
    return StoredChunk(str(info.relative_path), int(info.offset), int(info.length), offsets, sizes)


def _verify_zip(part: _FileView) -> None:
    """Compares the records of what `torch.save` wrote with their checksums; 0 stands for one that was left out."""
    with zipfile.ZipFile(part) as archive:
        for record in archive.infolist():
            if record.CRC:
                with archive.open(record) as content:
                    while content.read(_READ_SIZE):
                        pass


class _FileView(io.RawIOBase):
    """A stretch of an open file, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view)  # type: ignore[attr-defined]  # a file opened in binary mode has it
        self._at += count
        return int(count)
