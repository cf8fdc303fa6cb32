"""``accelerate config default``: a configuration file for this machine, without questions."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, Literal

from ...launch import config_file
from ...settings.enums import ComputeEnvironment, DistributedType
from ...settings.launcher import LaunchSettings
from ...settings.option import SettingsError, option_specs
from ..parsers import add

default_config_file = config_file.default_path()

description = "Writes a configuration file for this machine: all its devices, or its CPU."


def write_basic_config(
    mixed_precision: str = "no", save_location: str | os.PathLike[str] = default_config_file
) -> Path | Literal[False]:
    """Writes a configuration file for this machine: all its devices, or its CPU if it has none.

    Args:
        mixed_precision: ``no``, ``fp16``, ``bf16`` or ``fp8``.
        save_location: The file.

    Returns:
        The file's path, or False if it exists, in which case it is left unchanged.

    Raises:
        ValueError: if the precision is unknown.
    """
    option = next(entry for entry in option_specs(LaunchSettings) if entry.dest == "mixed_precision")
    precision = option.convert(mixed_precision, "mixed_precision")
    path = Path(save_location)
    if path.exists():
        print(f"{path} exists already and is left as it is. Remove it, or name another file.")
        return False
    from ...launch.host import detect_host  # the command's help does without: dataclasses, a detect_host at the network
    from .config_args import ClusterConfig

    machine = detect_host(LaunchSettings())
    on_cpu = machine.device == "cpu" or (machine.devices == 0 and machine.device != "mps")
    count = 1 if on_cpu or machine.device == "mps" else machine.devices
    ClusterConfig(
        compute_environment=ComputeEnvironment.LOCAL_MACHINE,
        distributed_type=_distributed_type(machine.device, count),
        mixed_precision=precision,
        use_cpu=on_cpu,
        debug=False,
        num_processes=count,
    ).to_yaml_file(path)
    return path


def _distributed_type(device: str, count: int) -> DistributedType:
    if device == "xla":
        return DistributedType.XLA
    return (
        DistributedType(f"MULTI_{'GPU' if device == 'cuda' else device.upper()}") if count > 1 else DistributedType.NO
    )


def default_command_parser(parser: Any, parents: list[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds ``default`` to the subcommands of ``accelerate config``."""
    made: argparse.ArgumentParser = parser.add_parser(
        "default", parents=parents, description=description, help="write a file for this machine, without questions"
    )
    add(
        made,
        "--config_file",
        dest="save_location",
        metavar="CONFIG_FILE",
        default=default_config_file,
        help="the file to write instead of the default one",
    )
    add(made, "--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="mixed precision")
    made.set_defaults(func=default_config_command)
    return made


def default_config_command(args: argparse.Namespace) -> None:
    """Writes the file and prints its path."""
    try:
        written = write_basic_config(args.mixed_precision, args.save_location)
    except (SettingsError, OSError) as error:
        print(f"accelerate config default: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if written:
        print(f"accelerate configuration saved at {written}")
