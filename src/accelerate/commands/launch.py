"""``accelerate launch``: parses the command line, starts the script and returns its exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..launch import parse
from ..settings.option import SettingsError

if TYPE_CHECKING:
    import argparse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``accelerate launch``.

    Args:
        argv: The words after it; None takes this process's.

    Returns:
        The exit code: the failing rank's own, 2 when the command line or the configuration cannot be used.
    """
    try:
        words = parse.split_args(sys.argv[1:] if argv is None else argv)
        if words.help:
            from .launch_help import format_help

            print(format_help(words.flags))
            return 0
        return _start(words, replace=True)
    except SettingsError as error:
        print(f"accelerate launch: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _start(words: parse.ParsedArgs, *, replace: bool) -> int:
    from ..launch.run import launch

    settings, file = parse.resolve_args(words)
    return launch(settings, file.path if file is not None else None, replace=replace)


def launch_command(args: argparse.Namespace) -> None:
    """Launches for `args` of `launch_command_parser`, and returns when the processes have ended.

    Raises:
        SystemExit: with the exit code, unless it is 0.
    """
    try:
        code = _start(parse.from_namespace(args), replace=False)
    except SettingsError as error:
        print(f"accelerate launch: {error}", file=sys.stderr)
        code = 2
    if code:
        raise SystemExit(code)


def launch_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Returns the parser of ``accelerate launch``, for programs that launch through it.

    Args:
        subparsers: The result of ``add_subparsers``, to add the parser to.
    """
    from .launch_parser import make

    return make(launch_command, subparsers)


if __name__ == "__main__":
    sys.exit(main())
