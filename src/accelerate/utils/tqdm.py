"""Progress bar on one process per machine. `accelerate.utils.tqdm` is both this module and its function."""

from __future__ import annotations

from ..runtime.progress_bar import tqdm

__all__ = ["tqdm"]
