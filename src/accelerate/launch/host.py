"""Looks at the machine, so that the plan does not have to: devices, cores, interfaces. torch is asked last, if at all.

`detect_host` gathers facts, `resolve_settings` writes them into settings where nothing else decided.
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

# Kinds of device that come with a package of their own, in the order in which the library prefers them.
_DEVICE_PACKAGES = {
    "mlu": "torch_mlu",
    "sdaa": "torch_sdaa",
    "musa": "torch_musa",
    "npu": "torch_npu",
    "hpu": "habana_frameworks",
    "neuron": "torch_neuronx",
}


class HostInfo(NamedTuple):
    """Facts about the machine and this process.

    Attributes:
        device: The kind of device that processes use unless told otherwise.
        devices: How many of them a run would use.
        cores: Processor cores that this process may use.
        interface: The network interface over which ranks reach each other, or None when that cannot be said.
        directory: The current folder.
        python: The interpreter and the options it was started with.
        rank_info: This process's place among those that MPI or SLURM started, if each is to be one process of the run.
        slurm_step: The SLURM step with one task on each of several nodes of which this process is one.
        batch_nodes: How many nodes a SLURM job has whose batch script runs this command itself, else 1.
        hosts: The hosts of the file for mpirun.
        mpi: Whose ``mpirun`` is installed, a row of `launch.mpi`.
        elsewhere: Whether one of the hosts may be another machine.
        peer_access: Whether the GPUs here may talk to each other directly.
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
    """Gathers what `resolve_settings` needs for `settings`; devices are counted only if nobody said how many processes.

    Raises:
        SettingsError: when the variables of MPI or SLURM contradict each other.
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
    if rank_info is not None:  # its peers on this machine want cores as well, unless it has been bound to its own
        facts = facts._replace(cores=min(facts.cores, max(1, cores(bound=False) // rank_info.local_size)))
    elif settings.mpirun.hostfile is not None and step is None:
        from .engines import mpi

        hosts = mpi.read_hostfile(settings.mpirun.hostfile)
        facts = facts._replace(hosts=hosts, elsewhere=mpi.any_remote(hosts), mpi=mpi.detect_flavor())
    return facts._replace(interface=_network_interface(resolve_settings(settings, facts), rank_info))


def resolve_settings(settings: LaunchSettings, machine: HostInfo) -> LaunchSettings:
    """`settings` with the machine's facts where they say nothing."""
    settings = _apply_slurm_step(settings, machine.slurm_step)
    processes, machines, rank = settings.num_processes, settings.num_machines, settings.machine_rank
    address, rank_info = settings.main_process_ip, machine.rank_info
    if rank_info is not None:  # one of us has been started for each process already
        processes, machines, rank = 1, 1, 0
    else:
        if machines is None and machine.hosts:
            machines = len(machine.hosts)
        if address is None and len(machine.hosts) > 1 and not machine.hosts[0].startswith(("localhost", "127.")):
            address = machine.hosts[0]
    elsewhere = settings.compute_environment != "LOCAL_MACHINE"
    if processes is None and not settings.tpu and not elsewhere:  # torch_xla starts one on each TPU device by itself
        here = machine.devices if machine.device not in ("cpu", "mps") else 1
        processes = max(1, here) * (machines or 1)
    # A file's MULTI_… value says more than what happens to be found.
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
        quiet=settings.quiet or (rank_info is not None and rank_info.rank > 0),  # one of them speaks for all
        mpi=machine.mpi,
        elsewhere=machine.elsewhere,
        peer_access=machine.peer_access,
    )
    return resolved.replace(threads=max(1, machine.cores // max(1, resolved.processes_here)))


def host_warnings(asked: LaunchSettings, machine: HostInfo) -> list[str]:
    """Where the machine and what was asked for do not agree, and which was taken: lines for the person who launched."""
    said = []
    rank_info, step = machine.rank_info, machine.slurm_step
    if rank_info is not None and asked.num_processes not in (None, rank_info.size):
        said.append(
            f"num_processes {asked.num_processes} is not used: {rank_info.source} has started {rank_info.size} processes, "
            "and each is one of the run"
        )
    if step is not None and asked.num_machines not in (None, step.nodes):
        said.append(
            f"this SLURM step has {step.nodes} nodes, but num_machines is {asked.num_machines}: each node runs by itself"
        )
    elif step is not None and asked.machine_rank not in (None, step.node):
        said.append(f"machine_rank {asked.machine_rank} is taken as given; SLURM counts this node as {step.node}")
    if step is not None and asked.mpirun.hostfile is not None:
        said.append("the file for mpirun is not used: SLURM has started this command on each node already")
    if machine.batch_nodes > 1 and asked.num_machines is None:
        said.append(
            f"this SLURM job has {machine.batch_nodes} nodes, and this launch uses one: "
            "`srun --ntasks-per-node=1 accelerate launch ...` uses all of them"
        )
    return said


# MPI and SLURM -------------------------------------------------------------------------------------------------------


def _detect_scheduler() -> tuple[RankInfo | None, slurm.SlurmStep | None, int]:
    """What MPI and SLURM say: this process's place, or its step, and how many nodes a batch script has to itself."""
    try:
        rank_info = cluster_env.from_scheduler()
        step = slurm.current_step()
        if rank_info is None:
            return None, None, slurm.batch_job_node_count()
        if rank_info.source == "SLURM" and step is not None and step.one_task_per_node:
            return None, step, 1
        return rank_info, None, 1
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _apply_slurm_step(settings: LaunchSettings, step: slurm.SlurmStep | None) -> LaunchSettings:
    """`settings` with what a step of one task per node says about machines, where they say nothing themselves."""
    elsewhere = settings.tpu or settings.compute_environment != "LOCAL_MACHINE"
    if step is None or elsewhere or settings.num_machines not in (None, step.nodes):
        return settings
    given = settings.deepspeed.deepspeed_multinode_launcher
    return settings.replace(
        num_machines=step.nodes,
        machine_rank=step.node if settings.machine_rank is None else settings.machine_rank,
        main_process_ip=settings.main_process_ip or slurm.first_host(step.nodelist),
        main_process_port=step.port if settings.main_process_port is None else settings.main_process_port,
        # Every node has a launcher of its own: nobody needs to reach the others.
        deepspeed=settings.deepspeed.replace(deepspeed_multinode_launcher=given or "standard"),
        mpirun=settings.mpirun.replace(hostfile=None),
    )


# Devices -------------------------------------------------------------------------------------------------------------


def _default_device() -> str:
    """The kind of device that `runtime.devices` would choose, found without torch."""
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
    # NVIDIA's driver, AMD's, WSL's, Jetson's; on Windows only torch can tell.
    nodes = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/nvhost-ctrl")
    return any(map(os.path.exists, nodes)) or (os.name == "nt" and "+cu" in _torch_version())


def _hides_all_devices(visible: str | None) -> bool:
    """Whether a list of visible devices hides all of them: it ends at the first that there cannot be."""
    return visible is not None and (visible.strip() == "" or visible.strip().startswith("-"))


def _peer_access(device: str) -> bool:
    """Whether NVIDIA's cards may talk to each other directly; asked without torch, which takes a second to import."""
    if device != "cuda":
        return True
    folder = "/proc/driver/nvidia/gpus"
    cards = os.listdir(folder) if os.path.isdir(folder) else []
    told = [_read(f"{folder}/{card}/information") for card in cards]
    names = [line.partition(":")[2].strip() for text in told for line in text.splitlines() if line.startswith("Model")]
    if not any("RTX 40" in name for name in names):
        return True
    from ..runtime.system.system_info import p2p_supported

    return p2p_supported(names)


def _torch_version() -> str:
    """torch's version, from the file it stands in: importing torch takes a second or more."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return ""
    path = os.path.join(os.path.dirname(found.origin), "version.py")
    if not os.path.isfile(path):
        return ""
    with open(path, encoding="utf-8") as file:
        return next((line.partition("=")[2] for line in file if line.startswith("__version__")), "")


def _device_count(device: str, gpu_ids: str | None) -> int:
    """How many devices a run would use."""
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
    # Several processes are started through torch anyway, so that its import is not lost.
    from ..runtime.devices import DEVICES

    return DEVICES[device].count() if device in DEVICES else 1


# Processor, network, interpreter -------------------------------------------------------------------------------------


def cores(bound: bool = True) -> int:
    """Processor cores (not hardware threads) this process may use, within the limit of its container.

    Args:
        bound: Leave out those that this process has been kept from (taskset, mpirun, srun).
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0) if bound else set(range(os.cpu_count() or 1))
    siblings = {_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in allowed}
    return max(1, min(len(siblings), _container_limit() or len(siblings)))


def _container_limit() -> int | None:
    """Processors that the container may keep busy (cgroup version 2), or None without a limit."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return -(-int(quota) // int(period)) if quota.isdigit() and period.isdigit() else None


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:  # not every system tells
        return ""


def _network_interface(settings: LaunchSettings, rank_info: RankInfo | None) -> str | None:
    """The network interface over which ranks find each other: gloo is bound to it by name."""
    if rank_info is not None and rank_info.local_size < rank_info.size:
        towards = settings.main_process_ip or rank_info.address or None
    elif settings.machines > 1:
        towards = settings.main_process_ip
    else:  # the interface of 127.0.0.1, found without a socket
        return next((name for name in ("lo", "lo0") if os.path.exists(f"/sys/class/net/{name}")), None)
    from ..runtime.cluster.network import interface

    return interface(towards)


def interpreter_options(orig_argv: list[str]) -> list[str]:
    """The options between ``python`` and what it runs: -u and -X dev of ``python -u -X dev -m accelerate…``."""
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
        before = word[1:].partition("m")[0].partition("c")[0]  # -um: what -m and -c take is not an option
        if before:
            options.append("-" + before)
        if before != word[1:]:
            break
    return options
