"""Machine information that needs no process group: kernel, ports, GPUs and NUMA nodes.

The launcher imports this module too, so torch is imported only by functions that query device properties.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...settings import env
from .. import devices
from ..cluster.cluster_env import RankInfo, from_scheduler
from . import availability

logger = logging.getLogger(__name__)

_SYSFS = Path("/sys")


# Ranks ----------------------------------------------------------------------------------------------------------------


@dataclass
class CPUInformation:
    """Ranks and sizes of a process that torchrun or MPI started.

    Attributes:
        rank: Global rank, 0 to ``world_size - 1``.
        world_size: Number of processes.
        local_rank: Rank on this machine, 0 to ``local_world_size - 1``.
        local_world_size: Number of processes on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def get_cpu_distributed_information() -> CPUInformation:
    """Reads this process's ranks from the variables of torchrun, Open MPI, MVAPICH, MPICH, Intel MPI or SLURM."""
    info = from_scheduler() or RankInfo(0, 1, 0, 1, "")

    def read(torchrun: str, pmi: str, others: str, default: int) -> int:
        return env.get_int_from_env((torchrun, pmi, f"OMPI_{others}", f"MV2_{others}"), default)

    return CPUInformation(
        rank=read("RANK", "PMI_RANK", "COMM_WORLD_RANK", info.rank),
        world_size=read("WORLD_SIZE", "PMI_SIZE", "COMM_WORLD_SIZE", info.size),
        local_rank=read("LOCAL_RANK", "MPI_LOCALRANKID", "COMM_WORLD_LOCAL_RANK", info.local_rank),
        local_world_size=read("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "COMM_WORLD_LOCAL_SIZE", info.local_size),
    )


def get_current_device_type() -> tuple[str, str]:
    """Returns the default device type, and the name of the `DistributedType` of a run over several such devices.

    Initializes no device, so that the process may still fork.

    Example:
        >>> get_current_device_type()  # on a machine without accelerators
        ('cpu', 'MULTI_CPU')
    """
    with env.patch_environment(PYTORCH_NVML_BASED_CUDA_CHECK="1"):
        kind = devices.default_kind()
    return kind.name, kind.distributed_type.value


# Kernel and ports -----------------------------------------------------------------------------------------------------


def check_os_kernel() -> None:
    """Warns if the Linux kernel is older than 5.5, with which distributed runs may hang."""
    if platform.system() != "Linux":
        return
    release = platform.release()
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is not None and tuple(map(int, found.groups())) < (5, 5):
        logger.warning(
            "this machine runs Linux %s; with kernels before 5.5, processes of a distributed run may hang. Update the "
            "kernel if that happens.",
            release,
        )


def is_port_in_use(port: int | str | None = None) -> bool:
    """Returns whether a process on this machine listens on a port, by default 29500, torchrun's default."""
    number = 29500 if port is None else int(port)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe_socket:
        return probe_socket.connect_ex(("localhost", number)) == 0


def get_free_port() -> int:
    """Returns a port that is free at the moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


# GPUs -----------------------------------------------------------------------------------------------------------------


def get_gpu_info() -> tuple[list[str], int]:
    """Returns the names of the visible CUDA devices, and their number."""
    if not availability.is_cuda_available():
        return [], 0
    import torch

    count = torch.cuda.device_count()
    return [torch.cuda.get_device_name(index) for index in range(count)], count


def get_driver_version() -> str | None:
    """Returns the version of NVIDIA's kernel driver (``"550.54.15"``), or None if it is not loaded."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found.group(1) if found else None


def check_cuda_p2p_ib_support() -> bool:
    """Returns whether NCCL can use P2P and InfiniBand between the visible GPUs.

    False for several GeForce RTX 40 cards with a driver before 550.40.07, which reports P2P support wrongly: NCCL hangs
    unless NCCL_P2P_DISABLE and NCCL_IB_DISABLE are set.
    """
    return p2p_supported(get_gpu_info()[0])


def p2p_supported(names: list[str]) -> bool:
    """Returns `check_cuda_p2p_ib_support` of cards with these names. Imports no torch."""
    if len(names) < 2 or not any(re.search(r"\bRTX 40\d\d\b", name) for name in names):
        return True
    driver = get_driver_version()
    if driver is None:
        return True
    return tuple(map(int, driver.split("."))) >= (550, 40, 7)


@functools.lru_cache
def check_cuda_fp8_capability() -> bool:
    """Returns whether the current CUDA device supports fp8 matrix products (compute capability 8.9 or later)."""
    if not availability.is_cuda_available():
        return False
    import torch

    return torch.cuda.get_device_capability() >= (8, 9)


# NUMA -----------------------------------------------------------------------------------------------------------------


def override_numa_affinity(local_process_index: int, verbose: bool | None = None) -> None:
    """Binds this process to the CPUs of its device's NUMA node; see `set_numa_affinity`, which does this only once.

    Args:
        local_process_index: The local rank.
        verbose: Log the binding; None logs it if ``ACCELERATE_DEBUG_MODE`` is set.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise OSError(
            f"CPU affinity needs Linux, and this is {platform.system()}: disable it (--enable_cpu_affinity, "
            "ACCELERATE_CPU_AFFINITY)."
        )
    node, processors = _node_for(local_process_index)
    if not processors:
        logger.warning("process %d is not bound: no processor of NUMA node %s is free to it", local_process_index, node)
        return
    os.sched_setaffinity(0, processors)
    if env.flag("ACCELERATE_DEBUG_MODE") if verbose is None else verbose:
        # Every rank logs its own binding.
        logger.info(
            "process %d runs on NUMA node %d, processors %s", local_process_index, node, _format_cpulist(processors)
        )


@functools.lru_cache
def set_numa_affinity(local_process_index: int, verbose: bool | None = None) -> None:
    """Binds this process to the CPUs of the NUMA node of its device, once per process.

    The node of a GPU is found by its PCI address; processes without GPU are distributed evenly over the nodes in rank order.
    CPUs outside the process's affinity mask (taskset, a container's cpuset) are not used.

    Args:
        local_process_index: The local rank.
        verbose: Log the binding; None logs it if ``ACCELERATE_DEBUG_MODE`` is set.

    Raises:
        OSError: on systems without `os.sched_setaffinity`.

    Example:
        ```python
        state = PartialState()
        set_numa_affinity(state.local_process_index)
        ```
    """
    override_numa_affinity(local_process_index, verbose)


def _node_for(local_process_index: int) -> tuple[int, set[int]]:
    nodes = _numa_nodes(_SYSFS)
    allowed = os.sched_getaffinity(0)
    node = _node_of_gpu(local_process_index, _SYSFS) if availability.is_cuda_available() else None
    if node is None or node not in nodes:
        usable = [number for number in sorted(nodes) if nodes[number] & allowed] or [0]
        here = get_cpu_distributed_information().local_world_size
        node = usable[local_process_index * len(usable) // max(here, local_process_index + 1)]
    return node, nodes.get(node, allowed) & allowed


def _numa_nodes(sysfs: Path) -> dict[int, set[int]]:
    """Reads the CPUs of each NUMA node from sysfs."""
    folders = (sysfs / "devices/system/node").glob("node[0-9]*")
    nodes = {int(folder.name[4:]): _parse_cpulist((folder / "cpulist").read_text()) for folder in folders}
    return {number: processors for number, processors in nodes.items() if processors}  # a node may be memory only


def _node_of_gpu(index: int, sysfs: Path) -> int | None:
    import torch

    properties: Any = torch.cuda.get_device_properties(index % torch.cuda.device_count())
    try:
        domain, bus, device = (properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
    except AttributeError:  # older releases of torch
        return None
    file = sysfs / f"bus/pci/devices/{domain:04x}:{bus:02x}:{device:02x}.0/numa_node"
    node = int(file.read_text()) if file.is_file() else -1
    return node if node >= 0 else None  # -1: unknown to the firmware


def _parse_cpulist(text: str) -> set[int]:
    """Parses ``0-2,8`` to {0, 1, 2, 8}."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _format_cpulist(numbers: set[int]) -> str:
    """Formats {0, 1, 2, 8} as ``0-2,8``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][-1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
