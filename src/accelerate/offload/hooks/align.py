"""The hook that brings inputs, and offloaded weights, to the device a module runs on."""

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

# Tied weights stay tied: a parameter has one placeholder however many modules hold it, and one parameter comes back for it.
_PLACEHOLDERS = WeakIdKeyDictionary()
_RESTORED = WeakIdKeyDictionary()


class AlignDevicesHook(ModelHook):
    """Brings inputs, and weights if they are offloaded, to the device that a module runs on.

    Args:
        execution_device: Where the module runs. None: inputs and weights stay where they are.
        offload: Fetch the weights before each forward, and let go of them after it.
        io_same_device: Send the output to the device the input came from.
        weights_map: Where offloaded weights are fetched, by their name in the module. None: kept in memory by the hook.
        offload_buffers: Offload buffers too; else they stay on the execution device.
        place_submodules: Do the same for the tensors of all modules inside.
        skip_keys: Keyword arguments (keys of mappings) that stay where they are.
        tied_params_map: Copies of shared tensors by address and device, so that each device has one.
        prefetcher: Reads ahead for the hooks of this model. A hook that does not offload ends its passes: it is around
            the whole.
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
        # What stands in for the weights between two forwards: one object each, however often they come and go.
        self._placeholders: dict[str, torch.Tensor] = {}
        self._beside: list[str] = []  # statistics of quantised weights, by name
        # Further names of these weights: tied ones, inside a module fetched as a whole.
        self._aliases: dict[str, str] = {}

    def __repr__(self) -> str:
        return (
            f"AlignDevicesHook(execution_device={self.execution_device}, offload={self.offload}, "
            f"io_same_device={self.io_same_device}, offload_buffers={self.offload_buffers}, "
            f"place_submodules={self.place_submodules}, skip_keys={self.skip_keys!r})"
        )

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Places the module's tensors: on the execution device, or offloaded."""
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
        quantised = [name for name, kept in self._placeholders.items() if type(kept) is not nn.Parameter]
        beside = [_statistics(name) for name in quantised if "weight" in name]
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
        if placeholder is not tensor:  # else it would keep itself alive
            _PLACEHOLDERS[tensor] = placeholder
        return placeholder

    def _move(self, module: nn.Module, name: str, device: Place) -> None:
        owner, key = owner_of(module, name)
        value = owner._parameters.get(key, owner._buffers.get(key))
        if value is not None and value.is_meta:  # nothing to move; loading will place it
            return
        set_module_tensor_to_device(module, name, device, tied_params_map=self.tied_params_map)

    def _offloaded_names(self, module: nn.Module) -> list[str]:
        """Names of the tensors that come and go. Buffers that are in no state have nowhere to come from."""
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
        """Where the module runs, with its index; None: inputs and weights stay where they are."""
        return self.device

    @execution_device.setter
    def execution_device(self, place: Place | None) -> None:
        # A device without an index equals that of no tensor, and what is there already would be taken to be elsewhere.
        self.device = None if place is None else with_index(place)

    def fetch(self, ahead: bool = True) -> dict[str, torch.Tensor]:
        """The values of all offloaded weights, on the execution device. The one place where they come from.

        Args:
            ahead: Take what was read ahead, and have the next ones read.
        """
        values = self.prefetcher.take(self) if ahead and self.prefetcher is not None else None
        values = self.read() if values is None else values
        device = self.device
        return values if device is None else {name: self._is_on_device(value, device) for name, value in values.items()}

    def read(self, stop: Stop = never) -> dict[str, torch.Tensor]:
        """The values of all offloaded weights, where they are kept; those on disk are read into memory."""
        assert self.weights_map is not None
        return read_weights(self.weights_map, self._names(), stop)

    def is_resident(self) -> bool:
        """Whether the weights are where they are used, or as good as there."""
        return self.weights_map is not None and are_resident(self.weights_map, self._names())

    def loader(self) -> OffloadedWeightsLoader | None:
        """What reads the weights of this hook, and of others."""
        return loader_behind(self.weights_map)

    def sources(self) -> list[object] | None:
        """What the weights come from, to tell whether that has changed; None: they are not to be read ahead."""
        if self.weights_map is None or self.tied_params_names:  # shared ones are brought once, for all
            return None
        return sources_of(self.weights_map, self._names())

    def _names(self) -> list[str]:
        """The offloaded weights, and the row statistics that lie beside those of 8 bits."""
        return [*self._placeholders, *self._beside]

    def _is_on_device(self, value: torch.Tensor, device: torch.device) -> torch.Tensor:
        if value.device == device:
            return value
        shared = self.tied_params_map.get(value.data_ptr()) if self.tied_params_map else None
        # Out of pinned memory the copy takes its turn on the stream; the caller need not wait for what is before it.
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
            if not self.offload and not self.place_submodules:  # around a model with hooks inside
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
        """Puts weights in the places of their placeholders."""
        for name, placeholder in self._placeholders.items():
            owner, key = owner_of(module, name)
            value = values[name]
            if key in owner._buffers:
                owner._buffers[key] = value
                continue
            if value.dtype != placeholder.dtype and value.is_floating_point():
                value = value.to(placeholder.dtype)
            # A gradient would be lost with the weight; and a graph would keep every weight until the end.
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
        """Gives all names of a weight what the first has."""
        for alias, name in self._aliases.items():
            owner, key = owner_of(module, alias)
            whole, whole_key = owner_of(module, name)
            owner._parameters[key] = whole._parameters[whole_key]

    @not_compiled
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Lets go of offloaded weights, and sends the output to where the input came from if that is asked for."""
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
        """Lets go of offloaded weights."""
        self._evict(module)
        if self.prefetcher is not None and not self.offload:
            self.prefetcher.finish(completed=False)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Brings offloaded weights back to the devices they had before."""
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


