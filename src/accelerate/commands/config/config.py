"""Parser of ``accelerate config`` and its subcommands; the questions are imported on use."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ..parsers import add, make_parser
from .default import default_command_parser
from .explain import explain_command_parser
from .update import update_command_parser

description = "Asks a few questions and writes the configuration file that `accelerate launch` reads."


def get_config_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Returns the parser of ``accelerate config`` with its subcommands."""
    parser = config_command_parser(subparsers)
    inner = parser.add_subparsers(title="subcommands", dest="subcommand")
    default_command_parser(inner, [])
    update_command_parser(inner, [])
    explain_command_parser(inner, [])
    return parser


def config_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Returns the parser of ``accelerate config`` without subcommands."""
    parser = make_parser("config", description, subparsers)
    add(parser, "--config_file", help="the file to write instead of the default one")
    parser.set_defaults(func=config_command)
    return parser


def config_command(args: argparse.Namespace) -> None:
    """Asks the questions and writes the file.

    Raises:
        SystemExit: with code 2 if an answer is missing or the file cannot be written, 130 after Ctrl-C.
    """
    from .questionnaire import run

    if code := run(args.config_file):
        raise SystemExit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `accelerate_cli.main`."""
    args = get_config_parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    args.func(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
