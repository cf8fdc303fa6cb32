"""Registry of tracker classes by name, and selection of the trackers of a run.

Entries are dotted names, so that a tracker's library is imported only if a run uses it.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..runtime import world
from ..settings.enums import LoggerType
from .base import GeneralTracker, check_tracker

logger = logging.getLogger(__name__)

# name -> "module:Class"; one module of this package per tracker
_BUILT_IN: dict[str, str] = {}
_registered: dict[str, type[GeneralTracker]] = {}


def register_tracker_class(tracker_class: type[GeneralTracker]) -> type[GeneralTracker]:
    """Registers a tracker class under its `name` for ``Accelerator(log_with=name)``. Works as a decorator.

    Its constructor is called like that of the built-in trackers: with the project's name, the folder if it requires one,
    and ``init_kwargs[name]``.
    """
    name = getattr(tracker_class, "name", None)
    if not isinstance(name, str):
        raise TypeError(f"{tracker_class.__name__} has no `name` (a string class attribute) to register it under.")
    _registered[name] = tracker_class
    return tracker_class


def get_available_trackers() -> list[str]:
    """Returns the names of the trackers of ``log_with="all"``: those whose library is installed."""
    return [*_BUILT_IN, *(name for name in _registered if name not in _BUILT_IN)]


def tracker_class(name: str) -> type[GeneralTracker]:
    """Returns the class of the tracker called `name`, and imports its module.

    Raises:
        ValueError: If there is none.
    """
    if name in _registered:
        return _registered[name]
    if name not in _BUILT_IN:
        raise ValueError(_unknown_tracker(name))
    module, _, attribute = _BUILT_IN[name].partition(":")
    found: type[GeneralTracker] = getattr(importlib.import_module(module), attribute)
    return found


def filter_trackers(
    log_with: str | LoggerType | GeneralTracker | Iterable[str | LoggerType | GeneralTracker] | None,
    logging_dir: str | os.PathLike[str] | None = None,
) -> list[str | GeneralTracker]:
    """Returns the trackers that a run uses: names and instances, each once, in the order given.

    Args:
        log_with: A tracker's name, a `LoggerType`, an instance of a `GeneralTracker` subclass, or several of these;
            ``"all"`` stands for every available tracker. None: no tracker.
        logging_dir: Folder for trackers that need one.

    Raises:
        ValueError: If a name is unknown, or a tracker needs a folder and there is none.
        TypeError: If an object is not a tracker.
        NotImplementedError: If the class of an instance lacks required attributes.
    """
    chosen: list[str | GeneralTracker] = []
    for wanted in _as_list(log_with):
        for tracker in _resolve(wanted, logging_dir):
            if tracker not in chosen:
                chosen.append(tracker)
    return chosen


def _as_list(log_with: object) -> list[object]:
    if log_with is None:
        return []
    if isinstance(log_with, (list, tuple, set, frozenset)):
        return list(log_with)
    return [log_with]


def _resolve(wanted: object, logging_dir: str | os.PathLike[str] | None) -> list[str | GeneralTracker]:
    if isinstance(wanted, GeneralTracker):
        check_tracker(wanted)
        return [wanted]
    if isinstance(wanted, type) and issubclass(wanted, GeneralTracker):
        raise TypeError(f"log_with has the class {wanted.__name__}: pass an instance, {wanted.__name__}(...).")
    if not isinstance(wanted, (str, LoggerType)):
        raise TypeError(
            f"log_with has {wanted!r}: expected the name of a tracker, a LoggerType or an instance of a GeneralTracker "
            "subclass."
        )
    name = str(wanted)
    if name == LoggerType.ALL.value:
        # Without a folder, "all" leaves out the trackers that need one.
        usable = [known for known in get_available_trackers() if logging_dir is not None or not _needs_folder(known)]
        if not usable:
            logger.warning(
                "log_with='all' finds no tracker that can be used here, and nothing is logged: this version has no "
                "built-in ones yet. Pass an instance of a GeneralTracker subclass as well (log_with=['all', tracker])."
            )
        return list(usable)
    tracker_class(name)  # raises for an unknown name
    if logging_dir is None and _needs_folder(name):
        raise ValueError(
            f"the tracker {name!r} needs a folder to write to: pass Accelerator(project_dir=...) or "
            "ProjectConfiguration(logging_dir=...)."
        )
    return [name]


def _needs_folder(name: str) -> bool:
    return bool(getattr(tracker_class(name), "requires_logging_directory", False))


def _unknown_tracker(name: str) -> str:
    if name in LoggerType:
        return (
            f"this version of accelerate has no built-in tracker {name!r} yet. Pass an instance of your own subclass "
            "of accelerate.tracking.GeneralTracker to log_with instead."
        )
    available = ", ".join(get_available_trackers()) or "none yet"
    return f"no tracker is called {name!r}; available: {available}. Or pass an instance of a GeneralTracker subclass."


def active_trackers(trackers: Iterable[GeneralTracker]) -> Iterator[GeneralTracker]:
    """Returns the trackers that log on this process: all on the main process, else those that log on every process."""
    is_main = world.current().rank == 0
    return (tracker for tracker in trackers if is_main or not tracker.main_process_only)


def start_trackers(
    chosen: Iterable[str | GeneralTracker],
    project_name: str,
    logging_dir: str | os.PathLike[str] | None = None,
    config: dict[str, Any] | None = None,
    init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[GeneralTracker]:
    """Creates the trackers that `filter_trackers` selected, starts their runs and stores the settings in them.

    Args:
        chosen: Names and instances; an instance is used as it is.
        project_name: Name of the project, for trackers given by name.
        logging_dir: Folder for trackers that need one.
        config: Settings to store; None stores nothing.
        init_kwargs: Name of a tracker -> further arguments of its constructor; other trackers' entries are ignored.
    """
    arguments = dict(init_kwargs or {})
    trackers = []
    for tracker in chosen:
        if isinstance(tracker, GeneralTracker):
            trackers.append(tracker)
            continue
        kind: Any = tracker_class(tracker)
        folder = [logging_dir] if kind.requires_logging_directory else []
        trackers.append(kind(project_name, *folder, **arguments.get(tracker, {})))
    for tracker in active_trackers(trackers):
        tracker.start()
        if config is not None:
            tracker.store_init_configuration(config)
    return trackers
