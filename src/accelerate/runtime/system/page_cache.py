"""What the system's page cache holds of a file, and what it is read past."""

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
    """Tells whether pages of a file are in the cache, and does not touch them.

    Where the system cannot say it (or not to this user), all of them are.

    Args:
        descriptor: The open file; it may be closed afterwards.
        size: Its length in bytes.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self._ask = _mincore() if size else None
        if self._ask is not None:
            import numpy as np

            self._map = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
            self._start = int(np.frombuffer(self._map, dtype=np.uint8).ctypes.data)

    def is_cached(self, place: int) -> bool:
        """Whether the page with the byte at `place`, before the end of the file, is there."""
        if self._ask is None:
            return True
        answer = ctypes.c_ubyte(1)  # of this call alone: other threads may ask meanwhile
        failed = self._ask(self._start + place // mmap.PAGESIZE * mmap.PAGESIZE, 1, ctypes.byref(answer))
        return bool(failed) or bool(answer.value & 1)

    def cached_fraction(self, size: int) -> float:
        """About how much of the first `size` bytes is there."""
        places = range(0, size, _SAMPLE_STRIDE)
        return sum(map(self.is_cached, places)) / len(places) if places else 1.0


@functools.lru_cache(maxsize=1)
def _mincore() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    function: Any = ctypes.CDLL(None).mincore
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    asked: Callable[..., int] = function
    return asked


def open_direct(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int | None:
    """Opens a file to be read or written past the cache (O_DIRECT): in whole pages, and memory that begins at one.

    Args:
        path: The file.
        flags: How to open it.

    Returns:
        A descriptor, or None where the file system has no such thing.
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
