"""The only reader and writer of ``os.environ`` in the package.

All values from the launcher, a scheduler or the user's shell are read here, so one module defines which spellings mean
true, how an invalid value is reported, and which variables are set for other libraries.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

_TRUE = frozenset({"y", "yes", "t", "true", "on", "1"})
_FALSE = frozenset({"n", "no", "f", "false", "off", "0"})

_T = TypeVar("_T")


def str_to_bool(value: str, to_bool: bool = False) -> int | bool:
    """Parses a truth value.

    Args:
        value: ``y, yes, t, true, on, 1`` or ``n, no, f, false, off, 0``, case-insensitive.
        to_bool: Return a `bool` instead of 1 or 0.

    Raises:
        ValueError: for any other word.
    """
    word = value.lower()
    if word in _TRUE:
        return True if to_bool else 1
    if word in _FALSE:
        return False if to_bool else 0
    raise ValueError(f"{value!r} is neither true nor false: write one of {sorted(_TRUE)} or {sorted(_FALSE)}.")


def get(name: str, default: str | None = None) -> str | None:
    """Returns the variable's text, or `default` if it is unset."""
    return os.environ.get(name, default)


def snapshot() -> dict[str, str]:
    """Returns a copy of the environment, for a child process."""
    return dict(os.environ)


def flag(name: str, default: bool = False) -> bool:
    """Returns the variable as a truth value; unset or empty means `default`.

    Raises:
        ValueError: if the text is neither true nor false; the message names the variable.
    """
    value = os.environ.get(name)
    if value is None or value == "":
        return default
    try:
        return bool(str_to_bool(value))
    except ValueError as error:
        raise ValueError(f"environment variable {name}: {error}") from None


def integer(names: str | Iterable[str], default: int) -> int:
    """The first of the variables that is set, as an integer; none set means `default`.

    Raises:
        ValueError: when the text is not an integer, naming the variable.
    """
    for name in (names,) if isinstance(names, str) else names:
        value = os.environ.get(name)
        if value is None or value == "":
            continue
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"environment variable {name}: expected an integer, found {value!r}.") from None
    return default


def choice(name: str, choices: Iterable[str], default: str) -> str:
    """The variable, in lower case, which must be one of `choices`; unset or empty means `default`.

    Raises:
        ValueError: for any other text, naming the variable.
    """
    value = os.environ.get(name) or default
    allowed = list(choices)
    if value.lower() not in allowed:
        raise ValueError(f"environment variable {name}: expected one of {allowed}, found {value!r}.")
    return value.lower()


def publish(variables: Mapping[str, object]) -> None:
    """Sets variables for this process and its children: the protocol other libraries read. ``None`` removes one."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = str(value)


# Documented under accelerate.utils ------------------------------------------------------------------------------


def get_int_from_env(env_keys: Iterable[str], default: int) -> int:
    """The first of `env_keys` that holds a non-negative integer, else `default`.

    Raises:
        ValueError: when a variable holds something that is not an integer.
    """
    for name in env_keys:
        value = integer(name, -1)
        if value >= 0:
            return value
    return default


def parse_flag_from_env(key: str, default: bool = False) -> bool:
    """Returns the variable `key` as a `bool`; see `flag`."""
    return flag(key, default)


def parse_choice_from_env(key: str, default: str = "no") -> str:
    """Returns the variable `key` as text, or `default` if it is unset."""
    return os.environ.get(key, default)


def are_libraries_initialized(*library_names: str) -> list[str]:
    """Returns the names in `library_names` that are already imported in this process."""
    return [name for name in library_names if name in sys.modules]


@contextmanager
def clear_environment() -> Iterator[None]:
    """Context manager that clears the environment and restores it on exit."""
    saved = dict(os.environ)
    os.environ.clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


@contextmanager
def patch_environment(**kwargs: object) -> Iterator[None]:
    """Context manager that sets variables (names are upper-cased) and restores their previous values on exit.

    Example:
        ```python
        with patch_environment(omp_num_threads=1):
            ...  # OMP_NUM_THREADS is "1" here
        ```
    """
    wanted = {name.upper(): str(value) for name, value in kwargs.items()}
    saved = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        publish(saved)


def purge_accelerate_environment(func_or_cls: _T) -> _T:
    """Decorates a test function or class to remove the ``ACCELERATE_*`` variables that it sets.

    On a class it applies to every method whose name starts with ``test``, including those of subclasses.
    """
    prefix = "ACCELERATE_"

    def wrap(function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            saved = {name: value for name, value in os.environ.items() if name.startswith(prefix)}
            try:
                return function(*args, **kwargs)
            finally:
                for name in [name for name in os.environ if name.startswith(prefix)]:
                    del os.environ[name]
                os.environ.update(saved)

        return wrapped

    if not isinstance(func_or_cls, type):
        return wrap(func_or_cls)  # type: ignore[no-any-return]  # the wrapped function keeps the caller's type

    def cover(cls: type) -> None:
        for name, member in list(vars(cls).items()):
            if name.startswith("test") and callable(member):
                setattr(cls, name, wrap(member))

    inherited = func_or_cls.__init_subclass__

    def init_subclass(cls: type, **kwargs: Any) -> None:
        inherited(**kwargs)
        cover(cls)

    cover(func_or_cls)
    func_or_cls.__init_subclass__ = classmethod(init_subclass)  # type: ignore[assignment]
    return func_or_cls


def convert_dict_to_env_variables(current_env: Mapping[str, object]) -> list[str]:
    """Returns ``NAME=value`` lines for a shell; entries that do not fit on a line are skipped with a warning."""
    import logging

    lines = []
    for name, value in current_env.items():
        text = str(value)
        if any(forbidden in name + text for forbidden in ";\n<>| ") or not name or not text:
            logging.getLogger(__name__).warning("skipping variable %s: %r cannot be written on one line", name, text)
        else:
            lines.append(f"{name}={text}\n")
    return lines
