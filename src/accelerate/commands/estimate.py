"""``accelerate estimate-memory``: estimates the memory that a model needs; not in this version yet."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from .parsers import add, make_parser, not_yet


def estimate_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The command's parser."""
    parser = make_parser(
        "estimate-memory",
        "Estimates the memory that a model needs. This version does not have the command yet.",
        subparsers,
    )
    add(parser, "model_name", help="a model on the Hub")
    add(parser, "--library_name", choices=("timm", "transformers"), help="the library the model is for")
    dtypes = ["float32", "float16", "int8", "int4"]
    add(parser, "--dtypes", nargs="+", default=dtypes, choices=dtypes, help="number formats to show")
    add(parser, "--trust_remote_code", action="store_true", help="run the code that the model's repository brings")
    parser.set_defaults(func=estimate_command)
    return parser


def estimate_command(args: argparse.Namespace) -> None:
    """Says that this version does not have the command.

    Raises:
        SystemExit: always, with code 2.
    """
    raise SystemExit(not_yet("estimate-memory"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `accelerate_cli.main`."""
    words = sys.argv[1:] if argv is None else argv
    if "-h" in words or "--help" in words:
        estimate_command_parser().print_help()
        return 0
    return not_yet("estimate-memory")


if __name__ == "__main__":
    sys.exit(main())
