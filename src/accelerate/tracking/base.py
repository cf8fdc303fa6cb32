"""`GeneralTracker`, the interface of experiment trackers, through which `Accelerator` logs to any library."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from ..state import PartialState

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Self = TypeVar("_Self")

_REQUIRED = {
    "name": 'a class attribute, such as name = "my_tracker", for accelerator.get_tracker',
    "requires_logging_directory": "a class attribute: True if the tracker needs a folder to write to",
    "tracker": "a property that returns the library's own run or writer",
}


def on_main_process(function: Callable[Concatenate[_Self, _P], _R]) -> Callable[Concatenate[_Self, _P], _R | None]:
    """Decorator for a tracker's method: with ``main_process_only`` (the default) only the main process runs it.

    On other processes the call does nothing and returns None.
    """

    @functools.wraps(function)
    def wrapped(self: _Self, /, *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        if getattr(self, "main_process_only", False) and not PartialState().is_main_process:
            return None
        return function(self, *args, **kwargs)

    return wrapped


class GeneralTracker:
    """Base class of all trackers. Pass an instance of a subclass to ``Accelerator(log_with=...)``.

    A subclass defines ``name``, ``requires_logging_directory`` and a property ``tracker``, and implements
    `store_init_configuration` and `log`, and `start` and `finish` if the library needs them.

    Args:
        _blank: Create a tracker that does nothing, for processes on which the real one does not exist.

    Raises:
        NotImplementedError: If the subclass lacks required attributes.

    Example:
        ```python
        class CsvTracker(GeneralTracker):
            name = "csv"
            requires_logging_directory = False

            @on_main_process
            def __init__(self, path):
                super().__init__()
                self.file = open(path, "w")

            @property
            def tracker(self):
                return self.file

            @on_main_process
            def store_init_configuration(self, values):
                print("#", values, file=self.file)

            @on_main_process
            def log(self, values, step=None, **kwargs):
                print(step, *values.values(), sep=",", file=self.file)

            @on_main_process
            def finish(self):
                self.file.close()
        ```
    """

    name: str
    """Name for `Accelerator.get_tracker`."""
    requires_logging_directory: bool
    """Whether the tracker needs a folder to write to."""
    main_process_only: bool = True
    """Whether methods decorated with `on_main_process` run on the main process only, or on all."""

    def __init__(self, _blank: bool = False) -> None:
        if _blank:
            self.tracker = None
        else:
            check_tracker(self)

    def start(self) -> None:
        """Starts the run. `Accelerator.init_trackers` calls it once, when the process group is initialized."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Stores the experiment's settings.

        Args:
            values: Hyperparameters by name: strings, numbers, booleans, None, and further types that the library accepts.
        """

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Logs metrics.

        Args:
            values: Metrics by name.
            step: The training step of the metrics.
            **kwargs: Arguments of the library's own function.
        """

    def finish(self) -> None:
        """Finishes the run. `Accelerator.end_training` calls it."""


def check_tracker(tracker: GeneralTracker) -> None:
    """Raises NotImplementedError if the class of `tracker` lacks required attributes.

    Looks at the class instead of the instance: on processes without a run, a `tracker` property may raise.
    """
    missing = [name for name in _REQUIRED if not hasattr(type(tracker), name) and name not in vars(tracker)]
    if missing:
        lacking = "; ".join(f"`{name}` ({_REQUIRED[name]})" for name in missing)
        raise NotImplementedError(f"the tracker class {type(tracker).__name__} lacks {lacking}.")
