"""Small documented helpers: sizes in bytes, nested dicts and attributes, readable names of objects."""

from __future__ import annotations

import functools
import re
from typing import Any


def convert_bytes(size: float) -> str:
    """Formats a number of bytes in binary units up to PB.

    Example:
        >>> convert_bytes(5 * 1024**3)
        '5.0 GB'
    """
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if abs(size) < 1024:
            return f"{round(size, 2)} {unit}"
        size /= 1024
    return f"{round(size, 2)} PB"


_UNITS = {"TIB": 2**40, "GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3}


def convert_file_size_to_int(size: int | str) -> int:
    """Converts ``"10GB"``, ``"1KiB"`` or a number to bytes.

    Raises:
        ValueError: for any other value, and for a negative number.

    Example:
        >>> convert_file_size_to_int("1MiB")
        1048576
    """
    if isinstance(size, (int, float)) and size >= 0:
        return int(size)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)\s*", size.upper()) if isinstance(size, str) else None
    if found is None:
        raise ValueError(f"expected a size such as '10GB', '500MB', '1GiB' or a number of bytes; got {size!r}.")
    return int(float(found[1]) * _UNITS[found[2]])


def get_pretty_name(obj: Any) -> str:
    """Returns the qualified name of a class or function, or of an object's class."""
    if not hasattr(obj, "__qualname__") and not hasattr(obj, "__name__"):
        obj = type(obj)
    return str(getattr(obj, "__qualname__", None) or obj.__name__)


def merge_dicts(source: dict[Any, Any], destination: dict[Any, Any]) -> dict[Any, Any]:
    """Merges nested dictionaries into `destination`; values of `source` replace those of `destination`.

    Returns:
        `destination`.

    Example:
        >>> merge_dicts({"a": {"x": 1}}, {"a": {"y": 2}, "b": 3})
        {'a': {'y': 2, 'x': 1}, 'b': 3}
    """
    for key, value in source.items():
        if isinstance(value, dict):
            below = destination.get(key)
            destination[key] = merge_dicts(value, below if isinstance(below, dict) else {})
        else:
            destination[key] = value
    return destination


def recursive_getattr(obj: Any, attr: str) -> Any:
    """Returns the attribute at a dotted path, such as ``"layers.0.weight"`` of a model.

    Raises:
        AttributeError: if a part of the path does not exist.
    """
    return functools.reduce(getattr, attr.split("."), obj)


def wait_for_everyone() -> None:
    """Blocks until every process has called it; returns at once on a single process."""
    from . import world

    world.current().collectives.barrier()
