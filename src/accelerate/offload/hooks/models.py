"""Hooks for whole models that take turns on a device, and for weights kept in a small format."""

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
    """Keeps a whole model in memory until it is called, and then on its device.

    Args:
        execution_device: Where it runs. None: this process's device.
        prev_module_hook: The hook of the model that ran before in a pipeline: that one is offloaded first.
    """

    def __init__(
        self, execution_device: Place | None = None, prev_module_hook: UserCpuOffloadHook | None = None
    ) -> None:
        self.prev_module_hook = prev_module_hook
        place = execution_device if execution_device is not None else PartialState().default_device
        self.execution_device = with_index(place)

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Moves the model to memory."""
        return module.to("cpu")

    @not_compiled
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Moves the model, and its arguments, to the device."""
        if self.prev_module_hook is not None and isinstance(self.prev_module_hook, UserCpuOffloadHook):
            before = self.prev_module_hook.model
            tensor = next(before.parameters(), None)
            if tensor is not None and tensor.device.type != "cpu":
                self.prev_module_hook.offload()
                clear_device_cache()
        module.to(self.execution_device)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)


class UserCpuOffloadHook:
    """What `cpu_offload_with_hook` hands out: offloads a model, and takes its hook off.

    Args:
        model: The model.
        hook: Its `CpuOffload`.
    """

    def __init__(self, model: nn.Module, hook: ModelHook) -> None:
        self.model = model
        self.hook = hook

    def offload(self) -> None:
        """Moves the model to memory."""
        self.hook.init_hook(self.model)

    def remove(self) -> None:
        """Takes the hook off the model."""
        remove_hook_from_module(self.model)


class LayerwiseCastingHook(ModelHook):
    """Keeps a module's weights in a small format, and converts them while it runs.

    Args:
        storage_dtype: The format between forwards.
        compute_dtype: The format in the forward.
        non_blocking: Let conversions run beside the CPU.
    """

    def __init__(self, storage_dtype: torch.dtype, compute_dtype: torch.dtype, non_blocking: bool) -> None:
        self.storage_dtype = storage_dtype
        self.compute_dtype = compute_dtype
        self.non_blocking = non_blocking

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Converts to the small format."""
        return module.to(dtype=self.storage_dtype, non_blocking=self.non_blocking)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Converts to the format of the forward."""
        module.to(dtype=self.compute_dtype, non_blocking=self.non_blocking)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Converts back."""
        self.init_hook(module)
        return output

    def after_error(self, module: nn.Module) -> None:
        """Converts back."""
        self.init_hook(module)


# Formats layer by layer -----------------------------------------------------------------------------------------------

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
    """Keeps the weights of linear and convolutional layers in a small format, and converts each while it runs.

    Args:
        module: The model.
        storage_dtype: The format between forwards, such as ``torch.float8_e4m3fn``.
        compute_dtype: The format in the forward, such as ``torch.bfloat16``.
        skip_modules_pattern: Regular expressions; layers in whose full name one is found are left alone.
        skip_modules_classes: Classes that are left alone, with what is inside them.
        non_blocking: Let conversions run beside the CPU.

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
