"""The documented helpers, re-exported.

Names are imported from the modules that define them on first use (PEP 562), so that importing this package is cheap. No
module inside accelerate imports from here.
"""

from __future__ import annotations

import importlib
import re

# Also the name of a submodule, which would shadow the function if it were imported first.
from .tqdm import tqdm as tqdm

# The stub lists the names with the modules that define them; the wheel ships it for type checkers.
_STUB = __loader__.get_data(f"{__file__.removesuffix('c')}i").decode()
_IMPORTS = {name: home for home, name in re.findall(r"^from accelerate\.(\S+) import \(?\s*(\w+) as \2\b", _STUB, re.M)}
_SUBMODULES = tuple(name for name, home in _IMPORTS.items() if home == "utils")
_EXPORTS = {name: home for name, home in _IMPORTS.items() if home != "utils"}

__all__ = sorted(_EXPORTS)  # noqa: PLE0605 - read from the stub


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        value: object = getattr(importlib.import_module(f"accelerate.{_EXPORTS[name]}"), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_SUBMODULES})
