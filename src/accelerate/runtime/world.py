"""`World`: rank, size, device and collectives of this process, and the functions that join and leave the process group.

`join` adopts a process group that is already initialized, else initializes the one that the variables of torchrun, MPI or
SLURM describe, else sets up a single process. A process has one World; `current` returns it and joins on first use.
"""

from __future__ import annotations

import atexit
import datetime
import importlib
import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..settings import env
from ..settings.enums import DistributedType
from . import devices
from .cluster import cluster_env, error_file, rendezvous
from .cluster.cluster_env import RankInfo
from .collective_backend import Collectives, TorchCollectives, XlaCollectives
from .release import drop_group_references
from .system import system_info
from .system.availability import is_torch_version

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataShard:
    """The shard of the data that this process reads.

    Attributes:
        index: Index of the shard. Ranks that hold shards of one model replica read the same one.
        count: Number of shards.
        group: The process group with one rank per shard, or None for all ranks.
    """

    index: int
    count: int
    group: ProcessGroup | None = None


@dataclass(frozen=True)
class World:
    """This process's rank, device and collectives.

    Attributes:
        rank: Global rank, 0 to ``size - 1``.
        size: World size.
        local_rank: Rank on this machine, 0 to ``local_size - 1``.
        local_size: Number of processes on this machine.
        device: The device this process computes on.
        backend: Name of the torch.distributed backend for tensors on `device`, or None for a single process.
        collectives: Collectives over all ranks.
        distributed_type: The kind of run, before a strategy refines it.
        debug: Compare shapes across ranks before each collective.
        fork_launched: Whether `notebook_launcher` forked this process.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    backend: str | None
    collectives: Collectives
    distributed_type: DistributedType
    debug: bool = False
    fork_launched: bool = False


_current: World | None = None


def current() -> World:
    """Returns this process's World; the first call joins with default settings."""
    return _current if _current is not None else join()


def is_joined() -> bool:
    """Returns whether this process has a World: `join` was called, and neither `leave` nor `forget` since."""
    return _current is not None


def set_current(world: World) -> World:
    """Replaces the World of this process."""
    global _current
    _current = world
    return world


def set_device(device: torch.device) -> World:
    """Sets the device of this process's World and torch's current device."""
    world = current()
    devices.device_kind(device).set_device(device)
    world.collectives.device = device
    return set_current(replace(world, device=device))


def set_debug(debug: bool) -> World:
    """Enables or disables the comparison of shapes before each collective."""
    return set_current(replace(current(), debug=debug))


def forget() -> None:
    """Clears this process's World but keeps the process group, which the next `join` adopts."""
    global _current
    _current = None


def join(
    *,
    cpu: bool = False,
    backend: str | None = None,
    init_method: str | None = None,
    timeout: datetime.timedelta | None = None,
    cpu_tensors: bool = False,
) -> World:
    """Joins the process group that the environment describes and sets this process's World.

    Args:
        cpu: Compute on the CPU even if an accelerator is available.
        backend: Communication backend, or one per device type (``cuda:nccl,cpu:gloo``); None selects the device table's. A
            backend that does not support the device in use (``nccl`` on a CPU) is replaced by the table's.
        init_method: Rendezvous URL (``tcp://…``, ``file://…``); None reads the environment variables.
        timeout: Timeout of the rendezvous and of each collective.
        cpu_tensors: Add gloo for CPU tensors to the group, unless `backend` is given or a group is initialized already. The
            launcher's variables request it as well, since scripts create `PartialState` before the plugin that offloads.

    Raises:
        ValueError: if the variables contradict each other.
        RuntimeError: if ranks are missing or rank 0 cannot be reached within the timeout.
    """
    cpu = cpu or env.flag("ACCELERATE_USE_CPU")
    cpu_tensors = cpu_tensors or (env.flag("ACCELERATE_USE_FSDP") and env.flag("FSDP_OFFLOAD_PARAMS"))
    kind = devices.DEVICES["cpu"] if cpu else devices.default_kind()
    common: dict[str, Any] = {
        "debug": env.flag("ACCELERATE_DEBUG_MODE"),
        "fork_launched": env.flag("FORK_LAUNCHED"),
    }
    if kind.name == "xla":
        return set_current(_xla_world(common))
    info: RankInfo | None
    if dist.is_available() and dist.is_initialized():
        info = cluster_env.from_group(dist.get_rank(), dist.get_world_size())
    else:
        info = cluster_env.from_environment(address_needed=init_method is None)
    if info is None:
        device = single_process_device(kind)
        kind.set_device(device)
        _bind_to_numa_node(0)
        return set_current(World(0, 1, 0, 1, device, None, Collectives(device), DistributedType.NO, **common))
    error_file.record_errors()  # again: the script may have replaced the hook since the import
    if not kind.backends:  # several processes cannot share one such device (mps)
        kind = devices.DEVICES["cpu"]
    device = kind.device(_device_index(kind, info))
    kind.set_device(device)
    _bind_to_numa_node(info.local_rank)  # before the group starts its threads, which inherit the affinity
    if not dist.is_initialized():
        _init_process_group(info, kind, _backend_for(kind, backend, cpu_tensors), init_method, timeout)
    _leave_at_exit()
    return set_current(
        World(
            info.rank,
            info.size,
            info.local_rank,
            info.local_size,
            device,
            backend_for_device(dist.get_backend_config(), kind.name) or dist.get_backend(),
            TorchCollectives(device),
            kind.distributed_type,
            **common,
        )
    )


