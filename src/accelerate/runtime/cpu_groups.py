"""Gloo groups over all ranks, besides the training group: for objects, and with timeouts of their own.

Collectives of the training group must not block on disk I/O or user code: NCCL's watchdog aborts a process whose
collective takes ten minutes. Each purpose has its own group, so that collectives of different threads cannot interleave.
"""

from __future__ import annotations

import datetime
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist

from .collective_backend import Collectives, TorchCollectives
from .world import current, is_joined, on_leave

# Training group -> purpose -> group. torch destroys them with the training group.
_GROUPS: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, Collectives]] = weakref.WeakKeyDictionary()
on_leave(_GROUPS.clear)


def cpu_group(purpose: str, timeout: datetime.timedelta, before: Callable[[], object] = lambda: None) -> Collectives:
    """Returns the group for a purpose. The first call creates it: all ranks must make it, in the same order.

    Args:
        purpose: Name of the group.
        timeout: Timeout of its collectives. The death of a rank ends them earlier, since its connections close.
        before: Called before the group is created.

    Returns:
        Collectives over CPU tensors; without torch.distributed or gloo those of the `World`.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.is_gloo_available()):
        return current().collectives if is_joined() else Collectives(torch.device("cpu"))
    everyone = dist.group.WORLD
    assert everyone is not None
    groups = _GROUPS.setdefault(everyone, {})
    if purpose not in groups:
        before()
        groups[purpose] = TorchCollectives(torch.device("cpu"), dist.new_group(backend="gloo", timeout=timeout))
    return groups[purpose]
