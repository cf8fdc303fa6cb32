"""Detects DTensors without importing `torch.distributed.tensor`, which takes a quarter of the import time of torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(value: Any) -> TypeIs[DTensor]:
    """Returns whether a value is a `DTensor`; False in a process that has not imported the class."""
    cls = getattr(
        sys.modules.get("torch.distributed.tensor"), "DTensor", None
    )  # None while the module is being imported
    return cls is not None and isinstance(value, cls)
