"""Brings a process back to where it started: singletons, seeds, dtype, threads, loggers.

Used between two tests of the pytest process and between two calls of a pool worker.
Touches a library only if it has been imported already, so that tests of torch-free modules stay torch-free.
"""

from __future__ import annotations

import gc
import logging
import random
import sys
import time


def reset_singletons() -> None:
    """Empties accelerate's process-wide state, as far as the modules that hold it have been imported."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        # AcceleratorState first: the documented order, since its reset may also reset PartialState.
        for name in ("AcceleratorState", "GradientState", "PartialState"):
            singleton = getattr(state, name, None)
            if singleton is not None:
                singleton._reset_state()
    world = sys.modules.get("accelerate.runtime.world")
    if world is not None and hasattr(world, "forget"):
        world.forget()
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "accelerate"]:
        logging.getLogger(name).setLevel(logging.NOTSET)


def reset_torch(seed: int = 0, threads: int | None = None) -> None:
    """Sets seeds, default dtype, gradient mode and determinism flags back to their defaults."""
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "manual_seed"):
        return
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    if torch.are_deterministic_algorithms_enabled():  # asked first: the call imports the compiler
        torch.use_deterministic_algorithms(False)
    if threads is not None:
        torch.set_num_threads(threads)


def leave_group(barrier: bool) -> None:
    """Destroys the default process group, if there is one.

    Models and optimizers are collected and a barrier passed first: a gloo group destroyed while a reducer still
    refers to it aborts the process now and then.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    from accelerate.runtime.system.availability import is_torch_version
    from accelerate.runtime.world import DRAIN_SECONDS

    gc.collect()
    if barrier:
        torch.distributed.barrier()
    if is_torch_version("<", "2.7.0"):
        time.sleep(DRAIN_SECONDS)
        forget_meshes()
    torch.distributed.destroy_process_group()


def forget_meshes() -> None:
    """Empties torch 2.6's caches, in which the meshes of this group would be those of the next one, too."""
    device_mesh, tensor = (sys.modules.get(f"torch.distributed.{name}") for name in ("device_mesh", "tensor"))
    if device_mesh is not None:
        device_mesh._mesh_resources.__init__()
    if tensor is not None:
        tensor.DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()
        tensor._redistribute._gen_transform_infos.cache_clear()
