"""Version comparisons."""

from __future__ import annotations

from ..runtime.system.availability import compare_versions, is_torch_version

__all__ = ["compare_versions", "is_torch_version"]
