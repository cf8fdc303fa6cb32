"""`AlignDevicesHook`: moves inputs, and offloaded weights, to the device that a module runs on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ...runtime.devices import with_index
from ...runtime.tensors.pytree import find_device, send_to_device
from ..disk_weights import OffloadedWeightsLoader, are_resident, loader_behind, read_weights, sources_of
from ..io.mmap_reader import Stop, never
from ..tensors import Place, TiedMap, as_parameter, named_module_tensors, owner_of, set_module_tensor_to_device
from .base import ModelHook, SequentialHook, not_compiled, remove_hook_from_module
from .prefetch import Prefetcher

SkipKeys = str | list[str] | None

# Tied weights stay tied: one placeholder per parameter, however many modules hold it, and one restored parameter for it.
_PLACEHOLDERS = WeakIdKeyDictionary()
_RESTORED = WeakIdKeyDictionary()


class AlignDevicesHook(ModelHook):
    """Moves inputs, and weights if they are offloaded, to the device that a module runs on.

    Args:
        execution_device: Device that the module runs on. None: inputs and weights are not moved.
        offload: Load the weights before each forward and release them after it.
        io_same_device: Move the output to the device of the input.
        weights_map: Offloaded weights, by their name in the module. None: the hook keeps them in CPU memory.
        offload_buffers: Offload buffers too; otherwise they stay on the execution device.
        place_submodules: Include the tensors of all submodules.
        skip_keys: Keyword arguments (keys of mappings) that are not moved.
        tied_params_map: Copies of tied tensors by address and device, so that each device has one.
        prefetcher: Prefetches for the hooks of this model. A hook that does not offload is the model's outermost one and
            ends the prefetcher's passes.
    """

    def __init__(
        self,
        execution_device: Place | None = None,
        offload: bool = False,
        io_same_device: bool = False,
        weights_map: Mapping[str, torch.Tensor] | None = None,
        offload_buffers: bool = False,
        place_submodules: bool = False,
        skip_keys: SkipKeys = None,
        tied_params_map: TiedMap | None = None,
        prefetcher: Prefetcher | None = None,
    ) -> None:
        self.device: torch.device | None = None
        self.execution_device = execution_device
        self.offload = offload
        self.io_same_device = io_same_device
        self.weights_map = weights_map
        self.offload_buffers = offload_buffers
        self.place_submodules = place_submodules
        self.skip_keys = skip_keys
        self.tied_params_map = tied_params_map
        self.prefetcher = prefetcher
        self.size = 0
        self.input_device: torch.device | None = None
        self.original_devices: dict[str, torch.device] = {}
        self.param_original_devices: dict[str, torch.device] = {}
        self.buffer_original_devices: dict[str, torch.device] = {}
        self.tied_params_names: set[str] = set()
        self.tied_pointers_to_remove: set[tuple[int, torch.device]] = set()
        # Placeholders of the weights between forwards; their identity stays the same from one forward to the next.
        self._placeholders: dict[str, torch.Tensor] = {}
        self._beside: list[str] = []  # statistics of quantized weights, by name
        # Other names of these weights: tied ones, where submodules are included.
        self._aliases: dict[str, str] = {}

    def __repr__(self) -> str:
        return (
            f"AlignDevicesHook(execution_device={self.execution_device}, offload={self.offload}, "
            f"io_same_device={self.io_same_device}, offload_buffers={self.offload_buffers}, "
            f"place_submodules={self.place_submodules}, skip_keys={self.skip_keys!r})"
        )

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Moves the module's tensors to the execution device, or offloads them."""
        if not self.offload:
            if self.execution_device is not None:
                for name, _ in named_module_tensors(module, recurse=self.place_submodules):
                    self._move(module, name, self.execution_device)
            return module
        tensors = dict(named_module_tensors(module, recurse=self.place_submodules))
        buffers = {name for name, _ in module.named_buffers(recurse=self.place_submodules)}
        self.original_devices = {name: tensor.device for name, tensor in tensors.items()}
        self.param_original_devices = {n: device for n, device in self.original_devices.items() if n not in buffers}
        self.buffer_original_devices = {n: device for n, device in self.original_devices.items() if n in buffers}
        offloaded = self._offloaded_names(module)
        first = {id(tensors[name]): name for name in offloaded}
        everywhere = module.named_parameters(recurse=self.place_submodules, remove_duplicate=False)
        self._aliases = {n: first[id(p)] for n, p in everywhere if id(p) in first and n != first[id(p)]}
        if self.weights_map is None:
            self.weights_map = {name: tensors[name].detach().to("cpu") for name in offloaded}
        for name in offloaded:
            if self.tied_params_map and tensors[name].data_ptr() in self.tied_params_map:
                self.tied_params_names.add(name)
            self._placeholders[name] = self._placeholder(module, name, tensors[name])
            self.size += tensors[name].nbytes
        quantized = [name for name, kept in self._placeholders.items() if type(kept) is not nn.Parameter]
        beside = [_statistics(name) for name in quantized if "weight" in name]
        self._beside = [name for name in beside if name in self.weights_map]
        if self.prefetcher is not None:
            self.prefetcher.register(self)
        self._evict(module)
        if self.execution_device is not None:
            for name in tensors.keys() - set(offloaded):
                self._move(module, name, self.execution_device)
        return module

    def _placeholder(self, module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor in _PLACEHOLDERS:
            known: torch.Tensor = _PLACEHOLDERS[tensor]
            return known
        set_module_tensor_to_device(module, name, "meta", clear_cache=False)
        owner, key = owner_of(module, name)
        placeholder = owner._buffers[key] if key in owner._buffers else owner._parameters[key]
        assert placeholder is not None
        if placeholder is not tensor:  # otherwise the entry would keep its own key alive
            _PLACEHOLDERS[tensor] = placeholder
        return placeholder

    def _move(self, module: nn.Module, name: str, device: Place) -> None:
        owner, key = owner_of(module, name)
        value = owner._parameters.get(key, owner._buffers.get(key))
        if value is not None and value.is_meta:  # nothing to move; loading will place it
            return
        set_module_tensor_to_device(module, name, device, tied_params_map=self.tied_params_map)

    def _offloaded_names(self, module: nn.Module) -> list[str]:
        """Names of the tensors to offload. Non-persistent buffers are in no state dict to load them from."""
        return [
            name
            for name, _ in named_module_tensors(
                module,
                include_buffers=self.offload_buffers,
                recurse=self.place_submodules,
                remove_non_persistent=True,
            )
        ]

    @property
    def execution_device(self) -> torch.device | None:
        """The device that the module runs on, with its index; None: inputs and weights are not moved."""
        return self.device

    @execution_device.setter
    def execution_device(self, place: Place | None) -> None:
        # torch.device("cuda") is not equal to torch.device("cuda", 0), so tensors would seem to be elsewhere.
        self.device = None if place is None else with_index(place)

    def fetch(self, ahead: bool = True) -> dict[str, torch.Tensor]:
        """Returns all offloaded weights on the execution device; every load of weights goes through here.

        Args:
            ahead: Take prefetched values, and start to prefetch the next ones.
        """
        values = self.prefetcher.take(self) if ahead and self.prefetcher is not None else None
        values = self.read() if values is None else values
        device = self.device
        return values if device is None else {name: self._is_on_device(value, device) for name, value in values.items()}

    def read(self, stop: Stop = never) -> dict[str, torch.Tensor]:
        """Returns all offloaded weights in CPU memory; weights on disk are read."""
        assert self.weights_map is not None
        return read_weights(self.weights_map, self._names(), stop)

    def is_resident(self) -> bool:
        """Returns whether loading the weights takes negligible time."""
        return self.weights_map is not None and are_resident(self.weights_map, self._names())

    def loader(self) -> OffloadedWeightsLoader | None:
        """Returns the loader that reads the weights of this hook and of others."""
        return loader_behind(self.weights_map)

    def sources(self) -> list[object] | None:
        """Returns the sources of the weights, to detect changes; None: do not prefetch them."""
        if self.weights_map is None or self.tied_params_names:  # tied weights are copied once, for all modules
            return None
        return sources_of(self.weights_map, self._names())

    def _names(self) -> list[str]:
        """Names of the offloaded weights, and of the row statistics that accompany 8-bit ones."""
        return [*self._placeholders, *self._beside]

    def _is_on_device(self, value: torch.Tensor, device: torch.device) -> torch.Tensor:
        if value.device == device:
            return value
        shared = self.tied_params_map.get(value.data_ptr()) if self.tied_params_map else None
        # A copy from pinned memory is queued on the stream, so the caller need not wait for the work before it.
        aside = device.type != "cpu" and value.is_pinned()
        if shared is None:
            return value.to(device, non_blocking=aside)
        if device not in shared:
            shared[device] = value.to(device, non_blocking=aside)
            self.tied_pointers_to_remove.add((value.data_ptr(), device))
        return shared[device]

    @not_compiled
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Fetches offloaded weights and moves the arguments."""
        if self.io_same_device:
            self.input_device = find_device([args, kwargs])
            if not self.offload and not self.place_submodules:  # the outermost hook of a model
                require_values(module)
        if self.offload:
            self._fill(module, self.fetch())
        if self.device is None:
            return args, kwargs
        return (
            send_to_device(args, self.device, skip_keys=self.skip_keys),
            send_to_device(kwargs, self.device, skip_keys=self.skip_keys),
        )

    def _fill(self, module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
        """Replaces the placeholders by weights."""
        for name, placeholder in self._placeholders.items():
            owner, key = owner_of(module, name)
            value = values[name]
            if key in owner._buffers:
                owner._buffers[key] = value
                continue
            if value.dtype != placeholder.dtype and value.is_floating_point():
                value = value.to(placeholder.dtype)
            # Its gradient would be lost with the weight, and the autograd graph would keep every weight alive.
            if type(placeholder) is nn.Parameter and not placeholder.__dict__:
                fetched = nn.Parameter(value, requires_grad=False)
            else:
                fetched = as_parameter(value, placeholder)
                fetched.requires_grad_(False)
            owner._parameters[key] = fetched
            if type(placeholder) is not nn.Parameter and _statistics(name) in values:
                fetched.SCB = values[_statistics(name)]  # type: ignore[attr-defined]
        self._tie(module)

    def _tie(self, module: nn.Module) -> None:
        """Assigns each tied weight under its other names."""
        for alias, name in self._aliases.items():
            owner, key = owner_of(module, alias)
            whole, whole_key = owner_of(module, name)
            owner._parameters[key] = whole._parameters[whole_key]

    @not_compiled
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Releases offloaded weights and, with `io_same_device`, moves the output to the device of the input."""
        self._evict(module)
        if self.prefetcher is not None and not self.offload:
            self.prefetcher.finish()
        if self.io_same_device and self.input_device is not None:
            output = send_to_device(output, self.input_device, skip_keys=self.skip_keys)
        return output

    def _evict(self, module: nn.Module) -> None:
        for name, placeholder in self._placeholders.items():
            owner, key = owner_of(module, name)
            (owner._buffers if key in owner._buffers else owner._parameters)[key] = placeholder  # type: ignore[assignment]
        self._tie(module)
        for pointer, device in self.tied_pointers_to_remove:
            if self.tied_params_map is not None:
                self.tied_params_map.get(pointer, {}).pop(device, None)
        self.tied_pointers_to_remove.clear()

    @not_compiled
    def after_error(self, module: nn.Module) -> None:
        """Releases offloaded weights."""
        self._evict(module)
        if self.prefetcher is not None and not self.offload:
            self.prefetcher.finish(completed=False)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Moves offloaded weights back to their original devices."""
        for name, placeholder in self._placeholders.items():
            device = self.original_devices[name]
            if device.type != "meta" and self.weights_map is not None:
                owner, key = owner_of(module, name)
                if key in owner._buffers:
                    owner._buffers[key] = self.weights_map[name].to(device)
                    continue
                if placeholder not in _RESTORED:
                    _RESTORED[placeholder] = as_parameter(self.weights_map[name].to(device), placeholder)
                owner._parameters[key] = _RESTORED[placeholder]
        self._tie(module)
        self._placeholders, self._beside, self._aliases = {}, [], {}
        return module


def _statistics(name: str) -> str:
    return f"{name.rpartition('.')[0]}.SCB".lstrip(".")


# Access to offloaded weights -------------------------------------------------------------------------------------------


def offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    """Returns the hook that loads a module's weights, also from within a `SequentialHook`; None without one."""
    hook = module.__dict__.get("_hf_hook")
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((one for one in hooks if isinstance(one, AlignDevicesHook) and one.offload), None)


def has_offloaded_params(module: nn.Module) -> bool:
    """Returns whether a module has a hook that loads its weights before each forward."""
    return offloading_hook(module) is not None


@contextmanager
def align_module_device(module: nn.Module, execution_device: Place | None = None) -> Iterator[None]:
    """Moves a module's own parameters to a device within a context, loading offloaded ones; restores them on exit.

    Values written to offloaded parameters on the execution device are lost on exit.

    Args:
        module: The module.
        execution_device: Target device. None: the hook's execution device; without a hook, parameters are not moved.
    """
    hook = offloading_hook(module)
    if hook is not None:
        usual = hook.execution_device
        if execution_device is not None:
            hook.execution_device = execution_device
        try:
            hook._fill(module, hook.fetch(ahead=False))
            yield
        finally:
            hook._evict(module)
            hook.execution_device = usual
        return
    if execution_device is None:
        yield
        return
    before = dict(module.named_parameters(recurse=False))
    try:
        for name in before:
            set_module_tensor_to_device(module, name, execution_device)
        yield
    finally:
        for name, parameter in before.items():
            if module._parameters[name].is_meta:  # type: ignore[union-attr]  # it has no values to move back
                module._parameters[name] = parameter
            else:
                set_module_tensor_to_device(module, name, parameter.device)


def get_state_dict_offloaded_model(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the full state dict of a partly offloaded model, on the CPU. Weights on disk are mapped, not read.

    Args:
        model: The model.

    Raises:
        RuntimeError: if a tensor has no values and no hook that loads them.
    """
    state = fill_offloaded(model, model.state_dict())
    lost = [name for name, value in state.items() if isinstance(value, torch.Tensor) and value.is_meta]
    if lost:
        raise RuntimeError(
            f"{type(model).__name__} has {len(lost)} tensors without values (device meta) and no hook that loads them, such "
            f"as {lost[0]!r}. Load its weights first."
        )
    return {name: value.to("cpu") if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def fill_offloaded(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the placeholders in a model's state dict by the offloaded weights, mapped from where they are stored."""
    filled = dict(state)
    for prefix, module in model.named_modules(
        remove_duplicate=False
    ):  # a state dict lists a module under all its names
        filled.update(_fetched(module, f"{prefix}." if prefix else "", state))
    return filled


def release_offloaded(model: nn.Module) -> dict[str, torch.Tensor]:
    """Removes all hooks from a partly offloaded model; does nothing to other models.

    Args:
        model: The model.

    Returns:
        Values, by name, of the tensors that are still on the meta device after their hooks were removed.
    """
    if not any(has_offloaded_params(module) for module in model.modules()):
        return {}
    values = fill_offloaded(model, model.state_dict())
    remove_hook_from_module(model, recurse=True)
    empty = [name for name, value in model.state_dict().items() if getattr(value, "is_meta", False)]
    return {name: values[name] for name in empty if not values[name].is_meta}


def require_values(model: nn.Module) -> None:
    """Raises if a module without a hook has parameters on the meta device, with which torch would compute silently.

    Raises:
        RuntimeError: with the name of the first such parameter.
    """
    fetched: set[int] = set()
    for prefix, module in model.named_modules():
        hook = offloading_hook(module)
        if hook is not None:
            fetched.update(map(id, hook._placeholders.values()))
        if "_hf_hook" in module.__dict__:
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and id(parameter) not in fetched:
                raise RuntimeError(
                    f"{prefix}.{key} has no values (device meta), and no hook loads them: it was added to the model after "
                    "the weights were offloaded, and was moved to the meta device with them. Extend the model first (by "
                    "an adapter, for example) and offload it then; or call remove_hook_from_submodules(model), extend "
                    "the model, and offload it again."
                )


def get_state_dict_from_offload(
    module: nn.Module,
    module_name: str,
    state_dict: Mapping[str, Any],
    device_to_put_offload: Place = "cpu",
) -> dict[str, Any]:
    """Copies a state dict and replaces a module's placeholders in it by the offloaded weights.

    Args:
        module: The module.
        module_name: Its full name with a trailing dot, or the full name of one of its tensors.
        state_dict: The state dict, with placeholders.
        device_to_put_offload: Target device of the loaded weights.

    Returns:
        The new state dict.
    """
    prefix = module_name if not module_name or module_name.endswith(".") else module_name.rpartition(".")[0] + "."
    fetched = _fetched(module, prefix, state_dict)
    return {**state_dict, **{name: value.to(device_to_put_offload) for name, value in fetched.items()}}


def _fetched(module: nn.Module, prefix: str, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the offloaded weights of a module whose entries in a state dict are placeholders."""
    hook = offloading_hook(module)
    if hook is None or hook.weights_map is None:
        return {}
    placeholders = {prefix + name: name for name in hook._placeholders}
    placeholders.update((prefix + alias, name) for alias, name in hook._aliases.items())
    wanted = {full: name for full, name in placeholders.items() if getattr(state.get(full), "is_meta", False)}
    return {full: hook.weights_map[name] for full, name in wanted.items()}
