"""Search for a batch size that fits, and release of device memory."""

from __future__ import annotations

from ..runtime.memory import clear_device_cache, find_executable_batch_size, release_memory, should_reduce_batch_size

__all__ = ["clear_device_cache", "find_executable_batch_size", "release_memory", "should_reduce_batch_size"]
