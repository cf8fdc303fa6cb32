"""Which trackers are known by name, and which of those a run uses.

A row is a dotted name, so that no tracker's library is imported before a run asks for it.
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

# name -> "module:Class"; the module lies in this package, one small file per tracker.
_BUILT_IN: dict[str, str] = {}
_registered: dict[str, type[GeneralTracker]] = {}


def register_tracker_class(tracker_class: type[GeneralTracker]) -> type[GeneralTracker]:
    """Makes a tracker class known by its `name`, so that ``Accelerator(log_with=name)`` finds it. Works as a decorator.

    Its constructor is called as that of the built-in trackers: with the project's name, the folder if it requires one,
    and ``init_kwargs[name]``.
    """
    name = getattr(tracker_class, "name", None)
    if not isinstance(name, str):
        raise TypeError(f"{tracker_class.__name__} has no `name` (a string class attribute) to be registered under.")
    _registered[name] = tracker_class
    return tracker_class


def get_available_trackers() -> list[str]:
    """Names of the trackers that ``log_with="all"`` stands for: those whose library is installed."""
    return [*_BUILT_IN, *(name for name in _registered if name not in _BUILT_IN)]


def tracker_class(name: str) -> type[GeneralTracker]:
    """The class of the tracker called `name`, its module imported.

    Raises:
        ValueError: when there is none.
    """
    if name in _registered:
        return _registered[name]
    if name not in _BUILT_IN:
        raise ValueError(_unknown(name))
    module, _, attribute = _BUILT_IN[name].partition(":")
    found: type[GeneralTracker] = getattr(importlib.import_module(module), attribute)
    return found


def filter_trackers(
    log_with: str | LoggerType | GeneralTracker | Iterable[str | LoggerType | GeneralTracker] | None,
    logging_dir: str | os.PathLike[str] | None = None,
) -> list[str | GeneralTracker]:
    """The trackers a run uses: names and instances, each once, in the order given.

    Args:
        log_with: A tracker's name, a `LoggerType`, an instance of a `GeneralTracker` subclass, or several of these;
            ``"all"`` stands for every available tracker. None: no tracker.
        logging_dir: Where trackers write that need a folder.

    Raises:
        ValueError: for a name nobody knows, or a tracker that needs a folder and gets none.
        TypeError: for something that is no tracker.
        NotImplementedError: for an instance whose class lacks something.
    """
    chosen: list[str | GeneralTracker] = []
    for wanted in _as_list(log_with):
        for tracker in _resolved(wanted, logging_dir):
            if tracker not in chosen:
                chosen.append(tracker)
    return chosen


def _as_list(log_with: object) -> list[object]:
    if log_with is None:
        return []
    if isinstance(log_with, (list, tuple, set, frozenset)):
        return list(log_with)
    return [log_with]


def _resolved(wanted: object, logging_dir: str | os.PathLike[str] | None) -> list[str | GeneralTracker]:
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
        # "all" means what can be used here: without a folder, that leaves out the trackers which need one.
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
            f"the tracker {name!r} writes into a folder: pass Accelerator(project_dir=...) or "
            "ProjectConfiguration(logging_dir=...)."
        )
    return [name]


def _needs_folder(name: str) -> bool:
    return bool(getattr(tracker_class(name), "requires_logging_directory", False))


def _unknown(name: str) -> str:
    if name in LoggerType:
        return (
            f"this version of accelerate has no built-in tracker {name!r} yet. Pass an instance of your own subclass "
            "of accelerate.tracking.GeneralTracker to log_with instead."
        )
    known = ", ".join(get_available_trackers()) or "none yet"
    return f"no tracker is called {name!r}; known by name: {known}. An instance of a GeneralTracker subclass works too."


def logging_here(trackers: Iterable[GeneralTracker]) -> Iterator[GeneralTracker]:
    """Yields the trackers that log on this process: on others than the main one, those that want every process."""
    is_main = world.current().rank == 0
    return (tracker for tracker in trackers if is_main or not tracker.main_process_only)


def start_trackers(
    chosen: Iterable[str | GeneralTracker],
    project_name: str,
    logging_dir: str | os.PathLike[str] | None = None,
    config: dict[str, Any] | None = None,
    init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[GeneralTracker]:
    """Builds the trackers that `filter_trackers` chose, opens their runs and stores the settings in them.

    Args:
        chosen: Names and instances; an instance is used as it is.
        project_name: The run's name, for trackers built by name.
        logging_dir: The folder, for those that need one.
        config: Settings to store; None stores nothing.
        init_kwargs: A tracker's name -> more arguments for its constructor; those for other trackers are not looked at.
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
    for tracker in logging_here(trackers):
        tracker.start()
        if config is not None:
            tracker.store_init_configuration(config)
    return trackers
