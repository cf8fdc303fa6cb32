"""Reads what the launcher published, by the declarations it was written with.

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
"""Stands for: what the launcher's option is when nobody sets it."""


def resolve(given: Any, field: str, dest: str, otherwise: Any = LAUNCHERS_DEFAULT) -> Any:
    """The value of a plugin's field.

    Args:
        given: The constructor's argument; None reads the launcher's variable.
        field: The field's name, for the message.
        dest: The launcher's option of the same meaning (``fp8_margin``).
        otherwise: The plugin's default, where it is not the launcher's.

    Raises:
        ValueError: when argument or variable cannot be what the option is.
    """
    entry = _options()[dest]
    if given is not None:
        return entry.convert(given, field)
    text = variable(dest)
    if text:
        return entry.convert(text, f"environment variable {entry.variable}")
    return entry.option.default if otherwise is LAUNCHERS_DEFAULT else otherwise


def variable(dest: str) -> str | None:
    """The text of the variable of one of the launcher's options; None: it is not set."""
    name = _options()[dest].variable
    return env.get(name) if name is not None else None


def default(dest: str) -> Any:
    """The default of one of the launcher's options."""
    return _options()[dest].option.default
