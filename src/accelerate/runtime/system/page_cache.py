"""Page cache: which pages of a file are resident, and files opened with O_DIRECT."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import sys
from collections.abc import Callable
from typing import Any

_SAMPLE_STRIDE = 256 << 10


class CacheProbe:
    """Queries by mincore(2) whether pages of a file are in the page cache, without reading them.

    Pages count as cached on systems other than Linux, and where the query fails.

    Args:
        descriptor: The open file; it may be closed afterwards.
        size: Its length in bytes.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self._query = _mincore() if size else None
        if self._query is not None:
            import numpy as np

            self._map = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
            self._start = int(np.frombuffer(self._map, dtype=np.uint8).ctypes.data)

    def is_cached(self, offset: int) -> bool:
        """Returns whether the page at a byte offset, which must be inside the file, is cached."""
        if self._query is None:
            return True
        resident = ctypes.c_ubyte(1)  # local, for thread safety
        failed = self._query(self._start + offset // mmap.PAGESIZE * mmap.PAGESIZE, 1, ctypes.byref(resident))
        return bool(failed) or bool(resident.value & 1)

    def cached_fraction(self, size: int) -> float:
        """Estimates the cached fraction of the first `size` bytes from a sample of pages."""
        offsets = range(0, size, _SAMPLE_STRIDE)
        return sum(map(self.is_cached, offsets)) / len(offsets) if offsets else 1.0


@functools.lru_cache(maxsize=1)
def _mincore() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    function: Any = ctypes.CDLL(None).mincore
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    typed: Callable[..., int] = function
    return typed


def open_direct(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int | None:
    """Opens a file with O_DIRECT: offsets, sizes and memory of its transfers must be page-aligned.

    Args:
        path: The file.
        flags: Flags of `os.open`.

    Returns:
        A descriptor, or None if the system or file system does not support O_DIRECT.
    """
    flag: int | None = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        return os.open(path, flags | flag)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None
