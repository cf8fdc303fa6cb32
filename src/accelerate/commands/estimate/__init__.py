"""`accelerate estimate-memory`: sizes of a model, and the peak of a training step per rank."""

from __future__ import annotations

from .command import *  # noqa: F403
from .command import __all__ as __all__
