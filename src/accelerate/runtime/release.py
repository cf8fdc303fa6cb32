"""Makes Python let go of process groups, so that a gloo group's threads end before the interpreter does.

A gloo group ends its threads when its last reference goes. What still refers to one while the interpreter is taken down
(a sharded model in a script's global, a default argument of torch's bound on import) ends them too late, and the process
aborts now and then after all its work is done.
"""

from __future__ import annotations

import gc
import types
from typing import Any


def drop_group_references(held: list[Any]) -> None:
    """Replaces references to these objects by None wherever Python's collector finds them; empties the list as well.

    For the end of a process only: what used the objects is of no use afterwards. References of C++ alone are not found.

    Args:
        held: The objects.
    """
    wanted = {id(thing) for thing in held}
    for holder in gc.get_referrers(*held):
        if isinstance(holder, dict):
            _clear_mapping(holder, wanted)
        elif isinstance(holder, list):
            holder[:] = [None if id(value) in wanted else value for value in holder]
        elif hasattr(holder, "__dict__") and not isinstance(holder, types.FrameType):
            _clear_attributes(holder, wanted)
    # The collector does not look into tuples and mappings of such objects: default arguments, and a mesh's groups.
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
