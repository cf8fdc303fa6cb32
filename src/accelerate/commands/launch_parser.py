"""The launcher's command line as an argparse parser, for programs that build on it (trl's command does)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..launch import parse
from ..settings.launcher import LaunchSettings
from ..settings.option import OptionSpec, SettingsError, option_specs
from .launch_help import format_help
from .parsers import with_dashes


class LaunchParser(argparse.ArgumentParser):
    """An argparse parser with all flags, which parses like ``accelerate launch``.

    The namespace holds every option by name, ``training_script``, ``training_script_args``, and in ``_given`` the names of
    options on the command line, so that a configuration file can fill in the others.
    """

    def parse_known_args(  # type: ignore[override]  # argparse's own is overloaded on the namespace
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        try:
            words = parse.split_args(sys.argv[1:] if args is None else args)
        except SettingsError as error:
            self.error(str(error))
        if words.help:
            print(format_help(words.flags))
            sys.exit(0)
        if not words.script:
            self.error("no script given. Write it after the launcher's flags.")
        namespace = argparse.Namespace() if namespace is None else namespace
        for entry in option_specs(LaunchSettings):
            setattr(namespace, entry.dest, words.flags.get(entry.dest, entry.option.default))
        for name, value in self._defaults.items():
            setattr(namespace, name, value)
        namespace.training_script = words.script
        namespace.training_script_args = list(words.script_args)
        namespace._given = frozenset(words.flags)
        return namespace, []

    def format_help(self) -> str:
        return format_help() + "\n"

    def error(self, message: str) -> NoReturn:
        print(f"accelerate launch: {message}", file=sys.stderr)
        sys.exit(2)


def make(command: Callable[[argparse.Namespace], None], subparsers: Any = None) -> argparse.ArgumentParser:
    """See `commands.launch.launch_command_parser`."""
    description = "Starts a script, on one process or many."
    if subparsers is not None:
        parser: argparse.ArgumentParser = subparsers.add_parser("launch", description=description, allow_abbrev=False)
    else:
        parser = LaunchParser(prog="accelerate launch", description=description, allow_abbrev=False)
    groups: dict[str, Any] = {}
    for entry in option_specs(LaunchSettings):
        if entry.group not in groups:
            groups[entry.group] = parser.add_argument_group(entry.group)
        _add(groups[entry.group], entry)
    parser.add_argument("training_script", help="the script, module or program to start")
    parser.add_argument("training_script_args", nargs=argparse.REMAINDER, help="its arguments")
    parser.set_defaults(func=command)
    return parser


def _add(group: Any, entry: OptionSpec) -> None:
    common = {"dest": entry.dest, "default": entry.option.default, "help": entry.option.help}
    spellings = with_dashes(entry.flags)
    if entry.option.switch:
        group.add_argument(*spellings, action="store_true", **common)
        if entry.option.off is not None:
            group.add_argument(*with_dashes((entry.option.off,)), action="store_false", **common)
        return

    def convert(text: str) -> Any:
        try:
            return entry.convert(text, entry.flags[0])
        except SettingsError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    if entry.type == "tuple[str, ...]":
        group.add_argument(*spellings, type=convert, action="extend", **{**common, "default": None})
    else:
        group.add_argument(*spellings, type=convert, choices=entry.option.choices or None, **common)
