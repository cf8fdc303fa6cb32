"""A model's linear layers quantised one by one: from files while they are read, or where they are.

Everything is checked before anything changes. What is held at any time is the model so far and one tensor.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..big_modeling import dispatch_model, made_map
from ..offload.checkpoints import WeightFile, WeightsError, find_checkpoint, inspect
from ..offload.device_map import check_device_map, device_of, normalize
from ..offload.disk_weights import offload_weight, save_offload_index
from ..offload.max_memory import OFFLOADED
from ..offload.tensors import Place, get_non_persistent_buffers, owner_of, set_module_tensor_to_device
from ..offload.tied_weights import find_tied_parameters
from ..runtime import world
from ..runtime.devices import default_kind, with_index
from ..settings.plugins.quantization import BnbQuantizationConfig
from .selection import Linear, fp32_modules, layers_to_quantize, named, special_dtypes

if TYPE_CHECKING:
    from .layers import Linear4bit, Linear8bitLt

    _Layer = Linear4bit | Linear8bitLt

logger = logging.getLogger(__name__)

Folder = str | os.PathLike[str]
_Module = TypeVar("_Module", bound=nn.Module)

_BITS = {"SCB": 8, "weight.absmax": 4}
"""What lies beside every quantised weight, and in how many bits that is."""
_BESIDE = (
    *_BITS,
    "weight_format",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__fp4",
    "weight.quant_state.bitsandbytes__nf4",
)


def load_and_quantize_model(
    model: _Module,
    bnb_quantization_config: BnbQuantizationConfig,
    weights_location: Folder | None = None,
    device_map: str | Mapping[str, Place] | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: Folder | None = None,
    offload_state_dict: bool = False,
) -> _Module:
    """Quantises a model's linear layers with bitsandbytes, on the CPU as on GPUs, while their weights are read.

    Layers that a device map offloads are quantised too. Weights that were saved quantised are taken as they are.

    Args:
        model: The model, best an empty one (see `init_empty_weights`); changed in place.
        bnb_quantization_config: How.
        weights_location: A file of weights, an index of several, or a folder with these. None: the model's own values.
        device_map: Devices by name of module, or ``"auto"``, ``"balanced"``, ``"balanced_low_0"``, ``"sequential"``.
            None: all goes to this process's device.
        no_split_module_classes: Names of classes whose modules stay on one device, for a map that is made.
        max_memory: Limits by device, for a map that is made.
        offload_folder: Where weights of parts on ``"disk"`` are written.
        offload_state_dict: Accepted; weights are read one by one, so that there is no second copy to put away.

    Returns:
        The model.

    Raises:
        ImportError: when bitsandbytes is not installed.
        ValueError: when the weights do not fit the model or the configuration, all in one message; for an empty model
            without `weights_location`; for a map that leaves something out, or names the disk without `offload_folder`.

    Example:
        ```python
        with init_empty_weights():
            model = Net()
        model = load_and_quantize_model(model, BnbQuantizationConfig(load_in_8bit=True), "weights/", device_map="auto")
        ```
    """
    _require_bitsandbytes()
    config = bnb_quantization_config
    layers = layers_to_quantize(model, config)
    if not layers:
        logger.warning("%s has no linear layers to quantise.", type(model).__name__)
    where = made_map(
        model,
        {"": _own_device()} if device_map is None else device_map,
        max_memory,
        no_split_module_classes,
        config.target_dtype,
        special_dtypes=special_dtypes(model, layers, config),
    )
    assert where is not None
    job = _QuantizeJob(model, config, layers, where, offload_folder)
    job.check(weights_location)
    job.where = normalize(where)
    if weights_location is None:
        job.quantize_in_place()
    else:
        job.load(weights_location)
    job.dispatch()
    model.hf_device_map = dict(where)  # type: ignore[assignment]  # a plain attribute, as the caller wrote it
    model.is_loaded_in_8bit = config.load_in_8bit  # type: ignore[assignment]  # plain attributes, as clients expect
    model.is_loaded_in_4bit = config.load_in_4bit  # type: ignore[assignment]
    return model


def _require_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'quantisation needs bitsandbytes, which cannot be imported ({error}): `pip install "accelerate[quantization]"`.'
        ) from error


@dataclass
class _QuantizeJob:
    """One quantisation: what becomes of each tensor, and where it goes.

    Attributes:
        in_memory: Weights that wait in memory until their module runs on a device.
        on_disk: The index of those that wait on disk.
        replaced: The modules that quantised layers have taken the place of, by name.
    """

    model: nn.Module
    config: BnbQuantizationConfig
    layers: list[Linear]
    where: Mapping[str, Place]
    folder: Folder | None
    in_memory: dict[str, torch.Tensor] = field(default_factory=dict)
    on_disk: dict[str, Any] = field(default_factory=dict)
    replaced: dict[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tied = find_tied_parameters(self.model)
        self.in_fp32 = fp32_modules(self.model, self.config)

    @cached_property
    def main(self) -> torch.device:
        """Where parts run that wait elsewhere: the first device of the map that computes."""
        return with_index(next((device for device in self.where.values() if device not in OFFLOADED), "cpu"))

    @cached_property
    def waiting(self) -> Sequence[str]:
        """Where weights wait. Without a device that computes, parts in memory run where they are."""
        return OFFLOADED if self.main.type != "cpu" else OFFLOADED[1:]

    # Checks

    def check(self, weights: Folder | None) -> None:
        """What can be said without looking at the weights."""
        check_device_map(self.model, self.where)
        if "disk" in self.where.values() and self.folder is None:
            raise ValueError("the device_map sends modules to 'disk': pass an offload_folder for their weights.")
        empty = [name for name, tensor in self.model.named_parameters() if tensor.is_meta]
        if weights is None and empty:
            raise ValueError(
                f"{type(self.model).__name__} is empty ({empty[0]!r} and {len(empty) - 1} others have no values): pass "
                "weights_location, the file or folder that its weights are read from."
            )

    def _check_weights(self, weights: Folder) -> dict[str, WeightFile]:
        """The file of each tensor.

        Raises:
            WeightsError: listing everything that does not fit.
        """
        found = inspect(self.model, find_checkpoint(weights), self.tied)
        source = {name: file for file in found.files for name in file.shapes}
        problems = [*found.problems, *(f"{name} is missing" for name in found.missing)]
        beside = set()
        for layer in self.layers:
            companions = _companions(layer.name, source)
            beside.update(companions)
            problems += self._mismatches(layer, companions, source)
        loose = [name for name in found.unexpected if name not in beside]
        problems += [
            f"{name} belongs to a quantised weight, and the layer is not to be quantised: leave it out of skip_modules"
            for name in loose
            if name.endswith((".SCB", ".absmax"))
        ]
        if problems:
            raise WeightsError(weights, problems)
        if loose:
            logger.warning("%s has tensors that are not in the model: %s", weights, ", ".join(loose[:20]))
        return source

    def _mismatches(self, layer: Linear, companions: Sequence[str], source: Mapping[str, WeightFile]) -> list[str]:
        wanted = 8 if self.config.load_in_8bit else 4
        bits = next((bits for ending, bits in _BITS.items() if f"{layer.name}.{ending}" in companions), None)
        weight = f"{layer.name}.weight"
        if weight not in source:  # reported as missing
            return []
        if bits is not None and bits != wanted:
            return [f"{layer.name} is quantised to {bits} bits in the files, and is to have {wanted}"]
        shapes = {
            None: layer.stored_shape,
            8: (layer.outputs, layer.inputs),
            4: ((layer.outputs * layer.inputs + 1) // 2, 1),
        }
        expected, shape = shapes[bits], source[weight].shapes[weight]
        return (
            [] if shape == expected else [f"{weight} has the shape {shape} in the files, and {expected} in the model"]
        )

    # Work

    def load(self, weights: Folder) -> None:
        """Reads the weights, layer by layer; before the first, the model is as it was."""
        from .layers import empty_layer

        try:
            quantised = {layer: self._replace(layer, empty_layer(layer, self.config)) for layer in self.layers}
            source = self._check_weights(weights)
        except BaseException:
            for name, module in self.replaced.items():
                self._put(name, module)
            raise
        self.replaced.clear()
        for layer, module in quantised.items():
            companions = {
                name.removeprefix(f"{layer.name}.").removeprefix("weight."): source[name][name]
                for name in _companions(layer.name, source)
            }
            weight = source[f"{layer.name}.weight"][f"{layer.name}.weight"]
            if companions:
                module.load_quantized(weight, companions, self._device(layer))
            else:
                module.quantize_weight(layer.upright(weight), self._device(layer))
            self._placed(layer, module)
        self._place_rest(source)

    def quantize_in_place(self) -> None:
        """Quantises the values that the model has, and frees each as soon as it is."""
        from .layers import empty_layer

        for layer in self.layers:
            old: Any = self.model.get_submodule(layer.name)
            new = empty_layer(layer, self.config)
            new.quantize_weight(layer.upright(old.weight.detach()), self._device(layer))
            new.bias = old.bias
            self._replace(layer, new)
            self.replaced.clear()
            self._placed(layer, new)
        self._place_rest({})

    def dispatch(self) -> None:
        """Attaches what fetches weights that wait, where some do."""
        uses_disk = "disk" in self.where.values()
        if uses_disk and self.folder is not None:
            save_offload_index(self.on_disk, self.folder)
        dispatch_model(
            self.model,
            self.where,
            main_device=self.main,
            state_dict=self.in_memory or None,
            offload_dir=self.folder if uses_disk else None,
            offload_index=self.on_disk if uses_disk else None,
        )

    # Layers

    def _replace(self, layer: Linear, new: _Layer) -> _Layer:
        old = self.model.get_submodule(layer.name)
        new.train(old.training)
        self.replaced[layer.name] = old
        self._put(layer.name, new)
        return new

    def _put(self, name: str, module: nn.Module) -> None:
        owner, _, key = name.rpartition(".")
        self.model.get_submodule(owner)._modules[key] = module

    def _device(self, layer: Linear) -> torch.device:
        place = device_of(layer.name, self.where)
        return self.main if place is None or place in self.waiting else with_index(place)

    def _placed(self, layer: Linear, module: _Layer) -> None:
        name = f"{layer.name}.weight"
        if device_of(name, self.where) in self.waiting:
            self._wait(name, module.release())

    def _wait(self, name: str, value: torch.Tensor) -> None:
        """Puts a weight where it waits."""
        if device_of(name, self.where) != "disk":
            self.in_memory[name] = value.to("cpu")
            return
        assert self.folder is not None
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        offload_weight(value, name, self.folder, self.on_disk)

    # The rest

    def _place_rest(self, source: Mapping[str, WeightFile]) -> None:
        """Takes all that is not quantised to its place; of tied tensors the one that has values."""
        quantised = {f"{layer.name}.weight" for layer in self.layers}
        aliases: dict[str, str] = {}
        for group in self.tied:
            first = next((name for name in group if name in source), group[0])
            aliases.update((name, first) for name in group if name != first)
        for name in _names(self.model):
            if name not in quantised and name not in aliases:
                self._place(name, source[name][name] if name in source else None)
        for alias, name in aliases.items():
            owner, key = owner_of(self.model, alias)
            whole, whole_key = owner_of(self.model, name)
            owner._parameters[key] = whole._parameters[whole_key]

    def _place(self, name: str, value: torch.Tensor | None) -> None:
        owner, key = owner_of(self.model, name)
        is_buffer = key in owner._buffers
        present = (owner._buffers if is_buffer else owner._parameters)[key]
        value = present if value is None else value
        if value is None:
            return
        dtype = torch.float32 if named(name, self.in_fp32) else self.config.torch_dtype
        dtype = dtype if value.is_floating_point() else value.dtype
        place = device_of(name, self.where)
        if place in self.waiting and not is_buffer:
            self._wait(name, value.detach().to("cpu", dtype))
            place = "meta"
        elif place is None or place in self.waiting:
            place = self.main
        set_module_tensor_to_device(self.model, name, place, value=value, dtype=dtype)


def _names(model: nn.Module) -> list[str]:
    """The names of parameters, and of buffers that are part of the state."""
    left_out = get_non_persistent_buffers(model, recurse=True, fqns=True)
    buffers = (name for name, _ in model.named_buffers(remove_duplicate=False) if name not in left_out)
    return [*(name for name, _ in model.named_parameters(remove_duplicate=False)), *buffers]


def _companions(layer: str, names: Mapping[str, object]) -> list[str]:
    """The names of what lies beside a layer's quantised weight."""
    return [name for ending in _BESIDE if (name := f"{layer}.{ending}") in names]


def _own_device() -> torch.device:
    """This process's device, without making a state that would decide it for good."""
    if world.is_joined():
        return world.current().device
    return torch.empty(0, device=default_kind().name).device
