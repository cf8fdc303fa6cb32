"""``accelerate tpu-config``: runs commands on every worker of a TPU, through gcloud's ssh."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from ..settings.option import SettingsError
from .parsers import add, make_parser


def tpu_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Returns the command's parser."""
    parser = make_parser("tpu-config", "Runs commands on every worker of a TPU, through gcloud's ssh.", subparsers)
    where: Any = parser.add_argument_group("Config Arguments", "Arguments that `accelerate config` stores in a file.")
    add(where, "--config_file", help="configuration file instead of the default one")
    add(where, "--tpu_name", help="name of the TPU (default: the file's)")
    add(where, "--tpu_zone", help="zone of the TPU (default: the file's)")
    what: Any = parser.add_argument_group("TPU Arguments", "Arguments of the commands.")
    add(what, "--use_alpha", action="store_true", help="use gcloud alpha")
    add(what, "--command_file", help="file with commands to run")
    add(what, "--command", action="append", nargs="+", help="a command to run, may be repeated")
    add(what, "--install_accelerate", action="store_true", help="install accelerate first")
    add(what, "--accelerate_version", default="latest", help="the version to install: latest, dev, or a number")
    add(what, "--debug", action="store_true", help="print the command instead of running it")
    parser.set_defaults(func=tpu_command_launcher)
    return parser


def command(args: argparse.Namespace) -> list[str]:
    """Returns gcloud's command line for `args` and their configuration file.

    Command flags replace the file's commands; a flag for the name or the zone replaces that key.

    Raises:
        SettingsError: if a value is missing, or a file cannot be read.
    """
    from ..launch.config_file import load_config
    from ..launch.engines import tpu
    from ..settings.clouds import TpuCommandSettings
    from ..settings.option import build

    file = load_config(args.config_file)
    kept = build(TpuCommandSettings, file.values if file is not None else {})
    path, commands = kept.command_file, kept.commands
    if args.command_file is not None or args.command is not None:
        path, commands = args.command_file, tuple(" ".join(words) for words in args.command or ())
    listed = [*([tpu.read_commands(path)] if path is not None else []), *commands]
    script = tpu.remote_script(listed, args.accelerate_version if args.install_accelerate else None)
    return tpu.ssh_command(args.tpu_name or kept.tpu_name, args.tpu_zone or kept.tpu_zone, script, args.use_alpha)


def run(args: argparse.Namespace) -> int:
    """Runs or prints the command and returns the exit code."""
    from ..launch.engines.tpu import run_remotely

    try:
        words = command(args)
        if args.debug:
            print(shlex.join(words))
            return 0
        return run_remotely([words])
    except SettingsError as error:
        print(f"accelerate tpu-config: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def tpu_command_launcher(args: argparse.Namespace) -> None:
    """Runs the command for `args` of `tpu_command_parser`.

    Raises:
        SystemExit: with the exit code, unless it is 0.
    """
    if code := run(args):
        raise SystemExit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `accelerate_cli.main`."""
    return run(tpu_command_parser().parse_args(None if argv is None else list(argv)))


if __name__ == "__main__":
    sys.exit(main())
