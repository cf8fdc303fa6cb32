"""Detects the host: devices, cores, network interfaces, scheduler. Imports torch only to count several devices.

`detect_host` collects facts, `resolve_settings` fills them into the settings that are not given.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import NamedTuple

from ..runtime.cluster import cluster_env, slurm
from ..runtime.cluster.cluster_env import RankInfo
from ..settings import env
from ..settings.launcher import LaunchSettings
from ..settings.option import SettingsError

# Device types with a package of their own, in order of preference.
_DEVICE_PACKAGES = {
    "mlu": "torch_mlu",
    "sdaa": "torch_sdaa",
    "musa": "torch_musa",
    "npu": "torch_npu",
    "hpu": "habana_frameworks",
    "neuron": "torch_neuronx",
}


class HostInfo(NamedTuple):
    """Facts about the host and this process.

    Attributes:
        device: The default device type.
        devices: Number of devices that a launch would use.
        cores: Physical cores that this process may use.
        interface: The network interface between ranks, or None if it cannot be determined.
        directory: The current directory.
        python: The interpreter and its options.
        rank_info: The rank of this process, if MPI or SLURM has started one launcher per process.
        slurm_step: The SLURM step of this process, if it has one task on each of several nodes.
        batch_nodes: Number of nodes of a SLURM job whose batch script runs this command without srun, else 1.
        hosts: The hosts of the hostfile for mpirun.
        mpi: The ``mpirun`` that is installed, a key of `engines.mpi.MPI_FLAVORS`.
        elsewhere: Whether one of the hosts may be another machine.
        peer_access: Whether the GPUs support peer-to-peer access.
    """

    device: str
    devices: int
    cores: int
    interface: str | None
    directory: str
    python: tuple[str, ...]
    rank_info: RankInfo | None = None
    slurm_step: slurm.SlurmStep | None = None
    batch_nodes: int = 1
    hosts: tuple[str, ...] = ()
    mpi: str = "openmpi"
    elsewhere: bool = False
    peer_access: bool = True


def detect_host(settings: LaunchSettings) -> HostInfo:
    """Collects the facts that `resolve_settings` needs; counts devices only if the number of processes is not given.

    Raises:
        SettingsError: if the variables of MPI or SLURM contradict each other.
    """
    device = "cpu" if settings.cpu else _default_device()
    rank_info, step, batch_nodes = _detect_scheduler()
    counted = settings.num_processes is None and not settings.cpu and rank_info is None
    facts = HostInfo(
        device=device,
        devices=_device_count(device, settings.gpu_ids) if counted else 0,
        cores=cores(),
        interface=None,
        directory=os.getcwd(),
        python=(sys.executable, *interpreter_options(sys.orig_argv)),
        rank_info=rank_info,
        slurm_step=step,
        batch_nodes=batch_nodes,
        peer_access=_peer_access(device),
    )
    if rank_info is not None:  # it shares the cores of the machine with its peers, unless it is bound to its own
        facts = facts._replace(cores=min(facts.cores, max(1, cores(bound=False) // rank_info.local_size)))
    elif settings.mpirun.hostfile is not None and step is None:
        from .engines import mpi

        hosts = mpi.read_hostfile(settings.mpirun.hostfile)
        facts = facts._replace(hosts=hosts, elsewhere=mpi.any_remote(hosts), mpi=mpi.detect_flavor())
    return facts._replace(interface=_network_interface(resolve_settings(settings, facts), rank_info))


def resolve_settings(settings: LaunchSettings, machine: HostInfo) -> LaunchSettings:
    """Returns `settings` with facts about the host where they are not given."""
    settings = _apply_slurm_step(settings, machine.slurm_step)
    processes, machines, rank = settings.num_processes, settings.num_machines, settings.machine_rank
    address, rank_info = settings.main_process_ip, machine.rank_info
    if rank_info is not None:  # the scheduler has started one launcher per process
        processes, machines, rank = 1, 1, 0
    else:
        if machines is None and machine.hosts:
            machines = len(machine.hosts)
        if address is None and len(machine.hosts) > 1 and not machine.hosts[0].startswith(("localhost", "127.")):
            address = machine.hosts[0]
    elsewhere = settings.compute_environment != "LOCAL_MACHINE"
    if processes is None and not settings.tpu and not elsewhere:  # torch_xla starts one process per TPU device itself
        here = machine.devices if machine.device not in ("cpu", "mps") else 1
        processes = max(1, here) * (machines or 1)
    # A MULTI_… value of the file overrides the detected device.
    device = settings.device if settings.multi_gpu and machine.device == "cpu" else machine.device
    resolved = settings.replace(
        num_processes=processes,
        num_machines=machines,
        machine_rank=rank,
        main_process_ip=address,
        device=device,
        interface=machine.interface,
        directory=machine.directory,
        python=machine.python,
        cores=machine.cores,
        placed_by="" if rank_info is None else rank_info.source,
        quiet=settings.quiet or (rank_info is not None and rank_info.rank > 0),  # rank 0 prints for all
        mpi=machine.mpi,
        elsewhere=machine.elsewhere,
        peer_access=machine.peer_access,
    )
    return resolved.replace(threads=max(1, machine.cores // max(1, resolved.processes_here)))


def host_warnings(asked: LaunchSettings, machine: HostInfo) -> list[str]:
    """Returns lines about settings that differ from the host or the scheduler, and which of both is used."""
    warnings = []
    rank_info, step = machine.rank_info, machine.slurm_step
    if rank_info is not None and asked.num_processes not in (None, rank_info.size):
        warnings.append(
            f"num_processes {asked.num_processes} is not used: {rank_info.source} has started {rank_info.size} processes, "
            "and each is one of the run"
        )
    if step is not None and asked.num_machines not in (None, step.nodes):
        warnings.append(
            f"this SLURM step has {step.nodes} nodes, but num_machines is {asked.num_machines}: each node runs by itself"
        )
    elif step is not None and asked.machine_rank not in (None, step.node):
        warnings.append(f"machine_rank {asked.machine_rank} is taken as given; SLURM counts this node as {step.node}")
    if step is not None and asked.mpirun.hostfile is not None:
        warnings.append("the file for mpirun is not used: SLURM has started this command on each node already")
    if machine.batch_nodes > 1 and asked.num_machines is None:
        warnings.append(
            f"this SLURM job has {machine.batch_nodes} nodes, and this launch uses one: "
            "`srun --ntasks-per-node=1 accelerate launch ...` uses all of them"
        )
    return warnings


# MPI and SLURM -------------------------------------------------------------------------------------------------------


def _detect_scheduler() -> tuple[RankInfo | None, slurm.SlurmStep | None, int]:
    """Returns this process's rank by MPI or SLURM, or its SLURM step, and the number of nodes of a batch script."""
    try:
        rank_info = cluster_env.from_scheduler()
        if rank_info is None and not any(name.startswith("SLURM_") for name in env.snapshot()):
            return None, None, 1
        step = slurm.current_step()
        if rank_info is None:
            return None, None, slurm.batch_job_node_count()
        if rank_info.source == "SLURM" and step is not None and step.one_task_per_node:
            return None, step, 1
        return rank_info, None, 1
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _apply_slurm_step(settings: LaunchSettings, step: slurm.SlurmStep | None) -> LaunchSettings:
    """Returns `settings` with the machines of a step with one task per node, where they are not given."""
    elsewhere = settings.tpu or settings.compute_environment != "LOCAL_MACHINE"
    if step is None or elsewhere or settings.num_machines not in (None, step.nodes):
        return settings
    given = settings.deepspeed.deepspeed_multinode_launcher
    return settings.replace(
        num_machines=step.nodes,
        machine_rank=step.node if settings.machine_rank is None else settings.machine_rank,
        main_process_ip=settings.main_process_ip or slurm.first_host(step.nodelist),
        main_process_port=step.port if settings.main_process_port is None else settings.main_process_port,
        # Every node has a launcher of its own, so that DeepSpeed need not start the others.
        deepspeed=settings.deepspeed.replace(deepspeed_multinode_launcher=given or "standard"),
        mpirun=settings.mpirun.replace(hostfile=None),
    )


