"""Reads the launcher's environment variables, by the same declarations that wrote them.

Precedence in a plugin: the constructor's argument, then the environment, then the default of the launcher's option.
"""

from __future__ import annotations

import functools
from typing import Any

from . import env
from .launcher import LaunchSettings
from .option import OptionSpec, option_specs


@functools.cache
def _options() -> dict[str, OptionSpec]:
    return {entry.dest: entry for entry in option_specs(LaunchSettings)}


LAUNCHERS_DEFAULT: Any = object()
"""Sentinel for the default of the launcher's option."""


def resolve(given: Any, field: str, dest: str, otherwise: Any = LAUNCHERS_DEFAULT) -> Any:
    """Returns the value of a plugin's field.

    Args:
        given: The constructor's argument; None reads the launcher's variable.
        field: The field's name, for error messages.
        dest: The launcher's option with the same meaning (``fp8_margin``).
        otherwise: The plugin's default, where it differs from the launcher's.

    Raises:
        ValueError: if the argument or the variable is not a valid value of the option.
    """
    entry = _options()[dest]
    if given is not None:
        return entry.convert(given, field)
    text = variable(dest)
    if text:
        return entry.convert(text, f"environment variable {entry.variable}")
    return entry.option.default if otherwise is LAUNCHERS_DEFAULT else otherwise


def variable(dest: str) -> str | None:
    """Returns the text of a launcher option's environment variable, or None if it is unset."""
    name = _options()[dest].variable
    return env.get(name) if name is not None else None


def default(dest: str) -> Any:
    """Returns the default of a launcher option."""
    return _options()[dest].option.default
