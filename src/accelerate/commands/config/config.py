"""``accelerate config`` and its subcommands. The questions are not in this version yet; ``default`` asks none."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ..parsers import add, make_parser
from .default import default_command_parser

description = "Writes the configuration file that `accelerate launch` reads."


def get_config_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The parser of ``accelerate config`` with its subcommands."""
    parser = config_command_parser(subparsers)
    inner = parser.add_subparsers(title="subcommands", dest="subcommand")
    default_command_parser(inner, [])
    update = inner.add_parser("update", description="Brings a file up to date. Not in this version yet.")
    update.add_argument("--config_file", "--config-file", help="the file to bring up to date")
    update.set_defaults(func=update_config_command)
    return parser


def config_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The parser of ``accelerate config`` itself."""
    parser = make_parser("config", description, subparsers)
    add(parser, "--config_file", help="the file to write instead of the default one")
    parser.set_defaults(func=config_command)
    return parser


def config_command(args: argparse.Namespace) -> None:
    """Says what to do instead of answering questions.

    Raises:
        SystemExit: always, with code 2.
    """
    print(
        "accelerate config: this version of accelerate does not ask questions yet. `accelerate config default` writes "
        "a file for this machine; launch takes every setting as a flag as well.",
        file=sys.stderr,
    )
    raise SystemExit(2)


def update_config_command(args: argparse.Namespace) -> None:
    """Says that this version does not have the command.

    Raises:
        SystemExit: always, with code 2.
    """
    print("accelerate config update: this version of accelerate does not have this command yet.", file=sys.stderr)
    raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `accelerate_cli.main`."""
    args = get_config_parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    args.func(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
