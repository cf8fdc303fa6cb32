"""Finds references to a function in a model's code that patching the function in its module would miss.

``from torch.nn.functional import scaled_dot_product_attention`` binds the function to a name of the importing module. The
search follows names that methods use: globals, helper functions, closures, defaults and attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn


def find_captured_function(function: Any, model: nn.Module) -> str | None:
    """Returns a description of the first reference to `function` in a model, or None.

    Args:
        function: Function that is to be patched in its own module.
        model: Model whose modules, classes and methods are searched.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if value is function:
                return f"{path or type(module).__qualname__}.{name}"
        for kind in type(module).__mro__:
            if not _is_from_torch(kind) and id(kind) not in seen:
                seen.add(id(kind))
                for name, value in vars(kind).items():
                    found = _reaches(getattr(value, "__func__", value), function, seen)
                    if found is not None:
                        return f"{kind.__module__}.{kind.__qualname__}.{name}{found}"
    return None


def _reaches(value: Any, function: Any, seen: set[int]) -> str | None:
    """Returns the path from `value` to `function`: "" if it is the function, None if there is none."""
    if value is function:
        return ""
    if not isinstance(value, FunctionType) or _is_from_torch(value) or id(value) in seen:
        return None
    seen.add(id(value))
    for name, reached in _references(value):
        if _reaches(reached, function, seen) is not None:
            return f" (as {name!r})"
    return None


def _references(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yields names and values that a function's code may refer to."""
    yield from ((f"a default of {function.__name__}", value) for value in function.__defaults__ or ())
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield from ((name, held) for held in _cell_contents(cell))
    names = set(_names(function.__code__))
    for name in names:
        value = function.__globals__.get(name)
        yield name, value
        if isinstance(value, ModuleType) and not value.__name__.startswith("torch"):
            yield from ((f"{name}.{attribute}", vars(value)[attribute]) for attribute in names & vars(value).keys())


def _cell_contents(cell: Any) -> Iterator[Any]:
    try:
        yield cell.cell_contents
    except ValueError:  # an empty cell
        return


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_from_torch(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).partition(".")[0] == "torch"
