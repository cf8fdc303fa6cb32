"""Looks at the machine, so that the plan does not have to: devices, cores, interfaces. torch is asked last, if at all.

`look` gathers facts, `resolve` writes them into settings where nothing else decided.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import NamedTuple

from ..settings import env
from ..settings.launcher import LaunchSettings

# Kinds of device that come with a package of their own, in the order in which the library prefers them.
_PACKAGES = {
    "mlu": "torch_mlu",
    "sdaa": "torch_sdaa",
    "musa": "torch_musa",
    "npu": "torch_npu",
    "hpu": "habana_frameworks",
    "neuron": "torch_neuronx",
}
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")


class Machine(NamedTuple):
    """Facts about the machine and this process.

    Attributes:
        device: The kind of device that processes use unless told otherwise.
        devices: How many of them a run would use.
        cores: Processor cores that this process may use.
        loopback: The network interface that reaches this machine only, or None.
        directory: The current folder.
        python: The interpreter and the options it was started with.
        mpi_size: How many processes MPI started, of which this is one; 1 without MPI.
    """

    device: str
    devices: int
    cores: int
    loopback: str | None
    directory: str
    python: tuple[str, ...]
    mpi_size: int = 1


def look(settings: LaunchSettings) -> Machine:
    """Gathers what `resolve` needs for `settings`; devices are counted only if nobody said how many processes."""
    device = "cpu" if settings.cpu else _default_device()
    counted = settings.num_processes is None and not settings.cpu
    return Machine(
        device=device,
        devices=_count(device, settings.gpu_ids) if counted else 0,
        cores=cores(),
        loopback=_loopback(),
        directory=os.getcwd(),
        python=(sys.executable, *interpreter_options(sys.orig_argv)),
        mpi_size=env.integer(_MPI_SIZES, 1),
    )


def resolve(settings: LaunchSettings, machine: Machine) -> LaunchSettings:
    """`settings` with the machine's facts where they say nothing."""
    processes = settings.num_processes
    machines = settings.num_machines
    if machine.mpi_size > 1:  # mpirun has started one of us for each process already
        processes, machines = 1, 1
    elif processes is None:
        here = machine.devices if machine.device not in ("cpu", "mps") else 1
        processes = max(1, here) * settings.machines
    # A file's MULTI_… value says more than what happens to be found.
    device = settings.device if settings.multi_gpu and machine.device == "cpu" else machine.device
    resolved = settings.replace(
        num_processes=processes,
        num_machines=machines,
        device=device,
        loopback=machine.loopback,
        directory=machine.directory,
        python=machine.python,
    )
    return resolved.replace(threads=max(1, machine.cores // max(1, resolved.processes_here)))


# Devices -------------------------------------------------------------------------------------------------------------


def _default_device() -> str:
    """The kind of device that `runtime.devices` would choose, found without torch."""
    wanted = env.get("ACCELERATE_TORCH_DEVICE")
    if wanted:
        return wanted.split(":")[0]
    for kind, package in _PACKAGES.items():
        if find_spec(package) is not None:
            return kind
    if env.flag("USE_TORCH_XLA", default=True) and find_spec("torch_xla") is not None:
        return "xla"
    if _has_cuda_driver() and env.get("CUDA_VISIBLE_DEVICES") != "":
        return "cuda"
    if "+xpu" in _torch_version():
        return "xpu"
    return "mps" if sys.platform == "darwin" and os.uname().machine == "arm64" else "cpu"


def _has_cuda_driver() -> bool:
    # NVIDIA's driver, AMD's, WSL's, Jetson's; on Windows only torch can tell.
    nodes = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/nvhost-ctrl")
    return any(map(os.path.exists, nodes)) or (os.name == "nt" and "+cu" in _torch_version())


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


def _count(device: str, gpu_ids: str | None) -> int:
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


def cores() -> int:
    """Processor cores (not hardware threads) this process may use, within the limit of its container."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
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


def _loopback() -> str | None:
    """The interface of 127.0.0.1: gloo is bound to it by name."""
    return next((name for name in ("lo", "lo0") if os.path.exists(f"/sys/class/net/{name}")), None)


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
