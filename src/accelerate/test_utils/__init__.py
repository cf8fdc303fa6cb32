"""Test helpers and scripts that ship with the package; ``accelerate test`` launches one of them.

Public names of `testing` are also names of this module, imported on first use, since `testing` imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .testing import *  # noqa: F403 - the names of __getattr__, for type checkers


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
