"""Hooks around the forward of a module, which load offloaded weights and move inputs.

A `ModelHook` runs before and after a forward. `AlignDevicesHook` moves inputs to the device that a module runs on and, if
the module is offloaded, loads its weights there; `attach_align_device_hook_on_blocks` attaches such hooks to a whole model.
All weights are loaded by `AlignDevicesHook.fetch`, which also takes prefetched ones.
"""

from __future__ import annotations

from .align import (
    AlignDevicesHook,
    align_module_device,
    fill_offloaded,
    get_state_dict_from_offload,
    get_state_dict_offloaded_model,
    has_offloaded_params,
)
from .attach import attach_align_device_hook, attach_align_device_hook_on_blocks, attach_execution_device_hook
from .base import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module, remove_hook_from_submodules
from .models import CpuOffload, LayerwiseCastingHook, UserCpuOffloadHook, attach_layerwise_casting_hooks

__all__ = [
    "AlignDevicesHook",
    "CpuOffload",
    "LayerwiseCastingHook",
    "ModelHook",
    "SequentialHook",
    "UserCpuOffloadHook",
    "add_hook_to_module",
    "align_module_device",
    "attach_align_device_hook",
    "attach_align_device_hook_on_blocks",
    "attach_execution_device_hook",
    "attach_layerwise_casting_hooks",
    "fill_offloaded",
    "get_state_dict_from_offload",
    "get_state_dict_offloaded_model",
    "has_offloaded_params",
    "remove_hook_from_module",
    "remove_hook_from_submodules",
]
