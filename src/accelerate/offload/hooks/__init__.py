"""Hooks around the forward of a module: where weights are fetched just in time, and inputs follow them.

A `ModelHook` acts before and after a forward. `AlignDevicesHook` brings inputs to the device a module runs on and, if the
module is offloaded, its weights as well; `attach_align_device_hook_on_blocks` lays such hooks over a whole model. Weights
come from one place, `AlignDevicesHook.fetch`: whoever reads ahead does it there.
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
