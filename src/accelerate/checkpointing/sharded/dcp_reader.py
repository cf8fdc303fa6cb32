"""Reads checkpoints in the format of torch.distributed.checkpoint (DCP), one tensor at a time and without a process group.

DCP's own reader unpickles metadata and non-tensor values without restriction, which runs code from the file. This one
accepts the classes of DCP's metadata and plain data, and nothing else.
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
from ..storage.file_writer import thread_map
from .shard_layout import Chunk, is_tiled, narrow_to, overlap

METADATA_FILE = ".metadata"
"""File that lists the tensors and the location of each of their chunks."""
_READ_SIZE = 2**20
_MAX_METADATA_SIZE = 4 * MAX_METADATA_BYTES
_THREADS = 4

# Module -> the names in it that metadata may refer to.
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
    # the module of these two in earlier releases of torch
    "torch.distributed._shard.sharded_tensor.metadata": frozenset({"MEM_FORMAT_ENCODING", "TensorProperties"}),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles DCP metadata; raises for every global that is not in `_ALLOWED`."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "pathlib":  # path of the folder when it was saved, perhaps on another system
            return PurePath
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which has no place in DCP metadata")


@dataclass(frozen=True)
class StoredChunk:
    """Byte range of a file with a chunk of a tensor, or with another value."""

    file: str
    start: int
    length: int
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class StoredEntry:
    """A tensor or another value in the folder.

    Attributes:
        path: Path of keys in the saved state, such as ``("model", "layer.weight")``.
        shape: Shape of the full tensor.
        dtype: Dtype of the tensor; None for other values.
        chunks: Chunks that make up the tensor.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    chunks: tuple[StoredChunk, ...]

    def is_tiled(self) -> bool:
        """Returns True if every element of the tensor lies in exactly one chunk."""
        return is_tiled(self.shape, [(chunk.offsets, chunk.sizes) for chunk in self.chunks])

    def exceeds(self, chunk: StoredChunk) -> bool:
        """Returns True if the uncompressed elements of a chunk need more bytes than its byte range has."""
        return self.dtype is not None and math.prod(chunk.sizes) * self.dtype.itemsize > chunk.length


