"""Installation of torch_xla."""

from __future__ import annotations

from ..runtime.system.xla_install import install_xla

__all__ = ["install_xla"]
