"""Methods of `Accelerator` that log to trackers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import GeneralTracker
from .registry import active_trackers, start_trackers


class TrackingMixin:
    """Adds the methods that log to trackers to `Accelerator`."""

    if TYPE_CHECKING:
        project_configuration: Any
        log_with: list[Any]
        trackers: list[GeneralTracker]

    def init_trackers(self, project_name: str, config: dict[str, Any] | None = None, init_kwargs: Any = None) -> None:
        """Starts the trackers selected by `log_with`.

        Args:
            project_name: Name of the project.
            config: Settings to store with the run.
            init_kwargs: Name of a tracker -> arguments of its constructor.
        """
        self.trackers = start_trackers(
            self.log_with, project_name, self.project_configuration.logging_dir, config, init_kwargs or {}
        )

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """Returns the running tracker of that name, or with `unwrap` the library's own object.

        Without trackers, and on a process on which the tracker does not log, returns a tracker that does nothing.

        Raises:
            ValueError: If there are trackers, but none of that name.
        """
        found = next((tracker for tracker in self.trackers if tracker.name == name), None)
        if found is None and self.trackers:
            names = ", ".join(repr(tracker.name) for tracker in self.trackers)
            raise ValueError(f"this run has no tracker {name!r}; it has {names}.")
        if found is None or not any(active_trackers([found])):
            return GeneralTracker(_blank=True)
        return found.tracker if unwrap else found

    def log(self, values: dict[str, Any], step: int | None = None, log_kwargs: Any = None) -> None:
        """Logs values to every tracker.

        Args:
            values: Name -> number or text.
            step: The step of the values.
            log_kwargs: Name of a tracker -> arguments of its ``log``.
        """
        for tracker in active_trackers(self.trackers):
            tracker.log(values, step=step, **(log_kwargs or {}).get(tracker.name, {}))

    def _finish_trackers(self) -> None:
        for tracker in active_trackers(self.trackers):
            tracker.finish()