# Looking behind the hooks ---------------------------------------------------------------------------------------------


def offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that fetches a module's weights, alone or among several; None where they stay."""
    hook = module.__dict__.get("_hf_hook")
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((one for one in hooks if isinstance(one, AlignDevicesHook) and one.offload), None)


def has_offloaded_params(module: nn.Module) -> bool:
    """Whether a module has a hook that fetches its weights before each forward."""
    return offloading_hook(module) is not None


@contextmanager
def align_module_device(module: nn.Module, execution_device: Place | None = None) -> Iterator[None]:
    """Brings a module's own parameters to a device, fetched if they are offloaded; afterwards all is as before.

    Values written to offloaded parameters on their execution device are lost with them.

    Args:
        module: The module.
        execution_device: Where to; None: to the hook's execution device, and nowhere without a hook.
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
            if module._parameters[name].is_meta:  # type: ignore[union-attr]  # it has no values to bring back
                module._parameters[name] = parameter
            else:
                set_module_tensor_to_device(module, name, parameter.device)


def get_state_dict_offloaded_model(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state of a model of which parts are offloaded, on the CPU. Weights on disk are mapped, not read.

    Args:
        model: The model.

    Raises:
        RuntimeError: when a tensor has neither values nor a hook that knows them.
    """
    state = fill_offloaded(model, model.state_dict())
    lost = [name for name, value in state.items() if isinstance(value, torch.Tensor) and value.is_meta]
    if lost:
        raise RuntimeError(
            f"{type(model).__name__} has {len(lost)} tensors without values (device meta) and no hook that knows them, such "
            f"as {lost[0]!r}. Load its weights first."
        )
    return {name: value.to("cpu") if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def fill_offloaded(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A model's state with the values of offloaded weights, mapped from where they wait, in the place of placeholders."""
    filled = dict(state)
    for prefix, module in model.named_modules(remove_duplicate=False):  # a state has a module under each of its names
        filled.update(_fetched(module, f"{prefix}." if prefix else "", state))
    return filled


def release_offloaded(model: nn.Module) -> dict[str, torch.Tensor]:
    """Removes all hooks from a model of which parts are offloaded; does nothing to another.

    Args:
        model: The model.

    Returns:
        The values of tensors that never were anywhere but where their hooks fetched them, by name.
    """
    if not any(has_offloaded_params(module) for module in model.modules()):
        return {}
    values = fill_offloaded(model, model.state_dict())
    remove_hook_from_module(model, recurse=True)
    empty = [name for name, value in model.state_dict().items() if getattr(value, "is_meta", False)]
    return {name: values[name] for name in empty if not values[name].is_meta}


def require_values(model: nn.Module) -> None:
    """Checks that no tensor came to a dispatched model without values: torch would compute with them all the same.

    Raises:
        RuntimeError: naming one that no hook fetches, in a module that has no hook.
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
                    f"{prefix}.{key} has no values (device meta), and nothing fetches them: it was added to the model after "
                    "its weights were offloaded, and followed these to the meta device. Add to the model first (an "
                    "adapter, say) and offload it then; or remove_hook_from_submodules(model), add, and offload again."
                )


def get_state_dict_from_offload(
    module: nn.Module,
    module_name: str,
    state_dict: Mapping[str, Any],
    device_to_put_offload: Place = "cpu",
) -> dict[str, Any]:
    """A state with those entries filled in that a module's hook has to fetch.

    Args:
        module: The module.
        module_name: Its full name with a dot, or a full name of one of its tensors.
        state_dict: The state, with placeholders.
        device_to_put_offload: Where fetched values go.

    Returns:
        The state as a new dictionary.
    """
    prefix = module_name if not module_name or module_name.endswith(".") else module_name.rpartition(".")[0] + "."
    fetched = _fetched(module, prefix, state_dict)
    return {**state_dict, **{name: value.to(device_to_put_offload) for name, value in fetched.items()}}


def _fetched(module: nn.Module, prefix: str, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The values of those entries of a state that are placeholders of a module's offloaded weights."""
    hook = offloading_hook(module)
    if hook is None or hook.weights_map is None:
        return {}
    placeholders = {prefix + name: name for name in hook._placeholders}
    placeholders.update((prefix + alias, name) for alias, name in hook._aliases.items())
    wanted = {full: name for full, name in placeholders.items() if getattr(state.get(full), "is_meta", False)}
    return {full: hook.weights_map[name] for full, name in wanted.items()}
