"""Logging from several processes: on the main process only, on all processes, or on all in the order of their ranks.

`get_logger` wraps a standard logger; handlers and formats are those of the standard library.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from .settings import env
from .state import PartialState

if TYPE_CHECKING:  # not generic at run time before Python 3.11
    _LoggerAdapter = logging.LoggerAdapter[logging.Logger]
else:
    _LoggerAdapter = logging.LoggerAdapter

# Frames between the caller and the standard logger. Up to Python 3.10 those of the standard library count too.
_FRAMES = 2 if sys.version_info >= (3, 11) else 4

_LEVELS = "CRITICAL, ERROR, WARNING, INFO, DEBUG"

# (logger, message, arguments) of each `warning_once` in this process
_EMITTED: set[tuple[str, str, str]] = set()


class MultiProcessAdapter(_LoggerAdapter):
    """A logger for several processes, created by `get_logger`.

    Each call (``info``, ``warning`` …) takes two more keyword arguments:

    - ``main_process_only`` (default True): only the main process logs.
    - ``in_order`` (default False), with ``main_process_only=False``: the processes log one after the other, by rank.
      Every process must make the call, which blocks until all have logged.

    With several processes, each message is prefixed with ``[RANK i]``.
    """

    def __init__(self, logger: logging.Logger, extra: Any = None) -> None:
        super().__init__(logger, extra)

    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        """Logs `msg` on the selected processes.

        Raises:
            RuntimeError: If neither `PartialState` nor `Accelerator` has been created.
        """
        if not PartialState._shared_state:
            raise RuntimeError(
                "accelerate's logger needs the rank of this process: create PartialState() or Accelerator() before the "
                "first message."
            )
        state = PartialState()
        main_process_only = kwargs.pop("main_process_only", True)
        in_order = kwargs.pop("in_order", False)
        # Counted from the caller, as in the standard library: 1 is the line that logs.
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + _FRAMES
        if main_process_only or not in_order:
            if state.is_main_process or not main_process_only:
                self._emit(level, msg, args, kwargs)
            return
        for rank in range(state.num_processes):
            if rank == state.process_index:
                self._emit(level, msg, args, kwargs)
            # Even if the level is disabled here: it may be enabled on other ranks, which block in this barrier.
            state.wait_for_everyone()

    def _emit(self, level: int, msg: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.isEnabledFor(level):
            text, options = self.process(msg, kwargs)
            self.logger.log(level, text, *args, **options)

    def process(self, msg: object, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Prefixes the message with the rank if there are several, and merges ``extra`` of the call and the adapter."""
        extra = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        if extra:
            kwargs["extra"] = extra
        state = PartialState()
        return (f"[RANK {state.process_index}] {msg}" if state.num_processes > 1 else msg), kwargs

    def warning_once(self, msg: object, *args: Any, **kwargs: Any) -> None:
        """Logs a warning, but the same message with the same arguments only once in this process."""
        key = (self.logger.name, str(msg), repr(args))
        if key in _EMITTED:
            return
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        self.warning(msg, *args, **kwargs)
        _EMITTED.add(key)


def get_logger(name: str, log_level: str | None = None) -> MultiProcessAdapter:
    """Returns the logger of that name, for several processes.

    Args:
        name: As for `logging.getLogger`, usually ``__name__``.
        log_level: ``"DEBUG"``, ``"INFO"`` …, case-insensitive. None reads the variable ``ACCELERATE_LOG_LEVEL``; if it is
            not set, the logger's level is unchanged.

    Returns:
        An adapter around the standard logger. It can be created at any time; logging a message needs `PartialState` or
        `Accelerator` to exist.

    Raises:
        ValueError: If the level is unknown.

    Example:
        ```python
        logger = get_logger(__name__, log_level="INFO")
        logger.info("once")
        logger.info("from every process, in order", main_process_only=False, in_order=True)
        ```
    """
    logger = logging.getLogger(name)
    source = "log_level"
    if log_level is None:
        log_level, source = env.get("ACCELERATE_LOG_LEVEL"), "ACCELERATE_LOG_LEVEL"
    if log_level:
        _set_level(logger, log_level, source)
    return MultiProcessAdapter(logger, {})


def _set_level(logger: logging.Logger, level: str, source: str) -> None:
    try:
        logger.setLevel(level.upper() if isinstance(level, str) else level)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}={level!r} is not a logging level: choose from {_LEVELS}.") from error
    if not any(isinstance(handler, _FallbackHandler) for handler in logger.handlers):
        logger.addHandler(_FallbackHandler())


class _FallbackHandler(logging.Handler):
    """Writes to stderr until logging is configured, so that messages of the requested level are visible.

    The standard library's own fallback shows warnings and above only. As soon as a parent logger has a handler
    (`logging.basicConfig`), this one emits nothing.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not _has_other_handlers(record.name):
            print(self.format(record), file=sys.stderr)


def _has_other_handlers(name: str) -> bool:
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None:
        if any(not isinstance(handler, _FallbackHandler) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False
