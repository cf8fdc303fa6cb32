"""Documented alias of `accelerate.utils.memory`."""

from __future__ import annotations

from .runtime.memory import find_executable_batch_size

__all__ = ["find_executable_batch_size"]
