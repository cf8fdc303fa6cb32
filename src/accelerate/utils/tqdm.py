"""The progress bar that one process draws. `accelerate.utils.tqdm` is this function as well as this module."""

from __future__ import annotations

from ..runtime.progress_bar import tqdm

__all__ = ["tqdm"]
