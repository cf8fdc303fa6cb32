"""How a process finds its peers: reads the launcher's variables, meets the others, says who is missing.

`from_environment` understands torchrun, Open MPI, MPICH and Intel MPI (PMI), MVAPICH and a SLURM step. `meet` opens the
store and waits until every rank has checked in, so that a rank that never comes is named instead of a bare timeout.
"""

from __future__ import annotations

import datetime
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch.distributed as dist

from ..settings import env


@dataclass(frozen=True)
class Placement:
    """Where a process stands in its run; `source` says in words who told us."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    source: str
    address: str = "127.0.0.1"
    port: int = 29500


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
    ("PMI (MPICH, Intel MPI)", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
    # SLURM_STEP_NUM_TASKS exists only under srun: a batch script that runs python itself is a single process.
    ("SLURM", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")),
)


def from_environment() -> Placement | None:
    """The place that the environment gives this process, or None when it is on its own.

    Raises:
        ValueError: when the variables contradict each other, naming them and their values.
    """
    for source, names in _LAUNCHERS:
        rank, size = env.integer(names[0], -1), env.integer(names[1], -1)
        if rank < 0 and size < 0:
            continue
        if source != "torchrun" and size <= 1:
            continue  # mpirun -n 1, srun --pty: nothing to join
        if rank < 0 or size < 0:
            if size == 1 or source == "SLURM":
                continue
            present, absent = (names[0], names[1]) if size < 0 else (names[1], names[0])
            raise ValueError(
                f"{present}={env.get(present)} is set but {absent} is not: a process of a distributed run needs both. "
                f"Start the script with `accelerate launch` or torchrun, or unset {present}."
            )
        return _checked(source, names, rank, size)
    return None


def of_group(rank: int, size: int) -> Placement:
    """The place of a process whose group somebody else initialised.

    The rank on this machine comes from the launcher's variables; without them, all ranks are taken to be on this machine.
    """
    for _, names in _LAUNCHERS:
        local_rank = env.integer(names[2], -1)
        if local_rank >= 0:
            return Placement(rank, size, local_rank, _local_size(names[3], size), "an initialised group")
    return Placement(rank, size, rank, size, "an initialised group")


def _checked(source: str, names: tuple[str, str, str, str], rank: int, size: int) -> Placement:
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
    address, port = _main_address(source)
    return Placement(rank, size, local_rank, local_size, source, address, port)


def _local_size(name: str, size: int) -> int:
    text = env.get(name)
    if text is None or text == "":
        return size
    # SLURM writes "2(x3),1": two on each of three nodes, one on the last. Unequal nodes: the largest is what counts here.
    counts = [int(count) for count in re.findall(r"(?:^|,)(\d+)", text)]
    if not counts:
        raise ValueError(f"environment variable {name}: expected a number of processes, found {text!r}.")
    return max(counts)


def _main_address(source: str) -> tuple[str, int]:
    port = env.integer("MASTER_PORT", -1)
    address = env.get("MASTER_ADDR")
    if source == "SLURM":
        if address is None:
            address = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1")
        if port < 0:  # every task of a job derives the same port, other jobs on the machine most likely another one
            port = 10000 + env.integer(("SLURM_JOB_ID", "SLURM_JOBID"), 0) % 50000
    return address or "127.0.0.1", port if port >= 0 else 29500


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: ``node[03-05,9],gpu1`` is ``node03``."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\]([^,]*))?", nodelist)
    if match is None:
        raise ValueError(f"cannot read the SLURM node list {nodelist!r}.")
    prefix, numbers, suffix = match.groups()
    return prefix if numbers is None else prefix + re.split(r"[-,]", numbers)[0] + (suffix or "")


def meet(place: Placement, init_method: str | None, timeout: datetime.timedelta) -> dist.Store:
    """Opens the store of the run and waits until every rank has checked in.

    Raises:
        RuntimeError: within `timeout`, when the main process cannot be reached, its port is taken, or ranks are missing.
    """
    # torch's own helpers (new groups, device meshes) and the user's code read torchrun's names; MPI and SLURM set others.
    env.publish(
        {
            "RANK": place.rank,
            "WORLD_SIZE": place.size,
            "LOCAL_RANK": place.local_rank,
            "LOCAL_WORLD_SIZE": place.local_size,
            "MASTER_ADDR": place.address,
            "MASTER_PORT": place.port,
        }
    )
    store = _open_store(place, init_method, timeout)
    # Processes may leave and join again on one store: each round of `size` check-ins has keys of its own.
    arrived = store.add("accelerate/arrived", 1)
    round_, last = (arrived - 1) // place.size, arrived % place.size == 0
    store.set(f"accelerate/{round_}/rank/{place.rank}", socket.gethostname())
    if last:
        store.set(f"accelerate/{round_}/complete", "1")
    try:
        store.wait([f"accelerate/{round_}/complete"], timeout)
    except dist.DistError as error:
        here = [rank for rank in range(place.size) if store.check([f"accelerate/{round_}/rank/{rank}"])]
        missing = [rank for rank in range(place.size) if rank not in here]
        raise RuntimeError(
            f"rank {place.rank} of {place.size} waited {timeout.total_seconds():g} s for "
            f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing))} to join and gave up. Look at "
            "what those processes printed: they may have failed, or be busy before they create Accelerator or "
            "PartialState. A longer wait: InitProcessGroupKwargs(timeout=...)."
        ) from error
    return dist.PrefixStore(f"accelerate/{round_}/group", store)


# The store last used, kept open: a peer that joins again must not find the old one closing under its hands.
_last_store: tuple[str, dist.Store] | None = None


def _open_store(place: Placement, init_method: str | None, timeout: datetime.timedelta) -> dist.Store:
    global _last_store
    where = init_method or f"{place.address}:{place.port}"
    key = f"{where} {place.rank}/{place.size} {env.get('TORCHELASTIC_RESTART_COUNT')}"
    if _last_store is not None and _last_store[0] == key and _answers(_last_store[1]):
        return _last_store[1]
    try:
        if init_method is None:
            store = _tcp_store(place, timeout)
        else:
            store, _, _ = next(dist.rendezvous(init_method, place.rank, place.size, timeout=timeout))
        _last_store = (key, store)
        return store
    except (dist.DistError, ValueError, OSError) as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise RuntimeError(
                f"rank 0 cannot listen on {where}: the port is taken. Choose another with --main_process_port or "
                "MASTER_PORT (0 lets the launcher pick a free one)."
            ) from error
        raise RuntimeError(
            f"rank {place.rank} of {place.size} could not meet its peers at {where} within "
            f"{timeout.total_seconds():g} s (placed by {place.source}). Check that rank 0 is running, that "
            "MASTER_ADDR and MASTER_PORT name its machine and port on every rank, and that no firewall is between them. "
            f"torch says: {error}"
        ) from error


def _answers(store: dist.Store) -> bool:
    try:
        store.check(["accelerate/arrived"])
    except dist.DistError:  # its server went with an earlier run
        return False
    return True


def _tcp_store(place: Placement, timeout: datetime.timedelta) -> dist.Store:
    # torch's own env:// handler would wait for all ranks inside the constructor, and could not say who is missing.
    agent = env.flag("TORCHELASTIC_USE_AGENT_STORE")
    serves = place.rank == 0 and not agent
    options: dict[str, Any] = {"timeout": timeout, "wait_for_workers": False, "multi_tenant": True}
    if serves and place.address in ("127.0.0.1", "localhost"):
        # Bound here, the store listens on the loopback interface only; torch would listen on all of them.
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", place.port))
            listener.listen(128)
            options["master_listen_fd"] = listener.detach()  # the store closes it
    store = dist.TCPStore(place.address, place.port, place.size, serves, **options)
    if agent:
        return dist.PrefixStore(f"/worker/attempt_{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


_recording = False


def record_errors() -> None:
    """Writes an exception that ends this process to the file torchrun's agent named, so that the launcher can quote it."""
    global _recording
    if _recording or env.get("TORCHELASTIC_ERROR_FILE") is None:
        return
    _recording = True
    previous: Callable[[type[BaseException], BaseException, TracebackType | None], Any] = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        if not isinstance(error, KeyboardInterrupt):
            previous(kind, error, trace)
            get_error_handler().record_exception(error)
        elif env.integer("LOCAL_RANK", 0) == 0:  # Ctrl-C reaches every rank: one of them says where it was
            previous(kind, error, trace)

    sys.excepthook = hook
