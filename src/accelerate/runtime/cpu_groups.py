"""Gloo groups of all ranks beside the training group: for objects, and for waits longer than its timeout.

A collective of the training group must not wait for a disk or for a person's code: NCCL's watchdog ends a process whose
peers keep it waiting for ten minutes. A group has one purpose, so that threads and callers never mix up their messages.
"""

from __future__ import annotations

import datetime
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist

from .collective_backend import Collectives, TorchCollectives
from .world import current, is_joined, on_leave

# By the training group, and by purpose. torch destroys them with the training group.
_GROUPS: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, Collectives]] = weakref.WeakKeyDictionary()
on_leave(_GROUPS.clear)


def cpu_group(purpose: str, timeout: datetime.timedelta, before: Callable[[], object] = lambda: None) -> Collectives:
    """Returns the group for a purpose; the first call creates it, which all ranks make together and in the same order.

    Args:
        purpose: Names the group.
        timeout: How long one of its collectives may take. A rank that died is noticed by its closed connections.
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
