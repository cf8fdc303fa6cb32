"""DeepSpeed: configuration and placeholder classes."""

from __future__ import annotations

from ..settings.planned import DeepSpeedEngineWrapper, DeepSpeedOptimizerWrapper, DeepSpeedSchedulerWrapper
from ..settings.plugins.deepspeed import DummyOptim, DummyScheduler, get_active_deepspeed_plugin
from ..settings.plugins.deepspeed_config import HfDeepSpeedConfig

__all__ = [
    "DeepSpeedEngineWrapper",
    "DeepSpeedOptimizerWrapper",
    "DeepSpeedSchedulerWrapper",
    "DummyOptim",
    "DummyScheduler",
    "HfDeepSpeedConfig",
    "get_active_deepspeed_plugin",
]