# Devices -------------------------------------------------------------------------------------------------------------


def _default_device() -> str:
    """Returns the device type that `runtime.devices` would select, without importing torch."""
    wanted = env.get("ACCELERATE_TORCH_DEVICE")
    if wanted:
        return wanted.split(":")[0]
    for kind, package in _DEVICE_PACKAGES.items():
        if find_spec(package) is not None:
            return kind
    if env.flag("USE_TORCH_XLA", default=True) and find_spec("torch_xla") is not None:
        return "xla"
    if _has_cuda_driver() and not _hides_all_devices(env.get("CUDA_VISIBLE_DEVICES")):
        return "cuda"
    if "+xpu" in _torch_version():
        return "xpu"
    return "mps" if sys.platform == "darwin" and os.uname().machine == "arm64" else "cpu"


def _has_cuda_driver() -> bool:
    # NVIDIA's driver, AMD's, WSL's, Jetson's; on Windows, the build of torch decides.
    nodes = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/nvhost-ctrl")
    return any(map(os.path.exists, nodes)) or (os.name == "nt" and "+cu" in _torch_version())


def _hides_all_devices(visible: str | None) -> bool:
    """Returns whether a list of visible devices hides all: CUDA ignores an invalid index and all after it."""
    return visible is not None and (visible.strip() == "" or visible.strip().startswith("-"))


