"""Attaches `AlignDevicesHook`s to a whole model: to each module that has tensors, or block by block for a device map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...runtime.devices import with_index
from ..disk_weights import PrefixedDataset
from ..tensors import Place, TiedMap, named_module_tensors
from .align import AlignDevicesHook, SkipKeys
from .base import add_hook_to_module
from .prefetch import Prefetcher, prefetcher


def attach_execution_device_hook(
    module: nn.Module,
    execution_device: Place,
    skip_keys: SkipKeys = None,
    preload_module_classes: Sequence[str] | None = None,
    tied_params_map: TiedMap | None = None,
) -> None:
    """Attaches hooks to all modules that have parameters or buffers, so that they run on a device.

    Args:
        module: The root; submodules that have a hook keep it.
        execution_device: The device.
        skip_keys: See `AlignDevicesHook`.
        preload_module_classes: Names of classes whose submodules get no hooks of their own.
        tied_params_map: See `AlignDevicesHook`.
    """
    if not hasattr(module, "_hf_hook") and _has_tensors(module):
        add_hook_to_module(
            module, AlignDevicesHook(execution_device, skip_keys=skip_keys, tied_params_map=tied_params_map)
        )
    if type(module).__name__ in (preload_module_classes or ()):
        return
    for child in module.children():
        attach_execution_device_hook(child, execution_device, skip_keys, preload_module_classes, tied_params_map)


def _has_tensors(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def attach_align_device_hook(
    module: nn.Module,
    execution_device: Place | None = None,
    offload: bool = False,
    weights_map: Mapping[str, torch.Tensor] | None = None,
    offload_buffers: bool = False,
    module_name: str = "",
    skip_keys: SkipKeys = None,
    preload_module_classes: Sequence[str] | None = None,
    tied_params_map: TiedMap | None = None,
    prefetch: bool | Prefetcher | None = None,
) -> None:
    """Attaches an `AlignDevicesHook` to every module that has tensors of its own.

    Args:
        module: The root.
        execution_device: Device that the modules run on.
        offload: Load weights before each forward and release them after it.
        weights_map: Offloaded weights by full name.
        offload_buffers: Offload buffers too.
        module_name: Full name of `module`.
        skip_keys: See `AlignDevicesHook`.
        preload_module_classes: Names of classes whose modules load all their weights at once, submodules included, because
            their forward uses weights of submodules that it does not call.
        tied_params_map: See `AlignDevicesHook`.
        prefetch: Whether to prefetch weights, or the model's prefetcher. None: as set by ``ACCELERATE_OFFLOAD_PREFETCH``,
            by default yes.
    """
    reader = reader_for(prefetch, execution_device, offload, weights_map)
    whole = offload and type(module).__name__ in (preload_module_classes or ())
    if next(named_module_tensors(module, recurse=whole), None) is not None:
        prefix = f"{module_name}." if module_name else ""
        hook = AlignDevicesHook(
            execution_device,
            offload=offload,
            weights_map=None if weights_map is None else PrefixedDataset(weights_map, prefix),
            offload_buffers=offload_buffers,
            place_submodules=whole,
            skip_keys=skip_keys,
            tied_params_map=tied_params_map,
            prefetcher=reader,
        )
        add_hook_to_module(module, hook, append=True)
    if whole:
        return
    for key, child in module.named_children():
        attach_align_device_hook(
            child,
            execution_device,
            offload,
            weights_map,
            offload_buffers,
            f"{module_name}.{key}" if module_name else key,
            skip_keys,
            preload_module_classes,
            tied_params_map,
            reader if reader is not None else False,
        )


def reader_for(
    prefetch: bool | Prefetcher | None,
    device: Place | None,
    offload: bool,
    weights_map: Mapping[str, torch.Tensor] | None,
) -> Prefetcher | None:
    """Selects the prefetcher; None if CPU weights are used on the CPU.

    Args:
        prefetch: Whether to prefetch, or the prefetcher. None: as set by ``ACCELERATE_OFFLOAD_PREFETCH``, by default yes.
        device: Device that the modules run on.
        offload: Whether weights are offloaded at all.
        weights_map: The offloaded weights.
    """
    if isinstance(prefetch, Prefetcher):
        return prefetch
    there = device is None or with_index(device).type == "cpu"
    if not offload or (there and (weights_map is None or isinstance(weights_map, dict))):
        return None
    return prefetcher(prefetch)


def attach_align_device_hook_on_blocks(
    module: nn.Module,
    execution_device: Place | Mapping[str, Place] | None = None,
    offload: bool | Mapping[str, bool] = False,
    weights_map: Mapping[str, torch.Tensor] | None = None,
    offload_buffers: bool = False,
    module_name: str = "",
    skip_keys: SkipKeys = None,
    preload_module_classes: Sequence[str] | None = None,
    tied_params_map: TiedMap | None = None,
    prefetch: bool | None = None,
) -> None:
    """Attaches hooks to a model whose blocks run on different devices.

    Args:
        module: The root.
        execution_device: One device, or devices by name of block (or of a tensor that belongs directly to a larger module).
        offload: Whether to offload weights; for all blocks, or by the same names.
        weights_map: Offloaded weights by full name.
        offload_buffers: Offload buffers too.
        module_name: Full name of `module`.
        skip_keys: See `AlignDevicesHook`.
        preload_module_classes: See `attach_align_device_hook`.
        tied_params_map: See `AlignDevicesHook`.
        prefetch: See `attach_align_device_hook`.
    """
    shared = (weights_map, offload_buffers, skip_keys, preload_module_classes, tied_params_map, prefetch)
    if not isinstance(execution_device, Mapping) and not isinstance(offload, Mapping):
        _attach_to_all(module, module_name, execution_device, offload, *shared)
        return
    names = execution_device if isinstance(execution_device, Mapping) else offload
    assert isinstance(names, Mapping)
    devices = execution_device if isinstance(execution_device, Mapping) else dict.fromkeys(names, execution_device)
    offloaded = offload if isinstance(offload, Mapping) else dict.fromkeys(names, offload)
    _BlockAttacher(devices, offloaded, *shared).attach(module, module_name)


def _attach_to_all(
    module: nn.Module,
    name: str,
    device: Place | None,
    offload: bool,
    weights_map: Mapping[str, torch.Tensor] | None,
    offload_buffers: bool,
    skip_keys: SkipKeys,
    preload: Sequence[str] | None,
    tied: TiedMap | None,
    prefetch: bool | None,
) -> None:
    options: dict[str, Any] = {"skip_keys": skip_keys, "tied_params_map": tied}
    if offload:
        reader = reader_for(prefetch, device, True, weights_map)
        attach_align_device_hook(
            module,
            device,
            True,
            weights_map,
            offload_buffers,
            name,
            preload_module_classes=preload,
            prefetch=reader if reader is not None else False,
            **options,
        )
        around = AlignDevicesHook(device, io_same_device=True, skip_keys=skip_keys, prefetcher=reader)
        add_hook_to_module(module, around, append=True)
        return
    hook = AlignDevicesHook(device, io_same_device=True, place_submodules=True, **options)
    add_hook_to_module(module, hook, append=True)


class _BlockAttacher:
    """Attaches hooks by a device map; arguments as for `attach_align_device_hook_on_blocks`."""

    def __init__(
        self,
        devices: Mapping[str, Place | None],
        offloaded: Mapping[str, bool],
        weights_map: Mapping[str, torch.Tensor] | None,
        offload_buffers: bool,
        skip_keys: SkipKeys,
        preload: Sequence[str] | None,
        tied: TiedMap | None,
        prefetch: bool | None,
    ) -> None:
        self._devices = devices
        self._offloaded = offloaded
        self._weights_map = weights_map
        self._offload_buffers = offload_buffers
        self._preload = preload
        self._options: dict[str, Any] = {"skip_keys": skip_keys, "tied_params_map": tied}
        # One prefetcher for the model, since consecutive layers may be on different devices.
        self._reader = prefetcher(prefetch) if any(offloaded.values()) else None

    def attach(self, module: nn.Module, name: str) -> None:
        if name in self._devices:
            self._block(module, name)
        else:
            self._own_tensors(module, name)
        if not name and ("" not in self._devices or self._offloaded.get("", False)):
            # Outputs of the whole model return to the device of its inputs.
            around = AlignDevicesHook(io_same_device=True, prefetcher=self._reader, **self._options)
            add_hook_to_module(module, around, append=True)
        for key, child in module.named_children():
            self.attach(child, f"{name}.{key}" if name else key)

    def _block(self, module: nn.Module, name: str) -> None:
        device = self._devices[name]
        if not self._offloaded.get(name, False):
            hook = AlignDevicesHook(device, io_same_device=not name, place_submodules=True, **self._options)
            add_hook_to_module(module, hook, append=True)
            if device is not None:
                attach_execution_device_hook(module, device, preload_module_classes=self._preload, **self._options)
            return
        attach_align_device_hook(
            module,
            device,
            True,
            self._weights_map,
            self._offload_buffers,
            name,
            preload_module_classes=self._preload,
            prefetch=self._reader if self._reader is not None else False,
            **self._options,
        )
        if not hasattr(module, "_hf_hook"):
            add_hook_to_module(module, AlignDevicesHook(device, **self._options))
        if device is not None:
            attach_execution_device_hook(module, device, preload_module_classes=self._preload, **self._options)

    def _own_tensors(self, module: nn.Module, name: str) -> None:
        """Attaches a hook for tensors that belong directly to a module whose submodules are split over devices."""
        prefix = f"{name}." if name else ""
        listed = [key for key, _ in named_module_tensors(module) if prefix + key in self._devices]
        if not listed:
            return
        first = prefix + listed[0]
        hook = AlignDevicesHook(
            self._devices[first],
            offload=self._offloaded.get(first, False),
            weights_map=None if self._weights_map is None else PrefixedDataset(self._weights_map, prefix),
            offload_buffers=self._offload_buffers,
            prefetcher=self._reader,
            **self._options,
        )
        add_hook_to_module(module, hook, append=True)
