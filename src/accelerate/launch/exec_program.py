"""Replaces this process by the script, or by an external launcher (mpirun, deepspeed) after checking the host."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from ..runtime.cluster.cluster_env import DEFAULT_PORT
from ..settings import env
from ..settings.launcher import LaunchSettings
from ..settings.option import SettingsError
from .console import log_line
from .plan import LaunchPlan

Runner = Callable[[str, Sequence[str], Mapping[str, str]], int]
"""Runs a program and returns its exit code: `exec_program` or `run_subprocess`."""


def exec_program(program: str, command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Replaces this process, so that signals, exit code and output are the program's own.

    Args:
        program: Path of the program.
        command: Its argument vector.
        environment: Its whole environment.

    Raises:
        SettingsError: if it cannot be started.
    """
    if os.name == "nt":  # there, exec starts another process and exits
        return run_subprocess(program, command, environment)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(program, list(command), dict(environment))
    except OSError as error:
        raise SettingsError(f"{program} cannot be started: {error.strerror}.") from None


def run_subprocess(program: str, command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs the program in a child process and waits for it, for callers that continue in Python.

    Args:
        program: Path of the program.
        command: Its argument vector.
        environment: Its whole environment.

    Returns:
        Its exit code; 128 plus the number of the signal that killed it.

    Raises:
        SettingsError: if it cannot be started.
    """
    import subprocess

    sys.stdout.flush()
    sys.stderr.flush()
    try:
        code = subprocess.run([program, *command[1:]], env=dict(environment), check=False).returncode
    except OSError as error:
        raise SettingsError(f"{program} cannot be started: {error.strerror}.") from None
    return code if code >= 0 else 128 - code


def start_mpirun(plan: LaunchPlan, settings: LaunchSettings, start: Runner) -> int:
    """Runs ``mpirun`` through `start`.

    Raises:
        SettingsError: if it cannot be used on this host.
    """
    import shutil

    from .engines import mpi

    environment = plan.merged_environment(env.snapshot())
    program = shutil.which("mpirun")
    if program is None:
        raise SettingsError(
            "mpirun is not installed, and --mpirun_hostfile asks for it: install Open MPI (apt install openmpi-bin), "
            "MPICH (apt install mpich) or Intel MPI, or leave --mpirun_hostfile (mpirun_config in the file) out."
        )
    mpi.check_host(settings, _is_root(), environment)
    if settings.machines == 1:
        wanted = DEFAULT_PORT if settings.main_process_port is None else settings.main_process_port
        environment["MASTER_PORT"] = str(_free_port(wanted, settings.quiet))
    return start(program, plan.command, environment)


def start_deepspeed(plan: LaunchPlan, settings: LaunchSettings, start: Runner) -> int:
    """Runs ``deepspeed``, which starts the processes on all machines, through `start`.

    Raises:
        SettingsError: if it cannot be used on this host.
    """
    import shutil

    from .engines import deepspeed

    environment = plan.merged_environment(env.snapshot())
    # In the folder of this interpreter first, as its virtual environment may not be activated.
    path = os.pathsep.join((os.path.dirname(sys.executable), environment.get("PATH", os.defpath)))
    program = shutil.which("deepspeed", path=path)
    if program is None:
        raise SettingsError("the command deepspeed is not installed: pip install deepspeed.")
    deepspeed.check_host(settings, _is_root(), environment)
    if not deepspeed.multinode_launcher(settings).forwards_environment:
        environment["DS_ENV_FILE"] = _memory_file(deepspeed.environment_file(plan.environment, environment))
        log_line(
            "the launcher's variables go to the other machines by a DS_ENV_FILE (with your .deepspeed_env)",
            settings.quiet,
        )
    return start(program, plan.command, environment)


def _memory_file(text: str) -> str:
    """Returns the path of an in-memory file, which disappears with this process and its children."""
    descriptor = os.memfd_create("deepspeed_env", 0)  # kept open over exec
    with os.fdopen(os.dup(descriptor), "w", encoding="utf-8") as file:
        file.write(text)
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _free_port(wanted: int, quiet: bool) -> int:
    """Returns `wanted`, or any free port on 127.0.0.1 if that is taken or 0."""
    from .local.local_rendezvous import listen_on_loopback

    try:
        with listen_on_loopback(wanted) as listening:
            port = int(listening.getsockname()[1])
    except OSError:
        with listen_on_loopback(0) as listening:
            port = int(listening.getsockname()[1])
    if port != wanted:
        log_line(f"{f'port {wanted} is taken, ' if wanted else ''}using port {port}", quiet)
    return port


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0
