"""``accelerate test``: launches a script that checks this machine's setup and lists its checks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import launch
from .parsers import add, make_parser

_SCRIPT = Path(__file__).parents[1] / "test_utils" / "scripts" / "test_script.py"


def test_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Returns the command's parser."""
    parser = make_parser(
        "test",
        "Checks this machine's setup: launches a script like `accelerate launch`, and prints a line for each check. "
        "Flags of launch may follow.",
        subparsers,
    )
    add(parser, "--config_file", help="configuration file instead of the default one")
    parser.set_defaults(func=test_command, launch_flags=[])
    return parser


def test_command(args: argparse.Namespace) -> None:
    """Runs the check.

    Raises:
        SystemExit: with the check's exit code, unless it is 0.
    """
    code = _run(args)
    if code:
        raise SystemExit(code)


def _run(args: argparse.Namespace) -> int:
    chosen = ["--config_file", args.config_file] if args.config_file is not None else []
    return launch.main([*chosen, *args.launch_flags, str(_SCRIPT)])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `accelerate_cli.main`."""
    args, rest = test_command_parser().parse_known_args(sys.argv[1:] if argv is None else list(argv))
    args.launch_flags = rest
    return _run(args)


if __name__ == "__main__":
    sys.exit(main())