def leave(group: ProcessGroup | None = None) -> None:
    """Destroys the default process group, or the given one, if it is initialized.

    Without `group` it also runs the callbacks of `on_leave` and clears the World.
    """
    if group is None:
        for release in _leave_callbacks:
            release()
    if dist.is_available() and dist.is_initialized():
        served = [group] if group is not None else list(dist.distributed_c10d._world.pg_map)
        _destroyed_groups.update(each for each in served if "gloo" in dist.get_backend_config(each))
        if _destroyed_groups and is_torch_version("<", "2.7.0"):
            time.sleep(DRAIN_SECONDS)
        dist.destroy_process_group(group)
    if group is None:
        forget()


DRAIN_SECONDS = 0.05
"""Seconds to sleep before a gloo group is destroyed, with torch 2.6: its threads need the GIL to release their last tensors,
and the destructor joins them while it holds the GIL."""
_destroyed_groups: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()
"""Destroyed gloo groups that are still referenced."""
_leave_callbacks: list[Callable[[], object]] = []


def on_leave(release: Callable[[], object]) -> None:
    """Registers a callback that `leave` runs before it destroys the default group, to drop groups created besides it."""
    _leave_callbacks.append(release)


def _device_index(kind: devices.DeviceKind, info: RankInfo) -> int:
    """Returns the index, among the visible devices, of this process's device."""
    count = kind.count() if kind.indexed else 0
    if count == 1 and not _shares_visible_device(kind):
        return 0
    if count and not info.has_local_rank:
        return _device_of_group(kind, info.rank, count)
    return info.local_rank


