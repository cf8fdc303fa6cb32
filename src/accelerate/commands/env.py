"""``accelerate env``: versions, devices and configuration, ready to paste into a report."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..launch import config_file
from ..settings.option import SettingsError
from .parsers import add, make_parser

if TYPE_CHECKING:
    from ..runtime.devices import DeviceKind


def env_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The command's parser."""
    parser = make_parser("env", "Shows versions, devices and configuration, for a report.", subparsers)
    add(parser, "--config_file", help="configuration file to show instead of the default one")
    parser.set_defaults(func=env_command)
    return parser


def env_command(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the report and returns it by label.

    Raises:
        SettingsError: when the configuration file named does not exist or cannot be read.
    """
    report = _report(args.config_file)
    print("\nTo report a problem, copy the lines below and fill in what you did and saw.\n")
    for label, value in report.items():
        if isinstance(value, Mapping):
            print(f"- {label}:")
            print("\n".join(f"\t- {key}: {inner}" for key, inner in value.items()))
        else:
            print(f"- {label}: {value}")
    return report


def _report(path: str | None) -> dict[str, Any]:
    configuration = _configuration(path)  # first: a mistake here should not wait for torch
    import shutil

    import numpy
    import psutil
    import torch

    from .. import __version__
    from ..runtime.devices import default_kind

    kind = default_kind()
    report: dict[str, Any] = {
        "`Accelerate` version": __version__,
        "Platform": platform.platform(),
        "`accelerate` bash location": shutil.which("accelerate") or f"not on the PATH (this is {sys.argv[0]})",
        "Python version": platform.python_version(),
        "Numpy version": numpy.__version__,
        "PyTorch version": torch.__version__,
        "PyTorch accelerator": _accelerator(kind),
        "System RAM": f"{psutil.virtual_memory().total / 1024**3:.2f} GB",
    }
    if (name := _device_name(kind)) is not None:
        report["GPU type" if kind.name == "cuda" else f"{kind.name.upper()} type"] = name
    report["`Accelerate` default config" if path is None else "`Accelerate` config passed"] = configuration
    return report


def _accelerator(kind: DeviceKind) -> str:
    return "N/A" if kind.name == "cpu" else f"{kind.name.upper()} ({kind.count()})"


def _device_name(kind: DeviceKind) -> str | None:
    module = None if kind.name in ("cpu", "mps", "xla") else kind.torch_module()
    return str(module.get_device_name()) if module is not None and hasattr(module, "get_device_name") else None


def _configuration(path: str | None) -> dict[str, Any] | str:
    if path is None:
        path = config_file.default_path()
        if not os.path.isfile(path):
            return "Not found"
    elif not os.path.isfile(path):
        raise SettingsError(f"configuration file {path} does not exist.")
    from .config.config_args import load_config_from_file

    return load_config_from_file(path).to_dict()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `accelerate_cli.main`."""
    args = env_command_parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    try:
        env_command(args)
    except SettingsError as error:
        print(f"accelerate env: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
