"""Runs one rank of many in this process, on torch's fake process group, and records what it communicates.

Fake collectives return at once and carry nothing, so that sequences of collectives at 64 ranks are compared without 64
processes. Objects cannot be pickled through them: they are recorded, and every rank is taken to have sent the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accelerate.runtime.transport import TorchCollectives

Recorded = tuple[str, tuple[tuple[int, ...], ...], str, int]
"""The operation, the shapes of its tensors, their kinds of device, and the size of the group (0: not visible)."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Recorded] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, leaves = str(func), tree_leaves((args, kwargs))
        if name.startswith(("c10d.", "_c10d_functional.")) and "wait_tensor" not in name:
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            sizes = [leaf.size() for leaf in leaves if isinstance(leaf, dist.ProcessGroup)]
            kinds = ",".join(sorted({tensor.device.type for tensor in tensors}))
            self.found.append((name, tuple(tuple(tensor.shape) for tensor in tensors), kinds, sizes[0] if sizes else 0))
        return func(*args, **(kwargs or {}))


@contextmanager
def rank_of(rank: int, size: int) -> Iterator[list[Recorded]]:
    """This process as rank `rank` of `size`, in a fake group; gives the collectives that it calls inside the block."""
    # No public name makes a fake group; the module registers its backend.
    fake = importlib.import_module("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", rank=rank, world_size=size, store=fake.FakeStore())
    recorder = _Recorder()

    def all_gather_object(self: TorchCollectives, obj: Any) -> list[Any]:
        recorder.found.append(("all_gather_object", (), self.device.type, self.size))
        return [obj] * self.size

    def broadcast_object_list(self: TorchCollectives, objects: list[Any], src: int = 0) -> list[Any]:
        recorder.found.append(("broadcast_object_list", (), self.device.type, self.size))
        return objects

    variables = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size), "RANK": str(rank), "WORLD_SIZE": str(size)}
    try:
        with (
            mock.patch.dict("os.environ", variables),
            mock.patch.object(TorchCollectives, "all_gather_object", all_gather_object),
            mock.patch.object(TorchCollectives, "broadcast_object_list", broadcast_object_list),
            recorder,
        ):
            yield recorder.found
    finally:
        dist.destroy_process_group()
        # What DTensor remembers of operations holds the mesh of a group that is gone, and that of the next rank equals it.
        for clear in (
            "_clear_sharding_prop_cache",
            "_clear_fast_path_sharding_prop_cache",
            "_clear_python_sharding_prop_cache",
        ):
            getattr(importlib.import_module("torch.distributed.tensor.debug"), clear, lambda: None)()
