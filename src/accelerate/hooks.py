"""The documented path of the hooks that offloading is made of; they live in `accelerate.offload.hooks`."""

from __future__ import annotations

from .offload.hooks import *  # noqa: F403
from .offload.hooks import __all__ as __all__
