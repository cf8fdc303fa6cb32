"""Where a rule does not hold, and why. An entry that no longer applies makes the tests fail, as a missing one does."""

from __future__ import annotations

ENVIRONMENT = {
    "__init__.py": "looks for one variable, as importing settings/env.py costs more than all else that it does",
    "settings/env.py": "the one reader and writer of the process environment",
}

FORWARD = {"runtime/tensors/forward.py": "the one place that wraps and unwraps a forward"}

DISTRIBUTED_TYPE = {
    "state.py": "shows the user which kind is at work",
}

HOW_SHARDED = {
    "accelerator.py: Accelerator._mesh_rank": "tells a person a rank's place on the mesh",
    "checkpointing/sharded/shard_layout.py: _dtensor_layout": "where a tensor of any mesh lies, not which mesh it is",
    "data_loader/mesh.py: data_shard_of_mesh": "turns a mesh into who reads which part, which is all that loaders know",
    "data_loader/dispatch.py: DataLoaderDispatcher.ranks": "the documented argument torch_device_mesh",
    "data_loader/prepare.py: _ranks": "the documented argument torch_device_mesh",
}

UNSAFE_LOADING: dict[str, str] = {}

SHELL: dict[str, str] = {}

# Each exists in the lowest and the newest release that we run (`make floor`, `make newest`). Where the reason names no
# fallback, a release without the name fails at that place only, with its name.
PRIVATE_TORCH = {
    "checkpointing/fsdp_files.py: torch.nn.modules.module._IncompatibleKeys": "the type that load_state_dict returns",
    "checkpointing/sharded/local_state.py: torch.distributed.fsdp._runtime_utils._reshard": (
        "FSDP 1 has no public reshard, as FSDP 2 has"
    ),
    "checkpointing/sharded/shard_layout.py: torch.distributed.tensor._utils.compute_local_shape_and_global_offset": (
        "where a shard lies; uneven and strided shards are torch's own arithmetic"
    ),
    "checkpointing/sharded/dcp_writer.py: torch.distributed.checkpoint.filesystem._StorageInfo": (
        "DCP's own files pickle it by name"
    ),
    "commands/estimate/step.py": "fake tensors and their dispatch modes have no public module; only the estimate uses them",
    "data_loader/iterable.py: torch.utils.data._utils.pin_memory.pin_memory": "pins batches of any type as DataLoader does",
    "inference": "torch's public pytree is younger than the floor, and fx's graphs hold containers of the private one",
    "runtime/tensors/forward.py: torch._dynamo.eval_frame.OptimizedModule": "what torch.compile returns; read once loaded",
    "runtime/world.py: torch.distributed.distributed_c10d._get_default_timeout": "init_process_group waits so long",
    "runtime/world.py: torch.distributed.distributed_c10d._world.pg_map": "lists the groups, whose threads must end",
    "strategies/accumulation.py: torch._foreach_mul_": "documented in spite of its name",
    "strategies/parallel/grad_sync.py: torch.utils._pytree.tree_leaves": "torch's public pytree is younger than the floor",
    "strategies/parallel/grad_sync.py: torch._C._current_graph_task_id": (
        "distinguishes a backward from the next, after a failure too"
    ),
    "strategies/parallel/grad_sync.py: torch.autograd.Variable._execution_engine.queue_callback": (
        "runs at the end of a backward; DDP does the same"
    ),
    "strategies/parallel/grad_sync.py: torch._foreach_copy_": "documented in spite of its name",
    "strategies/fsdp1.py: torch.distributed.fsdp.ShardingStrategy._HYBRID_SHARD_ZERO2": "the documented HYBRID_SHARD_ZERO2",
    "strategies/parallel/mesh.py: torch._foreach_mul_": "documented in spite of its name",
    "strategies/parallel/context/backends.py: torch.distributed.tensor.experimental._attention.set_rotate_method": (
        "how torch's own context parallelism is told to send keys and values; the feature is experimental as a whole"
    ),
    "strategies/parallel/materialize.py: torch.distributed.tensor.placement_types._StridedShard": (
        "the placement of a dimension that is cut twice, which has no public name"
    ),
    "strategies/parallel/materialize.py: torch.utils._python_dispatch.is_traceable_wrapper_subclass": (
        "recognizes tensors made of several, for which there is no public test"
    ),
}

SHOP_WINDOW = {
    "utils": "its modules may name each other",
    "test_utils": "stands above it: its scripts are run as a user's would be",
}

LONG_FILE = 520
"""About 500 lines."""

LONG_FILES: dict[str, tuple[int, str]] = {
    "accelerator.py": (920, "the façade: one method each, mostly docstrings"),
}

LONG_FUNCTIONS: dict[str, str] = {}
