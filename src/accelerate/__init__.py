"""Runs a plain PyTorch training loop on one CPU, many GPUs, many machines or a TPU.

Public names are imported from the modules that define them on first use (PEP 562), so that importing this package imports
neither torch nor any submodule. In a launched rank it installs the hook that records the exception which ends the rank.
"""

from __future__ import annotations

import importlib
import os

__version__ = "2.0.0"

_HOMES: dict[str, tuple[str, ...]] = {
    "accelerator": ("Accelerator",),
    "big_modeling": (
        "cpu_offload",
        "cpu_offload_with_hook",
        "disk_offload",
        "dispatch_model",
        "init_empty_weights",
        "init_on_device",
        "load_checkpoint_and_dispatch",
    ),
    "data_loader": ("skip_first_batches",),
    "inference": ("prepare_pippy",),
    "launchers": ("debug_launcher", "notebook_launcher"),
    "parallelism_config": ("ParallelismConfig",),
    "offload.device_map": ("infer_auto_device_map",),
    "offload.loading": ("load_checkpoint_in_model",),
    "runtime.memory": ("find_executable_batch_size",),
    "runtime.system.availability": ("is_rich_available",),
    "runtime.rng": ("synchronize_rng_states",),
    "settings.plugins.deepspeed": ("DeepSpeedPlugin",),
    "settings.enums": ("DDPCommunicationHookType", "DistributedType"),
    "settings.plugins.fsdp": ("FullyShardedDataParallelPlugin",),
    "settings.handlers": (
        "AutocastKwargs",
        "DataLoaderConfiguration",
        "DistributedDataParallelKwargs",
        "GradScalerKwargs",
        "InitProcessGroupKwargs",
        "ProfileKwargs",
    ),
    "state": ("PartialState",),
}
_EXPORTS = {name: home for home, names in _HOMES.items() for name in names}
# Public modules: `import accelerate` is enough to write accelerate.state.AcceleratorState.
_SUBMODULES = (
    "accelerator",
    "big_modeling",
    "checkpointing",
    "commands",
    "data_loader",
    "hooks",
    "inference",
    "launchers",
    "local_sgd",
    "logging",
    "memory_utils",
    "optimizer",
    "parallelism_config",
    "scheduler",
    "state",
    "test_utils",
    "tracking",
    "utils",
)

__all__ = sorted([*_EXPORTS, "__version__"])  # noqa: PLE0605 - the table above is the list


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        value: object = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_SUBMODULES})


if "TORCHELASTIC_ERROR_FILE" in os.environ:  # a script may fail long before it creates Accelerator
    from .runtime.cluster.error_file import record_errors as _record_errors

    _record_errors()
