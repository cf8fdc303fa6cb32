"""The part of `Accelerator` that logs to trackers: docstrings and a few lines each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import GeneralTracker
from .registry import start_trackers


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
        """The running tracker of that name, or with `unwrap` the object of the library behind it.

        Without such a tracker (or on a process that does not log), one that does nothing.
        """
        for tracker in self.trackers:
            if tracker.name == name:
                return tracker.tracker if unwrap else tracker
        return GeneralTracker(_blank=True)

    def log(self, values: dict[str, Any], step: int | None = None, log_kwargs: Any = None) -> None:
        """Sends values to every tracker.

        Args:
            values: Name -> number or text.
            step: The step they belong to.
            log_kwargs: Tracker's name -> arguments for its ``log``.
        """
        for tracker in self.trackers:
            tracker.log(values, step=step, **(log_kwargs or {}).get(tracker.name, {}))

    def _finish_trackers(self) -> None:
        for tracker in self.trackers:
            tracker.finish()
