"""Logging where several processes run one script: the main process speaks, or all of them, or all in order.

`get_logger` wraps a standard logger; handlers and formats stay the standard library's business.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from .settings import env
from .state import PartialState

if TYPE_CHECKING:  # only type checkers know it as generic before Python 3.11
    _LoggerAdapter = logging.LoggerAdapter[logging.Logger]
else:
    _LoggerAdapter = logging.LoggerAdapter

# Our own frames between the caller and the standard logger. Up to Python 3.10 the standard library counts its own too.
_FRAMES = 2 if sys.version_info >= (3, 11) else 4

_LEVELS = "CRITICAL, ERROR, WARNING, INFO, DEBUG"

# What `warning_once` has said in this process: (logger, message, arguments).
_SAID: set[tuple[str, str, str]] = set()


class MultiProcessAdapter(_LoggerAdapter):
    """A logger that knows the processes of the run. Made by `get_logger`.

    Each call (``info``, ``warning`` …) takes two more keyword arguments:

    - ``main_process_only`` (default True): only the main process logs.
    - ``in_order`` (default False), with ``main_process_only=False``: the processes log one after the other, by rank.
      Every process must make the call, since they wait for each other.

    With several processes, ``[RANK i]`` stands before each message.
    """

    def __init__(self, logger: logging.Logger, extra: Any = None) -> None:
        super().__init__(logger, extra)

    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        """Logs `msg` on the processes that are to say it.

        Raises:
            RuntimeError: when the process does not know its rank yet.
        """
        if not PartialState._shared_state:
            raise RuntimeError(
                "accelerate's logger asks which process this is, and that is not known yet: create PartialState() or "
                "Accelerator() before the first message."
            )
        state = PartialState()
        main_process_only = kwargs.pop("main_process_only", True)
        in_order = kwargs.pop("in_order", False)
        # Counted from the caller, as the standard library does: 1 is the line that logs.
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + _FRAMES
        if main_process_only or not in_order:
            if state.is_main_process or not main_process_only:
                self._emit(level, msg, args, kwargs)
            return
        for rank in range(state.num_processes):
            if rank == state.process_index:
                self._emit(level, msg, args, kwargs)
            # Not left out where the level is off: it may be on elsewhere, and there they wait for this process.
            state.wait_for_everyone()

    def _emit(self, level: int, msg: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.isEnabledFor(level):
            text, options = self.process(msg, kwargs)
            self.logger.log(level, text, *args, **options)

    def process(self, msg: object, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Puts the rank before the message where there are several, and joins the call's ``extra`` to the adapter's."""
        extra = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        if extra:
            kwargs["extra"] = extra
        state = PartialState()
        return (f"[RANK {state.process_index}] {msg}" if state.num_processes > 1 else msg), kwargs

    def warning_once(self, msg: object, *args: Any, **kwargs: Any) -> None:
        """``warning``, but the same message with the same arguments only once in this process."""
        said = (self.logger.name, str(msg), repr(args))
        if said in _SAID:
            return
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        self.warning(msg, *args, **kwargs)
        _SAID.add(said)


def get_logger(name: str, log_level: str | None = None) -> MultiProcessAdapter:
    """The logger of that name, aware of the processes of the run.

    Args:
        name: As for `logging.getLogger`, usually ``__name__``.
        log_level: ``"DEBUG"``, ``"INFO"`` … in any case. None takes the variable ``ACCELERATE_LOG_LEVEL``; without that
            the logger's level stays as it is.

    Returns:
        An adapter around the standard logger. It can be made at any time; the first message needs `PartialState` or
        `Accelerator` to exist.

    Raises:
        ValueError: for an unknown level.

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
        raise ValueError(f"{source}={level!r} is no level of logging: choose from {_LEVELS}.") from error
    if not any(isinstance(handler, _Fallback) for handler in logger.handlers):
        logger.addHandler(_Fallback())


class _Fallback(logging.Handler):
    """Writes to stderr as long as nobody has set up logging, so that a level that was asked for is seen.

    The standard library's own fallback shows warnings and above only. As soon as a logger on the way up has a handler
    (`logging.basicConfig`), this one is silent.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not _has_other_handlers(record.name):
            print(self.format(record), file=sys.stderr)


def _has_other_handlers(name: str) -> bool:
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None:
        if any(not isinstance(handler, _Fallback) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False
