"""``accelerate to-fsdp2``: turns a configuration file for FSDP 1 into one for FSDP 2; not in this version yet."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from .parsers import add, make_parser, not_yet


def to_fsdp2_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The command's parser."""
    parser = make_parser(
        "to-fsdp2",
        "Turns a configuration file for FSDP 1 into one for FSDP 2. This version does not have the command yet.",
        subparsers,
    )
    add(parser, "--config_file", help="the file to convert")
    add(parser, "--overwrite", action="store_true", help="write over it")
    add(parser, "--output_file", help="file for the result")
    parser.set_defaults(func=to_fsdp2_command)
    return parser


def to_fsdp2_command(args: argparse.Namespace) -> None:
    """Says that this version does not have the command.

    Raises:
        SystemExit: always, with code 2.
    """
    raise SystemExit(not_yet("to-fsdp2"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `accelerate_cli.main`."""
    words = sys.argv[1:] if argv is None else argv
    if "-h" in words or "--help" in words:
        to_fsdp2_command_parser().print_help()
        return 0
    return not_yet("to-fsdp2")


if __name__ == "__main__":
    sys.exit(main())
