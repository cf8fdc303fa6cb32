"""Small functions over plain values that the documented ``utils.other`` offers and that belong to no larger idea."""

from __future__ import annotations

import functools
from typing import Any


def convert_bytes(size: float) -> str:
    """A number of bytes for a person to read, in binary units up to PB.

    Example:
        >>> convert_bytes(5 * 1024**3)
        '5.0 GB'
    """
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if abs(size) < 1024:
            return f"{round(size, 2)} {unit}"
        size /= 1024
    return f"{round(size, 2)} PB"


def get_pretty_name(obj: Any) -> str:
    """The name of a class or function, or of an object's class; a method's comes with its class's."""
    if not hasattr(obj, "__qualname__") and not hasattr(obj, "__name__"):
        obj = type(obj)
    return str(getattr(obj, "__qualname__", None) or obj.__name__)


def merge_dicts(source: dict[Any, Any], destination: dict[Any, Any]) -> dict[Any, Any]:
    """Writes `source` into `destination`, dictionary by dictionary; where both have a plain value, `source` wins.

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
    """The attribute at a dotted path, such as ``"layers.0.weight"`` of a model.

    Raises:
        AttributeError: when a part of the path is not there.
    """
    return functools.reduce(getattr, attr.split("."), obj)


def wait_for_everyone() -> None:
    """Returns once every process of the run has called it; alone, at once."""
    from . import world

    world.current().collectives.barrier()
