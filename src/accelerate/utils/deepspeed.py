"""DeepSpeed: its configuration, and what stands in for its objects."""

from __future__ import annotations

from ..settings.deepspeed import DummyOptim, DummyScheduler, get_active_deepspeed_plugin
from ..settings.deepspeed_config import HfDeepSpeedConfig
from ..settings.planned import DeepSpeedEngineWrapper, DeepSpeedOptimizerWrapper, DeepSpeedSchedulerWrapper

__all__ = [
    "DeepSpeedEngineWrapper",
    "DeepSpeedOptimizerWrapper",
    "DeepSpeedSchedulerWrapper",
    "DummyOptim",
    "DummyScheduler",
    "HfDeepSpeedConfig",
    "get_active_deepspeed_plugin",
]
