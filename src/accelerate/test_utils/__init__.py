"""Helpers and scripts that ship with the package: ``accelerate test`` launches one of them.

Every public name of `testing` is also a name of this module, looked up at first use: that module imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .testing import *  # noqa: F403 - for type checkers, what __getattr__ looks up


def __getattr__(name: str) -> object:
    if not name.startswith("_"):
        testing = importlib.import_module(f"{__name__}.testing")
        if name == "testing":
            return testing
        if name in testing.__all__:
            value: object = getattr(testing, name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    testing = importlib.import_module(f"{__name__}.testing")
    return sorted({*globals(), *testing.__all__})
