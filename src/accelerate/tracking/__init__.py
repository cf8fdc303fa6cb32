"""Experiment trackers: what a tracker must have (`GeneralTracker`), and which are known by name (the registry)."""

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
from .methods import TrackerMethods
from .registry import filter_trackers, get_available_trackers, register_tracker_class, start_trackers

__all__ = [
    "AimTracker",
    "ClearMLTracker",
    "CometMLTracker",
    "GeneralTracker",
    "MLflowTracker",
    "TensorBoardTracker",
    "TrackerMethods",
    "WandBTracker",
    "filter_trackers",
    "get_available_trackers",
    "on_main_process",
    "register_tracker_class",
    "start_trackers",
]
