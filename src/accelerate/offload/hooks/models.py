"""Hooks for whole models that take turns on a device, and for weights stored in a smaller dtype."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from ...runtime.devices import with_index
from ...runtime.memory import clear_device_cache
from ...runtime.tensors.pytree import send_to_device
from ...state import PartialState
from ..tensors import Place
from .base import ModelHook, add_hook_to_module, not_compiled, remove_hook_from_module


class CpuOffload(ModelHook):
    """Keeps a whole model in CPU memory until it is called, then moves it to its device.

    Args:
        execution_device: Device that the model runs on. None: this process's device.
        prev_module_hook: Hook of the model that ran before in a pipeline, which is offloaded first.
    """

    def __init__(
        self, execution_device: Place | None = None, prev_module_hook: UserCpuOffloadHook | None = None
    ) -> None:
        self.prev_module_hook = prev_module_hook
        place = execution_device if execution_device is not None else PartialState().default_device
        self.execution_device = with_index(place)

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Moves the model to CPU memory."""
        return module.to("cpu")

    @not_compiled
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Moves the model and its arguments to the device."""
        if self.prev_module_hook is not None and isinstance(self.prev_module_hook, UserCpuOffloadHook):
            before = self.prev_module_hook.model
            tensor = next(before.parameters(), None)
            if tensor is not None and tensor.device.type != "cpu":
                self.prev_module_hook.offload()
                clear_device_cache()
        module.to(self.execution_device)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)


class UserCpuOffloadHook:
    """Handle returned by `cpu_offload_with_hook`: offloads a model, and removes its hook.

    Args:
        model: The model.
        hook: Its `CpuOffload`.
    """

    def __init__(self, model: nn.Module, hook: ModelHook) -> None:
        self.model = model
        self.hook = hook

    def offload(self) -> None:
        """Moves the model to CPU memory."""
        self.hook.init_hook(self.model)

    def remove(self) -> None:
        """Removes the hook from the model."""
        remove_hook_from_module(self.model)


class LayerwiseCastingHook(ModelHook):
    """Stores a module's weights in a smaller dtype, and casts them for each forward.

    Args:
        storage_dtype: dtype between forwards.
        compute_dtype: dtype in the forward.
        non_blocking: Cast without blocking the host.
    """

    def __init__(self, storage_dtype: torch.dtype, compute_dtype: torch.dtype, non_blocking: bool) -> None:
        self.storage_dtype = storage_dtype
        self.compute_dtype = compute_dtype
        self.non_blocking = non_blocking

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Casts to the storage dtype."""
        return module.to(dtype=self.storage_dtype, non_blocking=self.non_blocking)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Casts to the compute dtype."""
        module.to(dtype=self.compute_dtype, non_blocking=self.non_blocking)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Casts back to the storage dtype."""
        self.init_hook(module)
        return output

    def after_error(self, module: nn.Module) -> None:
        """Casts back to the storage dtype."""
        self.init_hook(module)


# Layerwise casting ----------------------------------------------------------------------------------------------------

_CASTABLE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def attach_layerwise_casting_hooks(
    module: nn.Module,
    storage_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    skip_modules_pattern: str | tuple[str, ...] | None = None,
    skip_modules_classes: tuple[type[nn.Module], ...] | None = None,
    non_blocking: bool = False,
) -> None:
    """Stores the weights of linear and convolutional layers in a smaller dtype, and casts each for its forward.

    Args:
        module: The model.
        storage_dtype: dtype between forwards, such as ``torch.float8_e4m3fn``.
        compute_dtype: dtype in the forward, such as ``torch.bfloat16``.
        skip_modules_pattern: Regular expressions; layers whose full name matches one are skipped.
        skip_modules_classes: Classes whose modules are skipped, submodules included.
        non_blocking: Cast without blocking the host.

    Example:
        ```python
        attach_layerwise_casting_hooks(model, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=("norm", "embed"))
        ```
    """
    patterns = (skip_modules_pattern,) if isinstance(skip_modules_pattern, str) else skip_modules_pattern or ()

    def attach(part: nn.Module, name: str) -> None:
        if isinstance(part, skip_modules_classes or ()) or any(re.search(pattern, name) for pattern in patterns):
            return
        if isinstance(part, _CASTABLE):
            add_hook_to_module(part, LayerwiseCastingHook(storage_dtype, compute_dtype, non_blocking), append=True)
            return
        for key, child in part.named_children():
            attach(child, f"{name}.{key}" if name else key)

    attach(module, "")
