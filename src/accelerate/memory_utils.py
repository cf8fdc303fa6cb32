"""The former home of `accelerate.utils.memory`'s batch-size finder, kept as a documented path."""

from __future__ import annotations

from .runtime.memory import find_executable_batch_size

__all__ = ["find_executable_batch_size"]
