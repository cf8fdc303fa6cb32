"""The help of ``accelerate launch``: the groups of flags that matter for what is on the line already."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Collection

from ..settings.launcher import DISTRIBUTED, HARDWARE, PARADIGM, LaunchSettings
from ..settings.option import Entry, Section, entries
from ..settings.sections import RESOURCES

_ALWAYS_SHOWN = ("General", HARDWARE, RESOURCES, PARADIGM, DISTRIBUTED)


def format_help(given: Collection[str] = ()) -> str:
    """The help text: the groups that matter for everybody, and those that `given` flags (by ``dest``) turn on."""
    width = _terminal_width()
    lines = ["usage: accelerate launch [flags] script.py [arguments of the script]", ""]
    hidden: dict[str, str] = {}
    group = ""
    for entry in sorted(entries(LaunchSettings), key=lambda entry: _order(entry.group)):
        enabled_by = entry.section.enabled_by if entry.section is not None else None
        if entry.group not in _ALWAYS_SHOWN and enabled_by not in given and not _any_of(entry.section, given):
            hidden[entry.group] = f"--{enabled_by}" + (" FILE" if enabled_by == "mpirun_hostfile" else "")
            continue
        if entry.group != group:
            group = entry.group
            lines += ["", f"{group}:"] if len(lines) > 2 else [f"{group}:"]
        lines += _line(entry, width)
    if hidden:
        lines += ["", "More, shown by -h after the flag that turns it on:"]
        lines += [f"  {flag:<26}{title}" for title, flag in hidden.items()]
    return "\n".join([*lines, "", "Flags may be written with dashes. A flag wins over the configuration file."])


def _any_of(section: Section | None, given: Collection[str]) -> bool:
    return any(entry.section is section and entry.dest in given for entry in entries(LaunchSettings))


def _order(group: str) -> int:
    return _ALWAYS_SHOWN.index(group) if group in _ALWAYS_SHOWN else len(_ALWAYS_SHOWN)


def _line(entry: Entry, width: int) -> list[str]:
    shown = [flag for flag in (*reversed(entry.flags), entry.option.off) if flag]
    choices = "|".join(map(str, entry.option.choices))
    value = {"int": " N", "float": " X", "bool": " true|false"}.get(entry.type, " WORD")
    spelling = "  " + ", ".join(shown)
    text = entry.option.help
    if not entry.option.switch:
        spelling += f" {choices}" if choices and len(choices) < 40 else value
        text += f" ({choices.replace('|', ', ')})" if len(choices) >= 40 else ""
        text += f" (default {entry.render(entry.option.default)})" if entry.option.default not in (None, "", ()) else ""
    wrapped = textwrap.wrap(text, max(20, width - 30))
    if len(spelling) < 29:
        return [f"{spelling:<30}{wrapped[0]}", *(" " * 30 + line for line in wrapped[1:])]
    return [spelling, *(" " * 30 + line for line in wrapped)]


def _terminal_width() -> int:
    try:
        return min(120, max(60, os.get_terminal_size().columns))
    except OSError:  # not a terminal
        return 80
