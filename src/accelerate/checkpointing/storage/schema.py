"""Types of what small files hold, compared with what a run has now: a value of another type is found before it is loaded.

Files are read without running code, and their checksums match; even so another program, or an older version of a class, may
have put something else in them than an object takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ...runtime.system.file_names import short_repr


def type_mismatches(live: Any, saved: Any, at: str) -> Iterator[str]:
    """Yields what has another type in a saved state than in the live one; None fits everywhere, and so do unknown types.

    Args:
        live: The state as it is now.
        saved: The state that was read.
        at: The state's place, for the text.
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
    """The kinds of a value, in words; none for None and types that are not known here. One element is number and tensor."""
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
    """True for a tensor, or what stands for one that is read later."""
    return isinstance(getattr(value, "dtype", None), torch.dtype) and hasattr(value, "shape")


def is_count(value: Any, least: int = 0) -> bool:
    """True for a whole number that is large enough and fits into 64 bits."""
    return type(value) is int and least <= value < 2**63


def optimizer_state_error(state: Any) -> str:
    """Returns why a value cannot be the state of any optimizer; empty if it can."""
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= state.keys():
        return "it holds no state of an optimizer (`state` and `param_groups`)"
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