def _peer_access(device: str) -> bool:
    """Returns whether NVIDIA GPUs support peer-to-peer access; without torch, whose import takes a second."""
    if device != "cuda":
        return True
    folder = "/proc/driver/nvidia/gpus"
    cards = os.listdir(folder) if os.path.isdir(folder) else []
    texts = [_read(f"{folder}/{card}/information") for card in cards]
    names = [line.partition(":")[2].strip() for text in texts for line in text.splitlines() if line.startswith("Model")]
    if not any("RTX 40" in name for name in names):
        return True
    from ..runtime.system.system_info import p2p_supported

    return p2p_supported(names)


def _torch_version() -> str:
    """Reads torch's version from its file, as importing torch takes a second or more."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return ""
    path = os.path.join(os.path.dirname(found.origin), "version.py")
    if not os.path.isfile(path):
        return ""
    with open(path, encoding="utf-8") as file:
        return next((line.partition("=")[2] for line in file if line.startswith("__version__")), "")


def _device_count(device: str, gpu_ids: str | None) -> int:
    """Returns the number of devices that a launch would use."""
    if device == "cpu":
        return 0
    if gpu_ids not in (None, "all"):
        return len(str(gpu_ids).split(","))
    nodes = (
        [name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()]
        if os.name == "posix"
        else []
    )
    if device == "cuda" and len(nodes) == 1:
        return 1
    # Several processes are started by torch, which has to be imported then anyway.
    from ..runtime.devices import DEVICES

    return DEVICES[device].count() if device in DEVICES else 1


# Processor, network, interpreter -------------------------------------------------------------------------------------


def cores(bound: bool = True) -> int:
    """Returns the number of physical cores that this process may use, within the limit of its container.

    Args:
        bound: Whether to respect the process's CPU affinity (taskset, mpirun, srun).
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0) if bound else set(range(os.cpu_count() or 1))
    siblings = {_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in allowed}
    return max(1, min(len(siblings), _container_limit() or len(siblings)))


def _container_limit() -> int | None:
    """Returns the CPU limit of the container (cgroup version 2), or None without one."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return -(-int(quota) // int(period)) if quota.isdigit() and period.isdigit() else None


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:  # not available on every system
        return ""


def _network_interface(settings: LaunchSettings, rank_info: RankInfo | None) -> str | None:
    """Returns the network interface between ranks, for gloo, which binds to it by name."""
    if rank_info is not None and rank_info.local_size < rank_info.size:
        towards = settings.main_process_ip or rank_info.address or None
    elif settings.machines > 1:
        towards = settings.main_process_ip
    else:  # the interface of 127.0.0.1, found without a socket
        return next((name for name in ("lo", "lo0") if os.path.exists(f"/sys/class/net/{name}")), None)
    from ..runtime.cluster.network import interface

    return interface(towards)


def interpreter_options(orig_argv: list[str]) -> list[str]:
    """Returns the interpreter's options: -u and -X dev of ``python -u -X dev -m accelerate…``."""
    options: list[str] = []
    words = iter(orig_argv[1:])
    for word in words:
        if not word.startswith("-") or word in ("-", "-m", "-c"):
            break
        if word.startswith("--") or word[1] in "XW":
            options.append(word)
            if word in ("-X", "-W", "--check-hash-based-pycs"):
                options.append(next(words, ""))
            continue
        before = word[1:].partition("m")[0].partition("c")[0]  # -um: arguments of -m and -c are not options
        if before:
            options.append("-" + before)
        if before != word[1:]:
            break
    return options
