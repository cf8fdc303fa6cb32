"""Lazy imports: a package's public names are imported on first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping


def lazy_exports(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """Returns the ``__getattr__`` (PEP 562) of a package.

    Args:
        package: The package's ``__name__``.
        homes: Public name -> submodule that defines it.
    """

    def look_up(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value: object = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return look_up


def loaded_classes(*paths: str) -> tuple[type, ...]:
    """Returns those classes ("module:Class") whose modules are imported; others cannot have instances."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in (path.split(":") for path in paths))
    return tuple(cls for cls in found if isinstance(cls, type))
