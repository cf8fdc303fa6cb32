"""``accelerate merge-weights``: merges a sharded checkpoint into one; not in this version yet."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from .parsers import add, make_parser, not_yet


def merge_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The command's parser."""
    parser = make_parser(
        "merge-weights", "Merges a sharded checkpoint into one. This version does not have the command yet.", subparsers
    )
    add(parser, "checkpoint_directory", help="folder of the sharded checkpoint")
    add(parser, "output_path", help="folder for the merged weights")
    add(parser, "--unsafe_serialization", action="store_true", help="write with torch.save instead of safetensors")
    add(parser, "--remove_checkpoint_dir", action="store_true", help="remove the sharded checkpoint afterwards")
    parser.set_defaults(func=merge_command)
    return parser


def merge_command(args: argparse.Namespace) -> None:
    """Says that this version does not have the command.

    Raises:
        SystemExit: always, with code 2.
    """
    raise SystemExit(not_yet("merge-weights"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `accelerate_cli.main`."""
    words = sys.argv[1:] if argv is None else argv
    if "-h" in words or "--help" in words:
        merge_command_parser().print_help()
        return 0
    return not_yet("merge-weights")


if __name__ == "__main__":
    sys.exit(main())
