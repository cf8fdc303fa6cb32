"""Where a process stands in its run: what the variables of torchrun, MPI and SLURM say. Free of torch.

`from_environment` understands torchrun, Open MPI, MPICH and Intel MPI (PMI), MVAPICH and a SLURM step; `from_scheduler`
leaves torchrun out, for the launcher: it asks whether it has itself been started once for each process of the run.
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

from ...settings import env
from . import slurm

DEFAULT_PORT = 29500
LOOPBACK = "127.0.0.1"


class RankInfo(NamedTuple):
    """Where a process stands in its run.

    Attributes:
        rank: 0 to ``size - 1``, over all machines.
        size: Number of processes, over all machines.
        local_rank: 0 to ``local_size - 1``, on this machine.
        local_size: Number of processes on this machine.
        source: Who told us, in words.
        address: Where the main process is met.
        port: The port it is met at.
        address_source: What led to `address`, where it is rank 0's machine as a rule only.
        has_local_rank: Whether a launcher's variable gives `local_rank`.
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


# source, (rank, size, local rank, local size): the variables of each launcher, most specific first.
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
    """The place that the environment gives this process, or None when it is on its own.

    Args:
        address_needed: Whether the main process is met at the place's address.

    Raises:
        ValueError: when the variables contradict each other, naming them and their values; when nothing says where
            the main process is.
    """
    place = _detect(_LAUNCHERS)
    if place is not None and address_needed and not place.address:
        raise ValueError(
            f"{place.source} has started processes on several machines, and none of its variables says where rank 0 is: "
            "set MASTER_ADDR to the address of its machine, on every rank (mpirun -x MASTER_ADDR, or -genv MASTER_ADDR "
            "ADDRESS), or give --main_process_ip to accelerate launch."
        )
    return place


def from_scheduler() -> RankInfo | None:
    """The place that MPI or SLURM gives this process, whatever torchrun's variables say; None when it is on its own.

    The address is "" where nothing says where the main process is.

    Raises:
        ValueError: when the variables contradict each other, naming them and their values.
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
            continue  # srun --mpi=pmi2 sets these for every task; SLURM's own say more
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
    """The place of a process whose group somebody else initialised.

    The rank on this machine comes from the launcher's variables; without them, all ranks are taken to be on this machine.
    """
    for _, names in _LAUNCHERS:
        local_rank = env.integer(names[2], -1)
        if local_rank >= 0:
            return RankInfo(rank, size, local_rank, _local_size(names[3], size), "an initialised group")
    return RankInfo(rank, size, rank, size, "an initialised group", has_local_rank=False)


def _validated(source: str, names: tuple[str, str, str, str], rank: int, size: int) -> RankInfo:
    local_size = _local_size(names[3], size)
    local_rank = env.integer(names[2], -1)
    if local_rank < 0:
        local_rank = rank % local_size
    said = ", ".join(f"{name}={value}" for name in names if (value := env.get(name)) is not None)
    if size < 1 or rank >= size:
        raise ValueError(
            f"{source}'s variables contradict each other ({said}): a rank lies between 0 and the number of processes "
            f"minus one, and {rank} does not lie between 0 and {size - 1}."
        )
    if local_rank >= local_size or local_size > size:
        raise ValueError(
            f"{source}'s variables contradict each other ({said}): local rank {local_rank} of {local_size} processes "
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
    # SLURM writes "2(x3),1": two on each of three nodes, one on the last. Unequal nodes: the largest is what counts here.
    counts = [part.partition("(")[0] for part in text.split(",")]
    if not all(map(str.isdecimal, counts)):
        raise ValueError(f"environment variable {name}: expected a number of processes, found {text!r}.")
    return max(map(int, counts))


def _main_address(source: str, several_machines: bool) -> tuple[str, str]:
    """Where rank 0 is met, and what this was guessed from."""
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
    if nodes:  # srun, and mpirun inside of an allocation, fill the nodes in order
        return slurm.first_host(nodes), "SLURM's list of nodes"
    return "", ""


def _address_of_mpirun(uri: str) -> str:
    """``123.0;tcp://10.0.0.1,10.1.0.1:4321;tcp6://…`` -> ``10.0.0.1``, the machine on which mpirun runs."""
    for part in uri.split(";"):
        if part.startswith("tcp://"):
            return part.removeprefix("tcp://").rpartition(":")[0].split(",")[0]
    return ""
