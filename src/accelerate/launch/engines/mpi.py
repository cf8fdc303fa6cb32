"""mpirun of four MPI implementations: the command line, the hostfile, and detection of the one that is installed.

Open MPI's ``mpirun`` forwards to other hosts only the variables that are named; those that descend from MPICH forward all.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import NamedTuple

from ...runtime.cluster.cluster_env import DEFAULT_PORT, LOOPBACK
from ...settings.launcher import LaunchSettings
from ...settings.option import SettingsError


class MpiFlavor(NamedTuple):
    """Options of one implementation's ``mpirun``.

    Attributes:
        title: Its name.
        version_marker: Text in the output of ``mpirun --version``.
        hostfile: The flag for the file of hosts.
        per_host: The flag for processes per host.
        binding: Flags that bind each process to a processor socket.
        export: The flag that forwards one variable to other hosts; "" if all variables are forwarded.
        hostfile_format: A line of the hostfile: a host and its number of processes.
    """

    title: str
    version_marker: str
    hostfile: str
    per_host: str
    binding: tuple[str, ...]
    export: str
    hostfile_format: str


_HYDRA = ("-f", "-ppn")
# In this order, as the output of the first two contains HYDRA as well, the process manager of MPICH.
MPI_FLAVORS: dict[str, MpiFlavor] = {
    "intel": MpiFlavor("Intel MPI", "Intel(R) MPI", *_HYDRA, ("-genv", "I_MPI_PIN_DOMAIN", "socket"), "", "HOST:N"),
    "mvapich": MpiFlavor("MVAPICH", "MVAPICH", *_HYDRA, ("-bind-to", "socket"), "", "HOST:N"),
    "mpich": MpiFlavor("MPICH", "HYDRA", *_HYDRA, ("-bind-to", "socket"), "", "HOST:N"),
    "openmpi": MpiFlavor("Open MPI", "Open", "--hostfile", "--npernode", ("--bind-to", "socket"), "-x", "HOST slots=N"),
}


def command(settings: LaunchSettings, variables: Collection[str]) -> list[str]:
    """Returns ``mpirun`` and its flags; the command of each process follows them.

    Args:
        settings: The settings of the launch.
        variables: Names of the variables to forward.
    """
    mpi = MPI_FLAVORS[settings.mpi]
    words = ["mpirun", mpi.hostfile, str(settings.mpirun.hostfile), mpi.per_host, str(settings.processes_here)]
    words += ["-n", str(settings.processes)]
    oversubscribed = settings.cores is not None and settings.processes_here > settings.cores
    if mpi.export and oversubscribed:  # Open MPI refuses to bind more processes than there are cores
        words += ["--bind-to", "none"]
    else:
        words += mpi.binding
    if settings.machines > 1 or settings.elsewhere:
        words += [word for name in variables for word in (mpi.export, name)] if mpi.export else ["-genvall"]
    return words


def environment(settings: LaunchSettings) -> dict[str, str]:
    """Returns the rendezvous variables of the processes, and the number of oneCCL's threads."""
    port = settings.main_process_port or DEFAULT_PORT  # 0: a free port is found at the start
    address = str(settings.main_process_ip) if settings.machines > 1 else LOOPBACK
    added = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    if settings.mpirun.ccl is not None:
        added["CCL_WORKER_COUNT"] = settings.mpirun.ccl
    return added


def check(settings: LaunchSettings) -> None:
    """Checks the settings for mpirun.

    Raises:
        SettingsError: if they cannot be used.
    """
    if settings.machine_rank:
        raise SettingsError(
            f"machine_rank is {settings.machine_rank}, but mpirun starts the processes of all machines: start it on one "
            "of them, with machine_rank 0 or none."
        )
    if settings.mpirun.ccl is not None and not settings.mpirun.ccl.isdecimal():
        raise SettingsError(f"mpirun_ccl: expected the number of oneCCL's threads, found {settings.mpirun.ccl!r}.")


# Inspection of the host ----------------------------------------------------------------------------------------------


def detect_flavor() -> str:
    """Returns the key in `MPI_FLAVORS` of the first ``mpirun`` on the PATH; ``openmpi`` if there is none, or by default."""
    import shutil
    import subprocess

    if shutil.which("mpirun") is None:
        return "openmpi"
    try:
        done = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):  # starting it will raise with the reason
        return "openmpi"
    output = done.stdout + done.stderr
    found = next((name for name, mpi in MPI_FLAVORS.items() if mpi.version_marker in output), "openmpi")
    # MVAPICH installs mpirun_rsh as well; the output of its mpirun does not always name it.
    return "mvapich" if found == "mpich" and shutil.which("mpirun_rsh") is not None else found


def read_hostfile(path: str) -> tuple[str, ...]:
    """Returns the distinct hosts of a hostfile; none if there is no such file."""
    if not os.path.isfile(path):
        return ()
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.partition("#")[0].split() for line in file]
    return tuple(dict.fromkeys(_host(words[0]) for words in lines if words))


def any_remote(names: Iterable[str]) -> bool:
    """Returns whether any of the hosts may be another machine, as it is not a name of this one."""
    own = os.uname().nodename if hasattr(os, "uname") else ""
    return any(name not in ("localhost", own, own.partition(".")[0]) and name[:4] != "127." for name in names)


def _host(word: str) -> str:
    name, colon, hostfile_format = word.rpartition(":")
    return name if colon and hostfile_format.isdecimal() and ":" not in name else word


def check_host(settings: LaunchSettings, root: bool, variables: Collection[str]) -> None:
    """Checks the hostfile and the user on this host before ``mpirun`` starts.

    Args:
        settings: The settings of the launch.
        root: Whether this process belongs to root.
        variables: Names of the variables that are set here.

    Raises:
        SettingsError: if ``mpirun`` would fail.
    """
    mpi, path = MPI_FLAVORS[settings.mpi], str(settings.mpirun.hostfile)
    if not os.path.isfile(path):
        raise SettingsError(
            f"mpirun_hostfile: {path} does not exist. Write a host on each line, as in: {mpi.hostfile_format}"
        )
    with open(path, encoding="utf-8", errors="replace") as file:
        text = "".join(line.partition("#")[0] for line in file)
    if not text.strip():
        raise SettingsError(
            f"mpirun_hostfile: {path} names no host. Write a host on each line, as in: {mpi.hostfile_format}"
        )
    if not mpi.export and "slots=" in text:
        raise SettingsError(
            f"mpirun_hostfile: {path} is written for Open MPI, but mpirun is {mpi.title}'s: write {mpi.hostfile_format}"
        )
    if mpi.export:
        check_root(root, variables)


def check_root(root: bool, variables: Collection[str]) -> None:
    """Checks that Open MPI accepts the user.

    Raises:
        SettingsError: if this is root, and the variables that permit it are not set.
    """
    wanted = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    if root and not all(name in variables for name in wanted):
        raise SettingsError(
            f"Open MPI refuses to run as root. Be another user, or, if root is meant, set {wanted[0]}=1 and {wanted[1]}=1."
        )
