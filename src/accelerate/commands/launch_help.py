"""Help of ``accelerate launch``: the groups of flags that apply to the flags already on the command line."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..settings.launcher import DISTRIBUTED, HARDWARE, PARADIGM, LaunchSettings
from ..settings.option import OptionSpec, Section, format_value, option_specs
from ..settings.option_groups import RESOURCES

_ALWAYS_SHOWN = ("General", HARDWARE, RESOURCES, PARADIGM, DISTRIBUTED)


def format_help(given: Mapping[str, Any] = MappingProxyType({})) -> str:
    """The help text: the groups that matter for everybody, and those that flags on the line turn on.

    Args:
        given: Values of the flags on the line, by ``dest``.
    """
    width = _terminal_width()
    lines = ["usage: accelerate launch [flags] script.py [arguments of the script]", ""]
    hidden: dict[str, str] = {}
    group = ""
    for entry in sorted(option_specs(LaunchSettings), key=lambda entry: _order(entry.group)):
        if entry.group not in _ALWAYS_SHOWN and not _is_relevant(entry.section, given):
            hidden[entry.group] = _turned_on_by(entry.section)
            continue
        if entry.group != group:
            group = entry.group
            lines += ["", f"{group}:"] if len(lines) > 2 else [f"{group}:"]
        lines += _line(entry, width)
    if hidden:
        lines += ["", "More, shown by -h after the flag that turns it on:"]
        lines += [f"  {flag:<26}{title}" for title, flag in hidden.items()]
    return "\n".join([*lines, "", "Flags may be written with dashes. A flag wins over the configuration file."])


def _is_relevant(section: Section | None, given: Mapping[str, Any]) -> bool:
    """Whether a group is turned on, or one of its flags is on the line already."""
    if section is not None and section.enabled_by in given:
        return True
    if section is not None and section.key == "fp8_config" and given.get("mixed_precision") == "fp8":
        return True
    return any(entry.section is section and entry.dest in given for entry in option_specs(LaunchSettings))


def _turned_on_by(section: Section | None) -> str:
    """The flag that turns a group on, as one types it."""
    name = section.enabled_by if section is not None else None
    entry = next(entry for entry in option_specs(LaunchSettings) if entry.dest == name)
    value = entry.option.choices[0] if entry.option.choices else "FILE" if name == "mpirun_hostfile" else "WORD"
    return entry.flags[0] if entry.option.switch else f"{entry.flags[0]} {value}"


def _order(group: str) -> int:
    return _ALWAYS_SHOWN.index(group) if group in _ALWAYS_SHOWN else len(_ALWAYS_SHOWN)


def _line(entry: OptionSpec, width: int) -> list[str]:
    shown = [flag for flag in (*reversed(entry.flags), entry.option.off) if flag]
    choices = "|".join(map(str, entry.option.choices))
    value = {"int": " N", "float": " X", "bool": " true|false"}.get(entry.type, " WORD")
    spelling = "  " + ", ".join(shown)
    text = entry.option.help
    if not entry.option.switch:
        spelling += f" {choices}" if choices and len(choices) < 40 else value
        text += f" ({choices.replace('|', ', ')})" if len(choices) >= 40 else ""
        text += f" (default {format_value(entry.option.default)})" if entry.option.default not in (None, "", ()) else ""
    wrapped = textwrap.wrap(text, max(20, width - 30))
    if len(spelling) < 29:
        return [f"{spelling:<30}{wrapped[0]}", *(" " * 30 + line for line in wrapped[1:])]
    flags = [spelling] if len(spelling) <= width else _broken(spelling.strip(), width)
    return [*flags, *(" " * 30 + line for line in wrapped)]


def _broken(spelling: str, width: int) -> list[str]:
    """A line of spellings that is too long, broken between them."""
    return textwrap.wrap(spelling, width, initial_indent="  ", subsequent_indent="      ", break_long_words=False)


def _terminal_width() -> int:
    try:
        return min(120, max(60, os.get_terminal_size().columns))
    except OSError:  # not a terminal
        return 80
