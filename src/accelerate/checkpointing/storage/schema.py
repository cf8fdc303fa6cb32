"""Compares the types of loaded values with those of live state before it is loaded.

Reading a file runs no code, and its checksum matches; another program or another version of a class may still have saved
values that an object cannot load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ...runtime.system.file_names import short_repr


def type_mismatches(live: Any, saved: Any, at: str) -> Iterator[str]:
    """Yields an error for each value whose type differs from that of the live one. None and unlisted types match everything.

    Args:
        live: The current state.
        saved: The state that was read.
        at: Path of the state, for the error.
    """
    expected, found = value_types(live), value_types(saved)
    if expected and found and not expected & found:
        yield f"{at} is {short_repr(saved)}; expected {' or '.join(sorted(expected))}"
    elif isinstance(live, Mapping) and isinstance(saved, Mapping):
        for key in live.keys() & saved.keys():
            yield from type_mismatches(live[key], saved[key], f"{at}[{key!r}]")
    elif isinstance(live, (list, tuple)) and isinstance(saved, (list, tuple)):
        if isinstance(live, tuple) and len(live) != len(saved):
            yield f"{at} is {short_repr(saved)}; expected {len(live)} values"
        for number, (one, other) in enumerate(zip(live, saved, strict=False)):
            yield from type_mismatches(one, other, f"{at}[{number}]")


def value_types(value: Any) -> frozenset[str]:
    """Returns the type names of a value; empty for None and unlisted types. A tensor of one element is a number too."""
    if is_tensor(value):
        return frozenset({"a tensor", "a number"} if math.prod(value.shape) == 1 else {"a tensor"})
    for kind, types in _TYPES.items():
        if isinstance(value, types):
            return frozenset({kind})
    return frozenset()


_TYPES: dict[str, tuple[type, ...]] = {
    "a boolean": (bool, np.bool_),
    "a number": (int, float, np.number),
    "a text": (str, bytes),
    "a mapping": (Mapping,),
    "a list": (list, tuple, set, frozenset),
}


def is_tensor(value: Any) -> bool:
    """Returns True for tensors and lazy tensors."""
    return isinstance(getattr(value, "dtype", None), torch.dtype) and hasattr(value, "shape")


def is_count(value: Any, least: int = 0) -> bool:
    """Returns True for an integer of at least `least` that fits into 64 bits."""
    return type(value) is int and least <= value < 2**63


def optimizer_state_error(state: Any) -> str:
    """Returns the reason why a value cannot be an optimizer's state, or ""."""
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= state.keys():
        return "it is not the state of an optimizer (`state` and `param_groups`)"
    groups, values = state["param_groups"], state["state"]
    if not isinstance(groups, (list, tuple)) or not all(
        isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple)) for group in groups
    ):
        return f"its `param_groups` are {short_repr(groups)}; expected a list of mappings with a list of `params`"
    if not isinstance(values, Mapping) or not all(isinstance(one, Mapping) for one in values.values()):
        return f"its `state` is {short_repr(values)}; expected a mapping for each parameter"
    if not all(isinstance(param, (int, str)) for group in groups for param in group["params"]):
        return "its `params` are neither numbers nor names"
    return ""
