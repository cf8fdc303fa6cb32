"""What every experiment tracker has: a name, whether it needs a folder, the library's own object, and five methods.

A subclass says where its values go; `Accelerator` calls it and never asks which one it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from ..state import PartialState

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Self = TypeVar("_Self")

_REQUIRED = {
    "name": 'a class attribute, such as name = "my_tracker", by which accelerator.get_tracker finds it',
    "requires_logging_directory": "a class attribute: True if the tracker writes into a folder it must be given",
    "tracker": "a property that returns the library's own run or writer",
}


def on_main_process(function: Callable[Concatenate[_Self, _P], _R]) -> Callable[Concatenate[_Self, _P], _R | None]:
    """Decorator for a tracker's method: with ``main_process_only`` (the default) only the main process runs it.

    Elsewhere the call does nothing and returns None.
    """

    @functools.wraps(function)
    def wrapped(self: _Self, /, *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        if getattr(self, "main_process_only", False) and not PartialState().is_main_process:
            return None
        return function(self, *args, **kwargs)

    return wrapped


class GeneralTracker:
    """Base of all trackers. Pass an instance of a subclass to ``Accelerator(log_with=...)``.

    A subclass has a ``name``, ``requires_logging_directory`` and a property ``tracker``, and implements
    `store_init_configuration` and `log`; `start` and `finish` where the library needs them.

    Args:
        _blank: Make a tracker that does nothing, for processes on which the real one does not exist.

    Raises:
        NotImplementedError: listing what a subclass lacks.

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
    """By which `Accelerator.get_tracker` finds it."""
    requires_logging_directory: bool
    """Whether it writes into a folder that it must be given."""
    main_process_only: bool = True
    """Whether methods decorated with `on_main_process` run on the main process only, or on all."""

    def __init__(self, _blank: bool = False) -> None:
        if _blank:
            self.tracker = None
        else:
            check_tracker(self)

    def start(self) -> None:
        """Opens the run. `Accelerator.init_trackers` calls it once, when the process group is up."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keeps the experiment's settings.

        Args:
            values: Hyperparameters by name: strings, numbers, booleans, None, and what the library takes beside these.
        """

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Records measurements.

        Args:
            values: By name.
            step: The training step they belong to.
            **kwargs: For the library's own function.
        """

    def finish(self) -> None:
        """Closes the run. `Accelerator.end_training` calls it."""


def check_tracker(tracker: GeneralTracker) -> None:
    """Raises NotImplementedError listing what the class of `tracker` lacks.

    The class is asked, not the instance: on processes without a run, a `tracker` property may have nothing to return.
    """
    missing = [name for name in _REQUIRED if not hasattr(type(tracker), name) and name not in vars(tracker)]
    if missing:
        lacking = "; ".join(f"`{name}` ({_REQUIRED[name]})" for name in missing)
        raise NotImplementedError(f"the tracker class {type(tracker).__name__} lacks {lacking}.")
