"""DeepSpeed's own launcher, for several machines: its command line, and checks of the host before it starts.

Its multi-node launchers differ: pdsh, SLURM and nossh can filter hosts and devices; those that use an MPI take the whole
hostfile.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from ...runtime.cluster.cluster_env import DEFAULT_PORT
from ...settings.launcher import LaunchSettings
from ...settings.option import SettingsError
from . import mpi


class MultinodeLauncher(NamedTuple):
    """One of DeepSpeed's multi-node launchers.

    Attributes:
        flags: Flags that select it.
        program: The program that must be installed.
        package: The package of that program.
        filters_hosts: Whether it can exclude hosts or devices of the hostfile.
        forwards_environment: Whether it forwards this environment to other machines.
        reparses_arguments: Whether a shell parses the script's arguments once more.
        sets_rendezvous: Whether it sets the processes' rendezvous address; MPI and SLURM set ranks only.
        runs_modules: Whether it can run modules, and programs other than Python.
    """

    flags: tuple[str, ...]
    program: str | None = None
    package: str = ""
    filters_hosts: bool = False
    forwards_environment: bool = False
    reparses_arguments: bool = False
    sets_rendezvous: bool = False
    runs_modules: bool = True


LAUNCHERS: dict[str, MultinodeLauncher] = {
    "pdsh": MultinodeLauncher(
        ("--launcher", "pdsh"),
        "pdsh",
        "pdsh (apt install pdsh)",
        filters_hosts=True,
        reparses_arguments=True,
        sets_rendezvous=True,
    ),
    "openmpi": MultinodeLauncher(("--launcher", "openmpi"), "ompi_info", "Open MPI (apt install openmpi-bin)"),
    "mvapich": MultinodeLauncher(("--launcher", "mvapich"), "mpiname", "MVAPICH2-GDR"),
    "mpich": MultinodeLauncher(
        ("--launcher", "mpich"), "mpirun", "MPICH (apt install mpich)", forwards_environment=True
    ),
    "slurm": MultinodeLauncher(
        ("--launcher", "slurm"),
        "sinfo",
        "SLURM's commands",
        filters_hosts=True,
        forwards_environment=True,
        runs_modules=False,
    ),
    "nossh": MultinodeLauncher(("--no_ssh",), filters_hosts=True, forwards_environment=True, sets_rendezvous=True),
}
# Characters of a variable's value that DeepSpeed does not quote; not every launcher removes the quotes.
_UNQUOTED = "_@%+=:,./-"
# Characters that a shell interprets, except for the space: DeepSpeed quotes arguments with spaces.
_SHELL_SPECIAL = frozenset("$`\"'\\;|&<>()*?[]{}~#!\n\t")


def multinode_launcher(settings: LaunchSettings) -> MultinodeLauncher:
    """Returns the multi-node launcher of `settings`."""
    return LAUNCHERS[settings.deepspeed.deepspeed_multinode_launcher or "pdsh"]


def check(settings: LaunchSettings) -> None:
    """Checks that the multi-node launcher supports the settings.

    Raises:
        SettingsError: if it does not.
    """
    options, launcher = settings.deepspeed, multinode_launcher(settings)
    name = options.deepspeed_multinode_launcher or "pdsh"
    chosen = options.deepspeed_inclusion_filter or options.deepspeed_exclusion_filter
    if options.deepspeed_hostfile is None:
        raise SettingsError(
            f"{settings.machines} machines through DeepSpeed's launcher {name} need a file of hosts: give "
            "--deepspeed_hostfile, or --deepspeed_multinode_launcher standard and start each machine yourself."
        )
    if options.deepspeed_inclusion_filter and options.deepspeed_exclusion_filter:
        raise SettingsError("--deepspeed_inclusion_filter and --deepspeed_exclusion_filter: give one of them.")
    if chosen and not launcher.filters_hosts:
        raise SettingsError(
            f"DeepSpeed's launcher {name} uses every host of the hostfile, so {chosen!r} cannot be chosen or left out: "
            "write another hostfile."
        )
    if name != "nossh" and settings.machine_rank:
        raise SettingsError(
            f"machine_rank is {settings.machine_rank}, but DeepSpeed's launcher {name} starts the processes of all "
            "machines: start it on one of them, with machine_rank 0 or none."
        )
    if name == "nossh" and settings.main_process_ip is None:
        raise SettingsError("DeepSpeed's launcher nossh needs the address of machine 0: give --main_process_ip.")
    if (settings.module or settings.no_python) and not launcher.runs_modules:
        raise SettingsError(f"DeepSpeed's launcher {name} runs Python files only: leave --module and --no_python out.")
    for word in settings.script_args if launcher.reparses_arguments else ():
        if _SHELL_SPECIAL & set(word):
            raise SettingsError(
                f"DeepSpeed's launcher {name} would let a shell on each machine read the script's argument {word!r}. "
                "Use --deepspeed_multinode_launcher standard, or have the script read it from a file."
            )


def command(settings: LaunchSettings) -> list[str]:
    """Returns ``deepspeed`` with its arguments."""
    options, launcher = settings.deepspeed, multinode_launcher(settings)
    words = ["deepspeed", "--hostfile", str(options.deepspeed_hostfile), "--no_local_rank", *launcher.flags]
    if launcher.flags == ("--no_ssh",):
        words += ["--node_rank", str(settings.machine_rank or 0)]
    if options.deepspeed_exclusion_filter is not None:
        words += ["--exclude", options.deepspeed_exclusion_filter]
    elif options.deepspeed_inclusion_filter is not None:
        words += ["--include", options.deepspeed_inclusion_filter]
    elif launcher.filters_hosts:
        words += ["--num_gpus", str(settings.processes_here)]
    if settings.main_process_ip is not None:
        words += ["--master_addr", settings.main_process_ip]
    words += ["--master_port", str(settings.main_process_port or DEFAULT_PORT)]
    words += (["--module"] if settings.module else []) + (["--no_python"] if settings.no_python else [])
    return [*words, settings.script, *settings.script_args]


def environment(settings: LaunchSettings) -> dict[str, str]:
    """Returns the rendezvous variables, unless DeepSpeed sets them."""
    if multinode_launcher(settings).sets_rendezvous:
        return {}
    address = {} if settings.main_process_ip is None else {"MASTER_ADDR": settings.main_process_ip}
    return {**address, "MASTER_PORT": str(settings.main_process_port or DEFAULT_PORT)}


# Inspection of the host ----------------------------------------------------------------------------------------------


def check_host(settings: LaunchSettings, root: bool, variables: Mapping[str, str]) -> None:
    """Checks the hostfile and the programs on this host before DeepSpeed starts.

    Args:
        settings: The settings of the launch.
        root: Whether this process belongs to root.
        variables: The environment.

    Raises:
        SettingsError: if DeepSpeed would fail.
    """
    import shutil

    path, launcher = str(settings.deepspeed.deepspeed_hostfile), multinode_launcher(settings)
    if not os.path.isfile(path):
        raise SettingsError(
            f"deepspeed_hostfile: {path} does not exist. Write a host on each line, as in: HOST slots=N"
        )
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file]
    hosts = [line for line in lines if line and not line.startswith("#")]
    for line in hosts:
        _, _, slots = line.partition(" ")
        if not slots.strip().partition("slots=")[2].partition(" ")[0].isdecimal():
            raise SettingsError(f"deepspeed_hostfile: {path}: expected HOST slots=N, found {line!r}.")
    if not hosts:
        raise SettingsError(f"deepspeed_hostfile: {path} names no host. Write a host on each line: HOST slots=N")
    if launcher.program is not None and shutil.which(launcher.program) is None:
        raise SettingsError(
            f"DeepSpeed's launcher needs {launcher.program}, which is not installed: {launcher.package}."
        )
    if settings.deepspeed.deepspeed_multinode_launcher == "openmpi":
        mpi.check_root(root, variables)


def environment_file(added: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Returns the content of the DS_ENV_FILE, whose variables DeepSpeed forwards: the user's own, then those of the plan.

    Args:
        added: Variables of the plan.
        here: The environment.

    Raises:
        SettingsError: if DeepSpeed would change a value.
    """
    name = here.get("DS_ENV_FILE", ".deepspeed_env")
    lines = []
    for path in dict.fromkeys(os.path.join(folder, name) for folder in (os.path.expanduser("~"), ".")):
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                lines += [line.strip() for line in file if line.strip()]
    for variable, value in added.items():
        if variable.startswith("PYTHON"):  # DeepSpeed forwards these by itself
            continue
        if not all(character.isalnum() or character in _UNQUOTED for character in value):
            raise SettingsError(
                f"DeepSpeed's launcher cannot hand {variable}={value!r} to other machines: only letters, digits and "
                f"{_UNQUOTED} reach them unchanged. Use --deepspeed_multinode_launcher standard, or another value."
            )
        lines.append(f"{variable}={value}")
    return "".join(f"{line}\n" for line in lines)
