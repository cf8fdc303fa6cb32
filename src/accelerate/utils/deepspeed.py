"""DeepSpeed: its configuration, and what stands in for its objects."""

from __future__ import annotations

from ..settings.deepspeed import DummyOptim, DummyScheduler, get_active_deepspeed_plugin
from ..settings.deepspeed_config import HfDeepSpeedConfig

__all__ = ["DummyOptim", "DummyScheduler", "HfDeepSpeedConfig", "get_active_deepspeed_plugin"]
