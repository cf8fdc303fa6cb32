"""Argument parsing of the small subcommands: dashes for underscores, and one-line errors.

Help and messages show each flag in the documented spelling only.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """A parser whose flags are also accepted with dashes, and whose errors are one line and exit code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def add_argument(self, *spellings: str, **options: Any) -> argparse.Action:
        return _shown_as(spellings, super().add_argument(*with_dashes(spellings), **options))

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def with_dashes(spellings: tuple[str, ...]) -> list[str]:
    """Adds ``--a-b`` to ``--a_b``."""
    long = [spelling for spelling in spellings if spelling.startswith("--") and "_" in spelling]
    return [*spellings, *(spelling.replace("_", "-") for spelling in long)]


def make_parser(name: str, description: str, subparsers: Any = None) -> argparse.ArgumentParser:
    """Returns a standalone parser, or one added to `subparsers` (the result of ``add_subparsers``)."""
    if subparsers is not None:
        parser: argparse.ArgumentParser = subparsers.add_parser(name, description=description)
        return parser
    return CommandParser(prog=f"accelerate {name}", description=description)


def add(parser: argparse.ArgumentParser, *spellings: str, **options: Any) -> None:
    """Adds a flag, with dashes as well, to any argparse parser or group."""
    if isinstance(parser, CommandParser):
        parser.add_argument(*spellings, **options)
    else:
        _shown_as(spellings, parser.add_argument(*with_dashes(spellings), **options))


def _shown_as(spellings: tuple[str, ...], action: argparse.Action) -> argparse.Action:
    if action.option_strings:
        action.option_strings = list(
            spellings
        )  # the spellings in help and messages; the parser has registered the others already
    return action
