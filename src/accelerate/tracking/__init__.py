"""Experiment trackers: their interface (`GeneralTracker`), and the registry of trackers by name."""

from __future__ import annotations

from ..settings.planned import (
    AimTracker,
    ClearMLTracker,
    CometMLTracker,
    MLflowTracker,
    TensorBoardTracker,
    WandBTracker,
)
from .base import GeneralTracker, on_main_process
from .mixin import TrackingMixin
from .registry import filter_trackers, get_available_trackers, register_tracker_class, start_trackers

__all__ = [
    "AimTracker",
    "ClearMLTracker",
    "CometMLTracker",
    "GeneralTracker",
    "MLflowTracker",
    "TensorBoardTracker",
    "TrackingMixin",
    "WandBTracker",
    "filter_trackers",
    "get_available_trackers",
    "on_main_process",
    "register_tracker_class",
    "start_trackers",
]
