"""Runs a plan through its launcher, one row of a table for each.

A single process replaces this one by exec. Several are started by torch's elastic agent (`launch.local.worker_group`), which
imports torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec

from ..settings import env
from ..settings.launcher import LaunchSettings
from ..settings.option import SettingsError
from .console import log_line
from .exec_program import Runner, exec_program, run_subprocess, start_deepspeed, start_mpirun
from .host import HostInfo, detect_host, host_warnings, resolve_settings
from .plan import LaunchPlan, build_plan, require_script

_NOT_YET = "this version cannot train with it even where it is"
_FP8_PACKAGES = {"te": "transformer_engine", "ao": "torchao", "msamp": "msamp"}


def launch(settings: LaunchSettings, file: str | None = None, *, replace: bool = True) -> int:
    """Builds the plan for this host and runs it.

    Args:
        settings: From the command line and the configuration file.
        file: Path of the configuration file, for errors.
        replace: Whether a single process replaces this one by exec; otherwise, it is a child process.

    Returns:
        The exit code, unless this process was replaced.

    Raises:
        SettingsError: if the settings cannot be used on this host.
    """
    require_script(settings)  # before errors that name the file
    try:
        machine = detect_host(settings)
        resolved = resolve_settings(settings, machine)
        plan = build_plan(resolved)
    except SettingsError as error:
        raise SettingsError(f"{error} (configuration file {file})" if file is not None else str(error)) from None
    check_script(plan, resolved)
    if resolved.dry_run:
        return _print_plan(plan, resolved)
    check_engines(resolved)
    check_packages(plan, resolved)
    chosen = _defaults_notice(settings, resolved, machine) if file is None else []
    for line in (
        *plan.notices,
        *host_warnings(settings, machine),
        *_missing_device_notice(settings, machine, plan),
        *chosen,
    ):
        log_line(line, resolved.quiet)
    return _LAUNCHERS[plan.launcher](plan, resolved, exec_program if replace else run_subprocess)


def _print_plan(plan: LaunchPlan, settings: LaunchSettings) -> int:
    """Prints the plan for a shell; its packages and devices need not be on this host."""
    from .dry_run import format_plan

    text = format_plan(plan, settings, env.snapshot()) + "\n"
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode(errors="surrogateescape"))  # file names need not be valid text
    sys.stdout.flush()
    return 0


def check_script(plan: LaunchPlan, settings: LaunchSettings) -> None:
    """Checks that the script exists, before anything is started.

    Raises:
        SettingsError: if it does not.
    """
    if settings.module or plan.launcher == "tpu-pod":
        return  # python finds modules; the files of a pod are checked there
    if settings.no_python:
        _find_program(settings.script)
    elif not os.path.exists(settings.script):
        words = settings.script.removesuffix(".py").split(".")
        dotted = len(words) > 1 and all(map(str.isidentifier, words))
        hint = "; to run a module, put -m before its name" if dotted else ""
        raise SettingsError(f"script {settings.script} does not exist (looked in {os.getcwd()}{hint}).")
    elif plan.launcher == "tpu":
        from .engines.tpu import check_function

        check_function(settings)


def check_engines(settings: LaunchSettings) -> None:
    """Checks that at most one engine is enabled, before every rank raises for it.

    Raises:
        SettingsError: if there are several.
    """
    enabled = [name for name in ("use_deepspeed", "use_fsdp", "use_megatron_lm") if getattr(settings, name)]
    if len(enabled) > 1:
        raise SettingsError(f"{' and '.join(enabled)} contradict each other: choose one of them.")


def check_packages(plan: LaunchPlan, settings: LaunchSettings) -> None:
    """Checks that the libraries that the settings require are installed, without importing them.

    Raises:
        SettingsError: if one is not.
    """
    if plan.launcher == "tpu" and find_spec("torch_xla") is None:
        from .engines.tpu import INSTALL

        raise SettingsError(INSTALL)
    if plan.launcher == "sagemaker" and find_spec("sagemaker") is None:
        from .engines.sagemaker import INSTALL

        raise SettingsError(INSTALL)
    if settings.use_deepspeed and find_spec("deepspeed") is None:
        raise SettingsError(f"DeepSpeed is not installed, and {_NOT_YET}: leave --use_deepspeed out.")
    if settings.use_megatron_lm and find_spec("megatron") is None:
        raise SettingsError(f"Megatron-LM is not installed, and {_NOT_YET}: leave --use_megatron_lm out.")
    if settings.mixed_precision == "fp8":
        backend = settings.fp8.backend
        wanted = [_FP8_PACKAGES[backend]] if backend is not None else list(_FP8_PACKAGES.values())
        if not any(find_spec(package) is not None for package in wanted):
            libraries = f"one of {', '.join(wanted)}, and none" if len(wanted) > 1 else f"{wanted[0]}, which"
            raise SettingsError(f"mixed precision fp8 needs {libraries} is not installed; and {_NOT_YET}: use bf16.")


def _find_program(name: str) -> str:
    import shutil

    path = shutil.which(name)
    if path is None:
        raise SettingsError(f"program {name} does not exist, or may not be executed (--no_python runs it as it is).")
    return path


def _missing_device_notice(asked: LaunchSettings, machine: HostInfo, plan: LaunchPlan) -> list[str]:
    """Returns a line if this host lacks the devices that the settings require."""
    if plan.launcher not in ("python", "torch") or not asked.multi_gpu or machine.device != "cpu":
        return []
    return [f"found no {asked.device} device: without one, processes use the CPU"]


def _defaults_notice(asked: LaunchSettings, resolved: LaunchSettings, machine: HostInfo) -> list[str]:
    """Returns one line about the default number of processes and precision, if no setting chooses them."""
    if asked.num_processes is not None or resolved.placed_by or resolved.num_processes is None:
        return []
    processes = f"{resolved.processes} process{'' if resolved.processes == 1 else 'es'}"
    where = "the CPU" if machine.device == "cpu" else machine.device
    return [f"{processes} on {where}, mixed precision {resolved.mixed_precision or 'no'} (see -h to change)"]


def _run_single(plan: LaunchPlan, settings: LaunchSettings, start: Runner) -> int:
    """Runs the script as a single process."""
    environment = plan.merged_environment(env.snapshot())
    program = _find_program(plan.command[0]) if settings.no_python else plan.command[0]
    return start(program, plan.command, environment)


def _run_workers(plan: LaunchPlan, settings: LaunchSettings, start: Runner) -> int:
    from .local.worker_group import run

    return run(plan, settings)


def _pod(plan: LaunchPlan, settings: LaunchSettings, start: Runner) -> int:
    from .engines.tpu import run_remotely

    return run_remotely([plan.command, *plan.parallel_commands])


def _sagemaker(plan: LaunchPlan, settings: LaunchSettings, start: Runner) -> int:
    from .engines.sagemaker import start as start_job

    return start_job(plan.environment, settings)


_LAUNCHERS: dict[str, Callable[[LaunchPlan, LaunchSettings, Runner], int]] = {
    "python": _run_single,
    "torch": _run_workers,
    "mpirun": start_mpirun,
    "deepspeed": start_deepspeed,
    "tpu": _run_single,
    "tpu-pod": _pod,
    "sagemaker": _sagemaker,
}
