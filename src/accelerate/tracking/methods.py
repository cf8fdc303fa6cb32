"""The part of `Accelerator` that logs to trackers: docstrings and a few lines each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import GeneralTracker
from .registry import logging_here, start_trackers


class TrackerMethods:
    """What an `Accelerator` does with trackers."""

    if TYPE_CHECKING:
        project_configuration: Any
        log_with: list[Any]
        trackers: list[GeneralTracker]

    def init_trackers(self, project_name: str, config: dict[str, Any] | None = None, init_kwargs: Any = None) -> None:
        """Starts the trackers chosen with `log_with`.

        Args:
            project_name: The run's name.
            config: Settings to store with it.
            init_kwargs: Tracker's name -> arguments for it.
        """
        self.trackers = start_trackers(
            self.log_with, project_name, self.project_configuration.logging_dir, config, init_kwargs or {}
        )

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """Returns the running tracker of that name, or with `unwrap` the object of the library behind it.

        In a run without trackers, and on a process that the tracker does not log on, returns one that does nothing.

        Raises:
            ValueError: If the run has trackers, and none of that name.
        """
        found = next((tracker for tracker in self.trackers if tracker.name == name), None)
        if found is None and self.trackers:
            names = ", ".join(repr(tracker.name) for tracker in self.trackers)
            raise ValueError(f"this run has no tracker {name!r}; it has {names}.")
        if found is None or not any(logging_here([found])):
            return GeneralTracker(_blank=True)
        return found.tracker if unwrap else found

    def log(self, values: dict[str, Any], step: int | None = None, log_kwargs: Any = None) -> None:
        """Sends values to every tracker.

        Args:
            values: Name -> number or text.
            step: The step they belong to.
            log_kwargs: Tracker's name -> arguments for its ``log``.
        """
        for tracker in logging_here(self.trackers):
            tracker.log(values, step=step, **(log_kwargs or {}).get(tracker.name, {}))

    def _finish_trackers(self) -> None:
        for tracker in logging_here(self.trackers):
            tracker.finish()
