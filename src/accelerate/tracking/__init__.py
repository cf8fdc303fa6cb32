"""Experiment trackers: what a tracker must have (`GeneralTracker`), and which are known by name (the registry)."""

from __future__ import annotations

from .base import GeneralTracker, on_main_process
from .methods import TrackerMethods
from .registry import filter_trackers, get_available_trackers, register_tracker_class, start_trackers

__all__ = [
    "GeneralTracker",
    "TrackerMethods",
    "filter_trackers",
    "get_available_trackers",
    "on_main_process",
    "register_tracker_class",
    "start_trackers",
]
