"""Writes files in blocks with a checksum each, by several threads, and defers the release of replaced files.

Full blocks bypass the page cache (O_DIRECT) where the system supports it: checkpoints are rarely read again soon, and
filling the cache with them takes longer than the disk needs. The rest is buffered, and one fsync covers both.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import queue
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...runtime.system.page_cache import open_direct

BLOCK_SIZE = 8 * 2**20
"""Bytes per checksum and per write."""
_READ_SIZE = 2**20
_THREADS = 2
_BUFFERS = 2 * _THREADS


_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class FileRecord:
    """Size and checksums of a file.

    Attributes:
        path: Path in the checkpoint, with slashes.
        size: Bytes.
        checksums: CRC-32 of each block of `BLOCK_SIZE` bytes, as 8 hexadecimal digits.
    """

    path: str
    size: int
    checksums: tuple[str, ...]


class FileWriter:
    """A new file that `torch.save` and others write to. Buffers at most `_BUFFERS` blocks in memory.

    Args:
        path: Path of the file, which must not exist.

    Attributes:
        size: Bytes written so far.
        error: First error, of any thread. The next call raises it.
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
        """Copies a bytes-like object into buffers; its memory may change afterwards."""
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
        """Submits the current block and returns memory for the next one; blocks while all buffers are in use."""
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
            return np.frombuffer(mmap.mmap(-1, BLOCK_SIZE), dtype=np.uint8)  # page-aligned, as O_DIRECT needs it
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
        """Computes the checksum of a block and writes it."""
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
                raise OSError(errno.EIO, "the disk accepts no more bytes", str(self._path))
            done += count

    def flush(self) -> None:
        """Does nothing: data is on disk after `finish` only."""

    def finish(self, path: str) -> FileRecord:
        """Writes the last block and syncs the file.

        Args:
            path: Path in the checkpoint, for the record.

        Returns:
            The file's record.
        """
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
    """Creates a file with the bytes that `write` produces; it is synced to disk on return."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = FileWriter(path)
    try:
        write(writer)
        return writer.finish(name)
    except Exception as error:
        # torch.save hides the writer's error, which has the cause but not the path.
        cause = error if writer.error is None else writer.error
        if isinstance(cause, OSError) and cause.filename is None:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        if cause is not error:
            raise cause from error
        raise
    finally:
        writer.close()


def sync_folder(folder: Path) -> None:
    """Syncs the directory entries of a folder to disk. (Windows cannot open folders, and needs no sync.)"""
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
    """Releases the disk space of files that the block removes or replaces on a thread, since freeing it is slow.

    The files are held open until then, so that the system frees them even if the process is killed.
    """
    descriptors = []
    for path in files:
        try:
            descriptors.append(os.open(path, os.O_RDONLY))
        except OSError:  # missing or unreadable: released at once
            continue

    def close() -> None:
        for descriptor in descriptors:
            os.close(descriptor)

    try:
        yield
    finally:
        thread = threading.Thread(target=close, name="checkpoint remover", daemon=True)
        thread.start()
        _pending_closes.append(thread)


def wait_for_unlinks() -> None:
    """Blocks until the disk space of removed files is released."""
    while _pending_closes:
        _pending_closes.pop().join()


def fingerprint(path: Path, name: str) -> FileRecord:
    """Computes the record of a file that another writer made, and syncs it to disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
        return FileRecord(
            name, size, tuple(block_checksum(file.fileno(), start) for start in range(0, max(size, 1), BLOCK_SIZE))
        )


_memory = threading.local()


def block_checksum(descriptor: int, start: int) -> str:
    """Computes the checksum of one block of an open file."""
    if not hasattr(_memory, "block"):  # reused per thread: page faults of new memory cost as much as the CRC
        _memory.block = memoryview(bytearray(_READ_SIZE))
    if hasattr(os, "posix_fadvise"):  # one large readahead takes half the time of the kernel's growing ones
        os.posix_fadvise(descriptor, start, BLOCK_SIZE, os.POSIX_FADV_WILLNEED)
    total, end = 0, start + BLOCK_SIZE
    while start < end and (count := os.preadv(descriptor, [_memory.block], start)):
        total = zlib.crc32(_memory.block[:count], total)
        start += count
    return f"{total:08x}"


def thread_map(action: Callable[[_T], _R], items: Sequence[_T], threads: int) -> list[_R]:
    """Returns ``[action(item) for item in items]``, computed by threads; raises the error of the first item that fails."""
    # `concurrent.futures` accepts no work during interpreter shutdown, which is when a background save is waited for.
    if min(threads, len(items)) < 2:
        return [action(item) for item in items]
    results: list[Any] = [None] * len(items)
    errors: dict[int, BaseException] = {}
    numbers = itertools.count()

    def work() -> None:
        while not errors and (number := next(numbers)) < len(items):
            try:
                results[number] = action(items[number])
            except BaseException as error:  # noqa: BLE001 - raised below, on the calling thread
                errors[number] = error

    workers = [threading.Thread(target=work, name="checkpoint") for _ in range(min(threads, len(items)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[min(errors)]
    return results
