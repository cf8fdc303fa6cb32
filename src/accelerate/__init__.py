"""Run one plain PyTorch loop on one CPU, many GPUs, many machines or a TPU.

A public name is looked up in its real home when it is first used: importing this package imports nothing else, torch
least of all.
"""

from __future__ import annotations

import importlib

__version__ = "2.0.0"

_HOMES: dict[str, tuple[str, ...]] = {
    "accelerator": ("Accelerator",),
    "data_loader": ("skip_first_batches",),
    "launchers": ("debug_launcher", "notebook_launcher"),
    "runtime.memory": ("find_executable_batch_size",),
    "runtime.probe": ("is_rich_available",),
    "runtime.rng": ("synchronize_rng_states",),
    "settings.enums": ("DDPCommunicationHookType", "DistributedType"),
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
    "checkpointing",
    "commands",
    "data_loader",
    "launchers",
    "local_sgd",
    "logging",
    "memory_utils",
    "optimizer",
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
