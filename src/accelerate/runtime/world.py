"""This process and its peers: who they are, how they are reached, how one joins and leaves.

`join` takes up a process group that is already initialised, else the one that torchrun's, MPI's or SLURM's variables
describe, else this process is alone. There is one World a process; `current()` gives it, joining on first use.
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
    """Who reads which part of the data.

    Attributes:
        index: The part this process reads.
        count: How many parts there are. Ranks that hold parts of one model share an index.
        group: The torch process group over the parts, or None for all ranks.
    """

    index: int
    count: int
    group: ProcessGroup | None = None


@dataclass(frozen=True)
class World:
    """What this process knows of its run.

    Attributes:
        rank: 0 to ``size - 1``, over all machines.
        size: Number of processes, over all machines.
        local_rank: 0 to ``local_size - 1``, on this machine.
        local_size: Number of processes on this machine.
        device: The device this process computes on.
        backend: torch.distributed's name of the library that carries tensors of `device`, or None for a process on its own.
        collectives: What carries tensors between the ranks.
        distributed_type: How the run is distributed, before a strategy refines it.
        debug: Check shapes on all ranks before each collective.
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
    """This process's World; joins with default settings when nobody has."""
    return _current if _current is not None else join()


def is_joined() -> bool:
    """Whether `join` has been called (and not forgotten) in this process."""
    return _current is not None


def set_current(world: World) -> World:
    """Replaces the record, for a strategy that refines it."""
    global _current
    _current = world
    return world


def set_device(device: torch.device) -> World:
    """Records another device for this process and makes it torch's current one."""
    world = current()
    devices.device_kind(device).set_device(device)
    world.collectives.device = device
    return set_current(replace(world, device=device))


def set_debug(debug: bool) -> World:
    """Turns the comparison of shapes before each collective on or off."""
    return set_current(replace(current(), debug=debug))


def forget() -> None:
    """Drops the record and keeps the process group: the next `join` takes it up again."""
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
    """Joins the run that the environment describes and records it.

    Args:
        cpu: Compute on the CPU even where an accelerator is at hand.
        backend: Communication library, or one for each kind of device (``cuda:nccl,cpu:gloo``); None takes the device
            table's. A backend for another kind of device than the one in use (``nccl`` on a CPU) is replaced by the table's.
        init_method: Address of the rendezvous (``tcp://…``, ``file://…``); None reads the variables.
        timeout: How long peers may keep this process waiting: on joining, and in each collective.
        cpu_tensors: Tensors on the CPU are communicated besides those of the device: where no backend was chosen, the
            group has gloo for them. Without effect on a group that is there already. The launcher's variables may ask for
            it too: scripts create `PartialState` before the plugin that offloads is known.

    Raises:
        ValueError: when the variables contradict each other.
        RuntimeError: when peers or the main process do not answer within the timeout.
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
    place: RankInfo | None
    if dist.is_available() and dist.is_initialized():
        place = cluster_env.from_group(dist.get_rank(), dist.get_world_size())
    else:
        place = cluster_env.from_environment(address_needed=init_method is None)
    if place is None:
        device = single_process_device(kind)
        kind.set_device(device)
        _bind_to_numa_node(0)
        return set_current(World(0, 1, 0, 1, device, None, Collectives(device), DistributedType.NO, **common))
    error_file.record_errors()  # again: the script may have set a hook of its own; and joining may fail as well
    if not kind.backends:  # several processes cannot share one such device (mps)
        kind = devices.DEVICES["cpu"]
    device = kind.device(_device_index(kind, place))
    kind.set_device(device)
    _bind_to_numa_node(place.local_rank)  # before the group, whose threads stay where they began
    if not dist.is_initialized():
        _init_process_group(place, kind, _backend_for(kind, backend, cpu_tensors), init_method, timeout)
    _leave_at_exit()
    return set_current(
        World(
            place.rank,
            place.size,
            place.local_rank,
            place.local_size,
            device,
            backend_for_device(dist.get_backend_config(), kind.name) or dist.get_backend(),
            TorchCollectives(device),
            kind.distributed_type,
            **common,
        )
    )


def leave(group: ProcessGroup | None = None) -> None:
    """Leaves the process group this process is in (or the one given); does nothing when there is none.

    Leaving the default group forgets the World as well.
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
"""With torch 2.6, how long before a gloo group is destroyed the GIL is released: its threads may need it to release the last
tensors, and the destructor joins them while it holds it."""
_destroyed_groups: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()
"""Groups of gloo that were left, as long as something refers to them."""
_leave_callbacks: list[Callable[[], object]] = []


def on_leave(release: Callable[[], object]) -> None:
    """Has `release` called each time the default group is left: for a module that keeps groups of its own."""
    _leave_callbacks.append(release)


