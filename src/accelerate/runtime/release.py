"""Drops Python references to process groups, so that gloo's threads end before the interpreter shuts down.

A gloo group joins its threads in its destructor. A reference that survives until interpreter shutdown (a sharded model in a
global of the script, a default argument that torch bound on import) delays that, and the process may abort after its work.
"""

from __future__ import annotations

import gc
import types
from typing import Any


def drop_group_references(held: list[Any]) -> None:
    """Sets to None every reference to the given objects that the garbage collector can find, including those of the list.

    Call it at process exit only: users of the objects break. References held by C++ are not found.

    Args:
        held: The process groups.
    """
    wanted = {id(thing) for thing in held}
    for holder in gc.get_referrers(*held):
        if isinstance(holder, dict):
            _clear_mapping(holder, wanted)
        elif isinstance(holder, list):
            holder[:] = [None if id(value) in wanted else value for value in holder]
        elif hasattr(holder, "__dict__") and not isinstance(holder, types.FrameType):
            _clear_attributes(holder, wanted)
    # `get_referrers` misses tuples of default arguments, and the groups of a DeviceMesh.
    for holder in gc.get_objects():
        if type(holder) is types.FunctionType:
            defaults = holder.__defaults__ or ()
            if any(id(value) in wanted for value in defaults):
                holder.__defaults__ = tuple(None if id(value) in wanted else value for value in defaults)
        elif type(holder).__name__ == "DeviceMesh":
            _clear_mapping(getattr(holder, "_pg_registry", {}), wanted)


def _clear_mapping(holder: dict[Any, Any], wanted: set[int]) -> None:
    for key, value in list(holder.items()):
        if id(key) in wanted:
            del holder[key]
        elif id(value) in wanted:
            holder[key] = None


def _clear_attributes(holder: Any, wanted: set[int]) -> None:
    replace = type.__setattr__ if isinstance(holder, type) else object.__setattr__  # frozen dataclasses as well
    for name, value in list(vars(holder).items()):
        if id(value) in wanted:
            replace(holder, name, None)