class DCPReader:
    """A DCP folder, validated as far as possible without reading values.

    Args:
        folder: Folder with the file `METADATA_FILE`.

    Attributes:
        entries: Entries by FQN.

    Raises:
        LoadError: listing all problems: metadata that is missing, damaged or unsafe; files that are missing or truncated.
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
                text = f"{name}: its chunks overlap or do not cover the shape {entry.shape}"
                yield Problem(METADATA_FILE, "corrupt", text)
        for file, end in sorted(needed.items()):
            try:
                size = file_size(path_inside(self.folder, file))
            except FileNameError as error:
                yield Problem(METADATA_FILE, "corrupt", f"it names a file that is refused: {error}")
                continue
            if size is None:
                yield Problem(file, "missing", f"{METADATA_FILE} lists it; copy it here from where it was saved")
            elif size < end:
                yield Problem(file, "corrupt", f"it has {size} bytes, at least {end} expected")

    def verify(self) -> None:
        """Reads all files and compares them with the CRCs that `torch.save` wrote.

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
        """Reads a full tensor, one chunk after the other.

        Raises:
            LoadError: if a chunk is damaged.
        """
        entry = self.entries[name]
        result = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(name, (0,) * len(entry.shape), result)
        return result

    def read_into(self, name: str, offsets: tuple[int, ...], target: torch.Tensor) -> None:
        """Reads a part of a tensor: the overlap of each stored chunk with it.

        Args:
            name: FQN of the tensor.
            offsets: Index of the first element of the part.
            target: Tensor of the size of the part to copy it into.

        Raises:
            LoadError: if a chunk is damaged.
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
        """Reads a value other than a tensor.

        Raises:
            LoadError: if it is damaged, or more than plain data.
        """
        return self._load(name, self.entries[name].chunks[0])

    def _load(self, name: str, chunk: StoredChunk) -> Any:
        with open(self.folder / chunk.file, "rb") as file:
            part = _FileView(file, chunk.start, chunk.length)
            try:
                return torch.load(part, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
            except pickle.UnpicklingError as error:
                text = "it contains something else than tensors and plain data, which is not loaded"
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
    if not folder.is_dir():
        text = "it is a file; expected a folder with a sharded checkpoint" if folder.exists() else "no such folder"
        raise LoadError(f"{folder}: {text}.", [Problem(str(folder), "missing", text)])
    if not path.exists():
        raise LoadError(
            f"{folder} is not a sharded checkpoint: it has no file {METADATA_FILE}.{_hint(folder)}",
            [Problem(METADATA_FILE, "missing", "it lists the contents of the folder")],
        )
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        found = _MetadataUnpickler(io.BytesIO(read_bytes(path, _MAX_METADATA_SIZE))).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"expected DCP metadata, found {type(found).__name__}")
    except Exception as error:
        raise _metadata_error(folder, error) from error
    return found


def _metadata_error(folder: Path, error: Exception) -> LoadError:
    text = f"{type(error).__name__}: {error}"
    return LoadError(f"{folder / METADATA_FILE} is damaged: {text}", [Problem(METADATA_FILE, "corrupt", text)])


def _hint(folder: Path) -> str:
    found = sorted(path.parent.name for path in folder.glob(f"*/{METADATA_FILE}"))
    return f" Pass one of the folders in it: {', '.join(found)}." if found else ""


def _parse_entries(metadata: Any, folder: Path) -> dict[str, StoredEntry]:
    """Converts DCP metadata to entries, checking all types."""
    paths = metadata.planner_data or {}
    infos: dict[str, dict[tuple[int, ...] | None, Any]] = {}
    entries = {}
    try:
        for index, info in metadata.storage_data.items():
            if getattr(info, "transform_descriptors", None):
                raise ValueError(f"{index.fqn} is stored through {info.transform_descriptors}, which is not supported")
            infos.setdefault(index.fqn, {})[None if index.offset is None else tuple(index.offset)] = info
        for name, facts in metadata.state_dict_metadata.items():
            path = tuple(str(part) for part in paths.get(name, (name,)))
            is_tensor = hasattr(facts, "chunks")
            if is_tensor:
                boxes = [(_int_tuple(box.offsets), _int_tuple(box.sizes)) for box in facts.chunks or ()]
                chunks = [_stored_chunk(infos[name][offsets], offsets, sizes) for offsets, sizes in boxes]
                shape, dtype = _int_tuple(facts.size), facts.properties.dtype
            else:
                chunks, shape, dtype = [_stored_chunk(infos[name][None])], (), None
            if not path or not is_shape(shape) or (is_tensor and not isinstance(dtype, torch.dtype)):
                raise ValueError(
                    f"{short_repr(name)} has the keys {short_repr(path)}, the shape {short_repr(shape)} and the dtype "
                    f"{short_repr(dtype)}"
                )
            entries[name] = StoredEntry(path, shape, dtype, tuple(chunks))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise _metadata_error(folder, error) from error
    return entries


def _int_tuple(values: Any) -> tuple[int, ...]:
    return tuple(map(operator.index, values))


def _stored_chunk(info: Any, offsets: tuple[int, ...] = (), sizes: tuple[int, ...] = ()) -> StoredChunk:
    return StoredChunk(str(info.relative_path), int(info.offset), int(info.length), offsets, sizes)


def _verify_zip(part: _FileView) -> None:
    """Compares the records of a `torch.save` archive with their CRCs; a CRC of 0 means that it was left out."""
    with zipfile.ZipFile(part) as archive:
        for record in archive.infolist():
            if record.CRC:
                with archive.open(record) as content:
                    while content.read(_READ_SIZE):
                        pass


class _FileView(io.RawIOBase):
    """A byte range of an open file, as a file of its own."""

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
