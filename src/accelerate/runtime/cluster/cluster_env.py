"""Rank, world size and rendezvous address from the variables of torchrun, MPI and SLURM. Imports no torch.

`from_environment` supports torchrun, Open MPI, MPICH and Intel MPI (PMI), MVAPICH and SLURM steps. `from_scheduler` ignores
torchrun: the launcher uses it to find out whether a scheduler started it once per process.
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

from ...settings import env
from . import slurm

DEFAULT_PORT = 29500
LOOPBACK = "127.0.0.1"


class RankInfo(NamedTuple):
    """Ranks and rendezvous address of a process.

    Attributes:
        rank: Global rank, 0 to ``size - 1``.
        size: World size.
        local_rank: Rank on this machine, 0 to ``local_size - 1``.
        local_size: Number of processes on this machine.
        source: Name of the launcher that set the variables, for messages.
        address: Address of rank 0 for the rendezvous.
        port: Port of the rendezvous.
        address_source: The variable from which `address` was guessed, "" if it is given.
        has_local_rank: Whether a variable gives `local_rank`.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    source: str
    address: str = LOOPBACK
    port: int = DEFAULT_PORT
    address_source: str = ""
    has_local_rank: bool = True


# Launcher, (rank, size, local rank, local size): its variables, most specific launcher first.
_LAUNCHERS: tuple[tuple[str, tuple[str, str, str, str]], ...] = (
    ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")),
    (
        "Open MPI",
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    (
        "MVAPICH",
        ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ),
    ("MPICH or Intel MPI", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
    # SLURM_STEP_NUM_TASKS exists only under srun: a batch script that runs python itself is a single process.
    ("SLURM", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")),
)


def from_environment(address_needed: bool = True) -> RankInfo | None:
    """Reads this process's ranks from the environment; returns None for a single process.

    Args:
        address_needed: Raise if the address of rank 0 cannot be determined.

    Raises:
        ValueError: if the variables contradict each other, or none gives the address of rank 0.
    """
    info = _detect(_LAUNCHERS)
    if info is not None and address_needed and not info.address:
        raise ValueError(
            f"{info.source} started processes on several machines, and none of its variables gives the address of rank 0: "
            "set MASTER_ADDR to the address of its machine, on every rank (mpirun -x MASTER_ADDR, or -genv MASTER_ADDR "
            "ADDRESS), or pass --main_process_ip to accelerate launch."
        )
    return info


def from_scheduler() -> RankInfo | None:
    """Reads this process's ranks from the variables of MPI or SLURM only; returns None for a single process.

    The address is "" if no variable gives it.

    Raises:
        ValueError: if the variables contradict each other.
    """
    return _detect(_LAUNCHERS[1:])


def _detect(launchers: tuple[tuple[str, tuple[str, str, str, str]], ...]) -> RankInfo | None:
    for source, names in launchers:
        rank, size = env.integer(names[0], -1), env.integer(names[1], -1)
        if rank < 0 and size < 0:
            continue
        if source != "torchrun" and size <= 1:
            continue  # mpirun -n 1, srun --pty: nothing to join
        if names[0] == "PMI_RANK" and env.get(names[2]) is None and size == env.integer("SLURM_STEP_NUM_TASKS", -1):
            continue  # srun --mpi=pmi2 sets these for every task; SLURM's own variables have more information
        if rank < 0 or size < 0:
            if size == 1 or source == "SLURM":
                continue
            present, absent = (names[0], names[1]) if size < 0 else (names[1], names[0])
            raise ValueError(
                f"{present}={env.get(present)} is set but {absent} is not: a process of a distributed run needs both. "
                f"Start the script with `accelerate launch` or torchrun, or unset {present}."
            )
        return _validated(source, names, rank, size)
    return None


def from_group(rank: int, size: int) -> RankInfo:
    """Returns the ranks of a process whose group the user initialized.

    The local rank comes from the launcher's variables; without them, all ranks are assumed to be on this machine.
    """
    for _, names in _LAUNCHERS:
        local_rank = env.integer(names[2], -1)
        if local_rank >= 0:
            return RankInfo(rank, size, local_rank, _local_size(names[3], size), "an initialized group")
    return RankInfo(rank, size, rank, size, "an initialized group", has_local_rank=False)


def _validated(source: str, names: tuple[str, str, str, str], rank: int, size: int) -> RankInfo:
    local_size = _local_size(names[3], size)
    local_rank = env.integer(names[2], -1)
    if local_rank < 0:
        local_rank = rank % local_size
    values = ", ".join(f"{name}={value}" for name in names if (value := env.get(name)) is not None)
    if size < 1 or rank >= size:
        raise ValueError(
            f"{source}'s variables contradict each other ({values}): rank {rank} is not between 0 and {size - 1}."
        )
    if local_rank >= local_size or local_size > size:
        raise ValueError(
            f"{source}'s variables contradict each other ({values}): local rank {local_rank} of {local_size} processes "
            f"on this machine, {size} in all."
        )
    address, address_source = _main_address(source, local_size < size)
    port = env.integer("MASTER_PORT", -1)
    if port < 0:
        port = slurm.port() if source == "SLURM" else DEFAULT_PORT
    return RankInfo(rank, size, local_rank, local_size, source, address, port, address_source)


def _local_size(name: str, size: int) -> int:
    text = env.get(name)
    if text is None or text == "":
        return size
    # SLURM writes "2(x3),1": two tasks on each of three nodes, one on the last. Of unequal nodes, the largest number.
    counts = [part.partition("(")[0] for part in text.split(",")]
    if not all(map(str.isdecimal, counts)):
        raise ValueError(f"environment variable {name}: expected a number of processes, found {text!r}.")
    return max(map(int, counts))


def _main_address(source: str, several_machines: bool) -> tuple[str, str]:
    """Returns the address of rank 0, and the source from which it was guessed ("" if a variable gives it)."""
    address = env.get("MASTER_ADDR")
    if address:
        return address, ""
    nodes = slurm.nodelist()
    if source == "SLURM":
        several_machines = nodes != "" and len(list(islice(slurm.hosts(nodes), 2))) > 1
    if not several_machines or source == "torchrun":
        return LOOPBACK, ""
    if source == "Open MPI" and (mpirun_at := _address_of_mpirun(env.get("OMPI_MCA_orte_hnp_uri") or "")):
        return mpirun_at, "OMPI_MCA_orte_hnp_uri"
    if nodes:  # srun, and mpirun inside an allocation, fill the nodes in order
        return slurm.first_host(nodes), "SLURM's list of nodes"
    return "", ""


def _address_of_mpirun(uri: str) -> str:
    """Parses the address of mpirun's machine: ``10.0.0.1`` from ``123.0;tcp://10.0.0.1,10.1.0.1:4321;tcp6://…``."""
    for part in uri.split(";"):
        if part.startswith("tcp://"):
            return part.removeprefix("tcp://").rpartition(":")[0].split(",")[0]
    return ""