def _shares_visible_device(kind: devices.DeviceKind) -> bool:
    """Returns whether all processes on this machine see the same single device.

    Under a scheduler (srun --gpus-per-task=1), Ray, MIG or a script that sets a variable per rank, each sees its own.
    torchrun and the launcher start all ranks with the same environment, where more ranks than devices is an error.
    """
    if env.get("TORCHELASTIC_RUN_ID") is None:
        return False
    # ROCm, which torch calls cuda, has its own variables.
    restricting = (kind.visible_devices or "", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    return not any(env.get(name) for name in restricting)


def _device_of_group(kind: devices.DeviceKind, rank: int, count: int) -> int:
    """Returns the device index of a rank whose group the user initialized, without a variable that gives its local rank."""
    assert dist.group.WORLD is not None
    bound = getattr(dist.group.WORLD, "bound_device_id", None)  # init_process_group(device_id=...)
    if bound is not None and bound.type == kind.name:
        return int(bound.index)
    # Any index but 0, the default, was set by the user.
    return kind.current().index or rank % count


def _bind_to_numa_node(local_rank: int) -> None:
    if env.flag("ACCELERATE_CPU_AFFINITY"):
        system_info.set_numa_affinity(local_rank)


def single_process_device(kind: devices.DeviceKind) -> torch.device:
    """Returns the device of a single process: that of ACCELERATE_TORCH_DEVICE, else torch's current device."""
    if not kind.indexed:
        return torch.device(kind.name)
    wanted = env.get("ACCELERATE_TORCH_DEVICE")
    return kind.current() if wanted is None else devices.with_index(wanted)


def _xla_world(common: dict[str, Any]) -> World:
    import torch_xla
    import torch_xla.runtime as xr

    device = torch_xla.device()
    collectives = XlaCollectives(device)
    return World(
        collectives.rank,
        collectives.size,
        xr.local_ordinal(),
        xr.local_process_count(),
        device,
        "xla",
        collectives,
        DistributedType.XLA,
        **common,
    )


def backend_for_device(backends: str, kind: str) -> str | None:
    """Returns the backend of a device type from torch's notation: ``cuda:nccl,cpu:gloo``, or one for all (``gloo``)."""
    if ":" not in backends:
        return backends
    return dict(pair.strip().split(":", 1) for pair in backends.split(",")).get(kind)


def _backend_for(kind: devices.DeviceKind, wanted: str | None, cpu_tensors: bool = False) -> str:
    if wanted is not None and ":" in wanted:
        own = backend_for_device(wanted, kind.name)
        if own is not None and kind.name != "cpu":
            return wanted
        wanted, cpu_tensors = own, True  # the script names backends of other devices
    if wanted is None and kind.name == "cuda" and _uses_smddp():
        return "smddp"
    if wanted is None or not _backend_supports(wanted, kind):
        found = next((name for name in kind.backends if dist.is_backend_available(name)), kind.backends[0])
        # On request only: gloo connects every pair of ranks, in each group.
        both = cpu_tensors and wanted is None and kind.name != "cpu" and dist.is_gloo_available()
        return f"{kind.name}:{found},cpu:gloo" if both else found
    return wanted


def _uses_smddp() -> bool:
    """Returns whether this is a data-parallel SageMaker job with Amazon's smddp backend, which it registers."""
    if env.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE") != "DATA_PARALLEL" or find_spec("smdistributed") is None:
        return False
    importlib.import_module("smdistributed.dataparallel.torch.torch_smddp")  # registers the backend
    return True


def _backend_supports(backend: str, kind: devices.DeviceKind) -> bool:
    """Returns False for a registered backend that supports only other device types."""
    others = {name for other in devices.DEVICES.values() if other is not kind for name in other.backends}
    known: dict[str, list[str]] = dist.Backend.backend_capability
    return backend in kind.backends or backend not in others or kind.name in known.get(backend, [])


def _init_process_group(
    info: RankInfo,
    kind: devices.DeviceKind,
    backend: str,
    init_method: str | None,
    timeout: datetime.timedelta | None,
) -> None:
    own = dist.Backend(backend_for_device(backend, kind.name) or backend)
    limit = timeout if timeout is not None else dist.distributed_c10d._get_default_timeout(own)
    if "nccl" in backend:
        _disable_unsupported_p2p()
    store = rendezvous.init_store(info, init_method, limit)
    dist.init_process_group(
        backend,
        store=store,
        rank=info.rank,
        world_size=info.size,
        timeout=limit,
    )


def _disable_unsupported_p2p() -> None:
    if system_info.check_cuda_p2p_ib_support():
        return
    switches = {name: "1" for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE") if env.get(name) is None}
    env.publish(switches)
    if switches:
        logger.warning(
            "this NVIDIA driver reports P2P access between GeForce RTX 40 cards, with which NCCL hangs: set %s. Driver "
            "550.40.07 and later need neither.",
            " and ".join(f"{name}=1" for name in switches),
        )


_exit_callbacks: list[Callable[[], None]] = []


def at_exit(release: Callable[[], None]) -> None:
    """Registers a callback for process exit, run before the group is destroyed, to drop references to the group."""
    _exit_callbacks.append(release)


def _leave_at_exit() -> None:
    if _leave not in _exit_callbacks:
        _exit_callbacks.insert(0, _leave)
        atexit.register(_run_at_exit)


def _leave() -> None:
    leave()
    if _destroyed_groups:
        drop_group_references(list(_destroyed_groups))


def _run_at_exit() -> None:
    # In reverse order of registration: `_leave`, the first entry, runs last.
    while _exit_callbacks:
        _exit_callbacks.pop()()
