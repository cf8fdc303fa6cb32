"""``accelerate tpu-config``: runs commands on a pod of TPUs; not in this version yet."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from .parsers import add, make_parser, not_yet


def tpu_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The command's parser."""
    parser = make_parser(
        "tpu-config", "Runs commands on a pod of TPUs. This version does not have the command yet.", subparsers
    )
    add(parser, "--config_file", help="configuration file instead of the default one")
    add(parser, "--tpu_name", help="name of the TPU")
    add(parser, "--tpu_zone", help="zone of the TPU")
    add(parser, "--use_alpha", action="store_true", help="use gcloud alpha")
    add(parser, "--command_file", help="file with commands to run")
    add(parser, "--command", action="append", nargs="+", help="a command to run, may be repeated")
    add(parser, "--install_accelerate", action="store_true", help="install accelerate on the pod")
    add(parser, "--accelerate_version", default="latest", help="the version to install")
    add(parser, "--debug", action="store_true", help="show the command instead of running it")
    parser.set_defaults(func=tpu_command_launcher)
    return parser


def tpu_command_launcher(args: argparse.Namespace) -> None:
    """Says that this version does not have the command.

    Raises:
        SystemExit: always, with code 2.
    """
    raise SystemExit(not_yet("tpu-config"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `accelerate_cli.main`."""
    words = sys.argv[1:] if argv is None else argv
    if "-h" in words or "--help" in words:
        tpu_command_parser().print_help()
        return 0
    return not_yet("tpu-config")


if __name__ == "__main__":
    sys.exit(main())
