"""Reads what the launcher published, by the declarations it was written with.

Precedence in a plugin: the constructor's argument, then the environment, then the default of the launcher's option.
"""

from __future__ import annotations

import functools
from typing import Any

from . import env
from .launcher import LaunchSettings
from .option import Entry, entries


@functools.cache
def _options() -> dict[str, Entry]:
    return {entry.dest: entry for entry in entries(LaunchSettings)}


def resolve(given: Any, field: str, dest: str) -> Any:
    """The value of a plugin's field.

    Args:
        given: The constructor's argument; None reads the launcher's variable.
        field: The field's name, for the message.
        dest: The launcher's option of the same meaning (``fp8_margin``).

    Raises:
        ValueError: when argument or variable cannot be what the option is.
    """
    entry = _options()[dest]
    if given is not None:
        return entry.convert(given, field)
    text = env.get(entry.variable) if entry.variable is not None else None
    return entry.convert(text, f"environment variable {entry.variable}") if text else entry.option.default


def default(dest: str) -> Any:
    """The default of one of the launcher's options."""
    return _options()[dest].option.default
