"""Bytes to disk: a new file in stretches, each with its checksum, several on their way at once; old files out of the way.

Whole stretches bypass the page cache where the system can (O_DIRECT): a checkpoint is not read again soon, and filling the
cache with it costs more time than the disk needs. The rest goes the ordinary way, and one sync covers both.
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.system.page_cache import open_direct

BLOCK_SIZE = 8 * 2**20
"""Bytes that one checksum covers, and that are written at once."""
_READ_SIZE = 2**20
_THREADS = 2
_BUFFERS = 2 * _THREADS


@dataclass(frozen=True)
class FileRecord:
    """Size and checksums of one file.

    Attributes:
        path: Path in the checkpoint, with slashes.
        size: Bytes.
        sums: CRC-32 of each `BLOCK_SIZE` bytes, as 8 hexadecimal digits.
    """

    path: str
    size: int
    checksums: tuple[str, ...]


class FileWriter:
    """A new file, as `torch.save` and others write to it. Holds `_BUFFERS` stretches in memory at most.

    Args:
        path: Where; it must not exist.

    Attributes:
        size: Bytes so far.
        error: What failed, here or on a thread. The next call raises it.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._path = path
        self._direct: int | None = None
        self._full: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self.error: BaseException | None = None
        self._checksums: dict[int, str] = {}
        self._buffer: Any = None
        self.size = 0

    def write(self, data: Any) -> int:
        """Takes all of a bytes-like object; its memory may change when this returns."""
        source = np.frombuffer(data, dtype=np.uint8)
        try:
            self._append(source)
        except Exception as error:
            self.error = error
            raise
        return len(source)

    def _append(self, source: Any) -> None:
        taken = 0
        while taken < len(source):
            filled = self.size % BLOCK_SIZE
            if not filled:
                self._buffer = self._next_buffer()
            count = min(len(source) - taken, BLOCK_SIZE - filled)
            self._buffer[filled : filled + count] = source[taken : taken + count]
            taken += count
            self.size += count

    def _next_buffer(self) -> Any:
        """Memory for a stretch, the one before being handed on; waits for the disk when all memory is in use."""
        number = self.size // BLOCK_SIZE
        if number:
            self._full.put((self.size - BLOCK_SIZE, self._buffer))
        if number == 1:
            self._direct = open_direct(self._path, os.O_WRONLY)
        if 0 < number <= _THREADS:
            thread = threading.Thread(target=self._write_blocks, name="checkpoint writer")
            thread.start()
            self._threads.append(thread)
        if number < _BUFFERS:
            return np.frombuffer(mmap.mmap(-1, BLOCK_SIZE), dtype=np.uint8)  # begins at a page, as O_DIRECT wants it
        buffer = self._free.get()
        self._check()
        return buffer

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _write_blocks(self) -> None:
        while (job := self._full.get()) is not None:
            start, buffer = job
            try:
                if self.error is None:
                    self._write_block(start, buffer)
            except BaseException as error:  # noqa: BLE001 - raised on the thread that writes the file
                self.error = error
            self._free.put(buffer)

    def _write_block(self, start: int, data: Any) -> None:
        """Sums a stretch up and writes it."""
        self._checksums[start] = f"{zlib.crc32(data):08x}"
        view = memoryview(data)
        done = 0
        if self._direct is not None and len(view) == BLOCK_SIZE:
            try:
                done = os.pwrite(self._direct, view, start)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        while done < len(view):
            count = os.pwrite(self._descriptor, view[done:], start + done)
            if not count:
                raise OSError(errno.EIO, "the disk takes nothing more", str(self._path))
            done += count

    def flush(self) -> None:
        """Nothing that a reader could wait for is held back: there is none before `finish`."""

    def finish(self, path: str) -> FileRecord:
        """Writes what is left and syncs the file to disk; returns its record under the name it has in the checkpoint."""
        self._stop()
        self._check()
        start = max(self.size - 1, 0) // BLOCK_SIZE * BLOCK_SIZE
        self._write_block(start, self._buffer[: self.size - start] if self.size else b"")
        os.fsync(self._descriptor)
        return FileRecord(path, self.size, tuple(self._checksums[start] for start in sorted(self._checksums)))

    def _stop(self) -> None:
        for _ in self._threads:
            self._full.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def close(self) -> None:
        """Closes the file."""
        self._stop()
        for descriptor in (self._descriptor, self._direct):
            if descriptor is not None:
                os.close(descriptor)


def write_file(path: Path, name: str, write: Callable[[FileWriter], None]) -> FileRecord:
    """Makes a new file with what `write` writes, on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = FileWriter(path)
    try:
        write(writer)
        return writer.finish(name)
    except Exception as error:
        # torch.save says that writing failed, and the writer's error says why, but not where.
        cause = error if writer.error is None else writer.error
        if isinstance(cause, OSError) and cause.filename is None:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        if cause is not error:
            raise cause from error
        raise
    finally:
        writer.close()


def sync_folder(folder: Path) -> None:
    """Brings a folder's list of names to disk. (Systems that cannot open a folder have nothing like it.)"""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_pending_closes: list[threading.Thread] = []


@contextmanager
def deferred_unlink(files: Iterable[Path]) -> Iterator[None]:
    """Of files that are removed or replaced in the block, a thread gives the room back, which takes the system a while.

    They are held open until then, so that nothing is left of them whenever the process ends.
    """
    descriptors = []
    for path in files:
        try:
            descriptors.append(os.open(path, os.O_RDONLY))
        except OSError:  # not there, or not to be opened: it is removed at once
            continue

    def close() -> None:
        for descriptor in descriptors:
            os.close(descriptor)

    try:
        yield
    finally:
        thread = threading.Thread(target=close, name="checkpoint remover", daemon=True)
        thread.start()
        _pending_closes.append(thread)  # once it can be waited for


def wait_for_unlinks() -> None:
    """Returns when files that were removed have given their room back."""
    while _pending_closes:
        _pending_closes.pop().join()


def fingerprint(path: Path, name: str) -> FileRecord:
    """The record of a file that somebody else wrote; it is synced to disk as well."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
        return FileRecord(
            name, size, tuple(block_checksum(file.fileno(), start) for start in range(0, max(size, 1), BLOCK_SIZE))
        )


_memory = threading.local()


def block_checksum(descriptor: int, start: int) -> str:
    """The checksum of one stretch of an open file."""
    if not hasattr(_memory, "piece"):
        _memory.block = memoryview(bytearray(_READ_SIZE))  # kept by the thread: fresh memory costs as much as the sum
    if hasattr(os, "posix_fadvise"):  # all of it asked for at once costs half of what growing steps do
        os.posix_fadvise(descriptor, start, BLOCK_SIZE, os.POSIX_FADV_WILLNEED)
    total, end = 0, start + BLOCK_SIZE
    while start < end and (count := os.preadv(descriptor, [_memory.block], start)):
        total = zlib.crc32(_memory.block[:count], total)
        start += count
    return f"{total:08x}"