def _device_index(kind: devices.DeviceKind, place: RankInfo) -> int:
    """Returns which of the devices that this process sees is its own."""
    count = kind.count() if kind.indexed else 0
    if count == 1 and not _shares_visible_device(kind):
        return 0
    if count and not place.has_local_rank:
        return _device_of_group(kind, place.rank, count)
    return place.local_rank


def _shares_visible_device(kind: devices.DeviceKind) -> bool:
    """Returns whether a process that sees one device sees the one that its peers on this machine see, too.

    Ranks see a device each under a scheduler (srun --gpus-per-task=1), Ray, MIG, or a script that sets a variable for each.
    torchrun and the launcher start all ranks with the same environment: there, more ranks than devices is a mistake.
    """
    if env.get("TORCHELASTIC_RUN_ID") is None:
        return False
    # The one of the table, and those of ROCm, which torch calls cuda.
    restricting = (kind.visible_devices or "", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    return not any(env.get(name) for name in restricting)


def _device_of_group(kind: devices.DeviceKind, rank: int, count: int) -> int:
    """Returns the device of a rank of somebody else's group, where no variable gives its rank on the machine."""
    assert dist.group.WORLD is not None
    bound = getattr(dist.group.WORLD, "bound_device_id", None)  # init_process_group(device_id=...)
    if bound is not None and bound.type == kind.name:
        return int(bound.index)
    # A current device other than 0 was selected on purpose; 0 is also the default.
    return kind.current().index or rank % count


def _bind_to_numa_node(local_rank: int) -> None:
    if env.flag("ACCELERATE_CPU_AFFINITY"):
        system_info.set_numa_affinity(local_rank)


def single_process_device(kind: devices.DeviceKind) -> torch.device:
    """Returns the device of a process on its own: the one ACCELERATE_TORCH_DEVICE names, else torch's current one."""
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
    """The backend for a kind of device in torch's notation: ``cuda:nccl,cpu:gloo``, or one for all (``gloo``)."""
    if ":" not in backends:
        return backends
    return dict(pair.strip().split(":", 1) for pair in backends.split(",")).get(kind)


def _backend_for(kind: devices.DeviceKind, wanted: str | None, cpu_tensors: bool = False) -> str:
    if wanted is not None and ":" in wanted:
        own = backend_for_device(wanted, kind.name)
        if own is not None and kind.name != "cpu":
            return wanted
        wanted, cpu_tensors = own, True  # a script for other devices
    if wanted is None and kind.name == "cuda" and _uses_smddp():
        return "smddp"
    if wanted is None or not _backend_supports(wanted, kind):
        found = next((name for name in kind.backends if dist.is_backend_available(name)), kind.backends[0])
        # Not for every run: gloo connects each rank to all others, in each group.
        both = cpu_tensors and wanted is None and kind.name != "cpu" and dist.is_gloo_available()
        return f"{kind.name}:{found},cpu:gloo" if both else found
    return wanted


def _uses_smddp() -> bool:
    """Whether this is a data-parallel job on Amazon SageMaker, whose image brings a library of its own for it."""
    if env.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE") != "DATA_PARALLEL" or find_spec("smdistributed") is None:
        return False
    importlib.import_module("smdistributed.dataparallel.torch.torch_smddp")  # makes the backend known to torch
    return True


def _backend_supports(backend: str, kind: devices.DeviceKind) -> bool:
    """False if the backend is known, and for other kinds of device only."""
    others = {name for other in devices.DEVICES.values() if other is not kind for name in other.backends}
    known: dict[str, list[str]] = dist.Backend.backend_capability
    return backend in kind.backends or backend not in others or kind.name in known.get(backend, [])


def _init_process_group(
    place: RankInfo,
    kind: devices.DeviceKind,
    backend: str,
    init_method: str | None,
    timeout: datetime.timedelta | None,
) -> None:
    own = dist.Backend(backend_for_device(backend, kind.name) or backend)
    limit = timeout if timeout is not None else dist.distributed_c10d._get_default_timeout(own)
    if "nccl" in backend:
        _disable_unsupported_p2p()
    store = rendezvous.init_store(place, init_method, limit)
    dist.init_process_group(
        backend,
        store=store,
        rank=place.rank,
        world_size=place.size,
        timeout=limit,
    )


def _disable_unsupported_p2p() -> None:
    if system_info.check_cuda_p2p_ib_support():
        return
    switches = {name: "1" for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE") if env.get(name) is None}
    env.publish(switches)
    if switches:
        logger.warning(
            "this NVIDIA driver offers direct access between GeForce RTX 40 cards, and NCCL hangs over it: set %s. A "
            "driver from 550.40.07 on needs neither.",
            " and ".join(f"{name}=1" for name in switches),
        )


_exit_callbacks: list[Callable[[], None]] = []


def at_exit(release: Callable[[], None]) -> None:
    """Has `release` called when the process ends, before the group is left: to drop what holds on to the group."""
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
    # First those whose hold on a group only they know how to give up.
    while _exit_callbacks:
        _exit_callbacks.pop()()
