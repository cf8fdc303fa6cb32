"""``accelerate env``: versions, devices and configuration, for bug reports.

Errors of one item are reported in its place and do not affect the others.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..launch import config_file
from ..settings import env
from ..settings.option import SettingsError
from .parsers import add, make_parser

if TYPE_CHECKING:
    from ..runtime.devices import DeviceKind

_PACKAGES = (
    *("aim", "bitsandbytes", "clearml", "comet_ml", "datasets", "deepspeed", "diffusers", "dvclive", "flash-attn"),
    *("huggingface_hub", "intel_extension_for_pytorch", "megatron-core", "mlflow", "mpi4py", "msgspec", "peft"),
    *("psutil", "pyyaml", "questionary", "rich", "safetensors", "sagemaker", "sentence-transformers", "swanlab"),
    *("tensorboard", "timm", "tokenizers", "torch_npu", "torch_xla", "torchao", "torchdata", "torchvision", "trackio"),
    *("transformer_engine", "transformers", "triton", "trl", "wandb"),
)
# Prefixes of variables that affect a run.
_PREFIXES = (
    *("ACCELERATE_", "DEEPSPEED_", "FSDP_", "MEGATRON_", "PARALLELISM_CONFIG_", "HF_", "TRANSFORMERS_", "AWS_"),
    *("TORCH", "PYTORCH_", "NCCL_", "GLOO_", "CCL_", "TP_", "UCX_", "OMP_", "KMP_", "MKL_", "MASTER_", "RANK"),
    *("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "SLURM_", "OMPI_", "PMI_", "MPI_"),
    *("CUDA_", "NVIDIA_", "HIP_", "ROCR_", "ZE_", "XLA_", "PJRT_", "TPU_", "USE_TORCH_XLA", "CONDA_DEFAULT_ENV"),
    *("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHASHSEED", "XDG_CACHE_HOME", "TOKENIZERS_", "WANDB_", "COMET_", "MLFLOW_"),
)
_SECRET_WORDS = frozenset(
    {"AUTH", "CREDENTIAL", "CREDENTIALS", "KEY", "KEYS", "PASS", "PASSWORD", "PASSWD", "SECRET", "TOKEN", "TOKENS"}
)
_MASK = "(set, not shown)"


def env_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Returns the command's parser."""
    parser = make_parser("env", "Shows versions, devices and configuration, for a report.", subparsers)
    add(parser, "--config_file", help="configuration file to show instead of the default one")
    add(parser, "--json", action="store_true", help="print JSON")
    parser.set_defaults(func=env_command, json=False)
    return parser


def env_command(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the report and returns it by label.

    Raises:
        SettingsError: after the report, when the configuration file does not exist or cannot be read.
    """
    configuration, error = _configuration(args.config_file)
    report = _report(args.config_file, configuration)
    if args.json:
        import json

        print(json.dumps({_slug(label): value for label, value in report.items()}, indent=2))
    else:
        print("\nTo report a problem, copy the lines below and fill in what you did and saw.\n")
        _print_lines(report)
    if error is not None:
        raise error
    return report


def _print_lines(report: Mapping[str, Any]) -> None:
    for label, value in report.items():
        if isinstance(value, Mapping):
            print(f"- {label}:" if value else f"- {label}: none")
            for key, inner in value.items():
                print(f"\t- {key}: {inner}")
        else:
            print(f"- {label}: {value}")


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")


def _report(path: str | None, configuration: Mapping[str, Any] | str) -> dict[str, Any]:
    import shutil

    report: dict[str, Any] = {
        "`Accelerate` version": _or_error(_own_version),
        "Platform": platform.platform(),
        "`accelerate` bash location": shutil.which("accelerate") or f"not on the PATH (this is {sys.argv[0]})",
        "Python version": platform.python_version(),
        "Numpy version": _or_error(lambda: _import("numpy").__version__),
        "PyTorch version": _or_error(lambda: _import("torch").__version__),
        "PyTorch accelerator": _or_error(_accelerator),
        "System RAM": _or_error(_memory),
    }
    devices = _devices()
    if devices:
        kind = report["PyTorch accelerator"].split()[0]
        report["GPU type" if kind == "CUDA" else f"{kind} type"] = next(iter(devices.values())).split(",")[0]
    report["`Accelerate` default config" if path is None else "`Accelerate` config passed"] = configuration
    if devices:
        report["Devices"] = devices
    report["CPU cores"] = _or_error(_cores)
    report["Environment variables"] = variables()
    report["Optional packages"] = _packages()
    return report


def _or_error(look: Callable[[], Any]) -> str:
    """Returns the result of `look`, or the error it raises."""
    try:
        return str(look())
    except Exception as error:  # noqa: BLE001 - the command must report on broken installations
        return f"unknown ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def _import(name: str) -> Any:
    import importlib

    return importlib.import_module(name)


def _own_version() -> str:
    from .. import __version__

    return __version__


def _kind() -> DeviceKind:
    from ..runtime.devices import default_kind

    return default_kind()


def _accelerator() -> str:
    kind = _kind()
    return "N/A" if kind.name == "cpu" else f"{kind.name.upper()} ({kind.count()})"


def _memory() -> str:
    import psutil

    return f"{psutil.virtual_memory().total / 1024**3:.2f} GB"


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} usable of {os.cpu_count()}"


def _devices() -> dict[str, str]:
    """Returns name and memory of each device of the default type, by index."""
    try:
        kind = _kind()
        module = None if kind.name in ("cpu", "mps", "xla") else kind.torch_module()
        if module is None or not hasattr(module, "get_device_name"):
            return {}
        return {f"{kind.name}:{n}": _or_error(functools.partial(_device, module, n)) for n in range(kind.count())}
    except Exception as error:  # noqa: BLE001 - as above
        return {"unknown": f"{type(error).__name__}: {error}"}


def _device(module: Any, number: int) -> str:
    properties = module.get_device_properties(number)
    memory = getattr(properties, "total_memory", None)
    name = str(module.get_device_name(number))
    return name if memory is None else f"{name}, {memory / 1024**3:.2f} GB"


def _configuration(path: str | None) -> tuple[dict[str, Any] | str, SettingsError | None]:
    """Returns the configuration and the problem with it, if any."""
    try:
        if path is None:
            path = config_file.default_path()
            if not os.path.isfile(path):
                return "Not found", None
        elif not os.path.isfile(path):
            raise SettingsError(f"configuration file {path} does not exist.")
        from .config.config_args import load_config_from_file

        content = load_config_from_file(path).to_dict()
        return {key: _MASK if _is_secret(key) else value for key, value in content.items()}, None
    except SettingsError as error:
        return f"cannot be used: {error}", error


def variables(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the variables that affect a run; values of those that look like secrets are hidden.

    Args:
        environment: The environment; None for that of this process.
    """
    found = env.snapshot() if environment is None else environment
    return {
        name: _MASK if _is_secret(name) else re.sub(r"://[^/@\s]+@", "://***@", value)
        for name, value in sorted(found.items())
        if name.startswith(_PREFIXES)
    }


def _is_secret(name: str) -> bool:
    return not _SECRET_WORDS.isdisjoint(re.split(r"[^A-Z0-9]+", name.upper()))


def _packages() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


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
