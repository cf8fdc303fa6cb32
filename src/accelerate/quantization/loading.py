"""Quantizes the linear layers of a model one by one: while they are read from files, or in place.

Everything is validated before the model is changed. Peak memory is that of the model so far and one tensor.
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
"""Names of the tensor that accompanies every quantized weight, with its number of bits."""
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
    """Quantizes a model's linear layers with bitsandbytes, on CPU or GPU, while their weights are loaded.

    Offloaded layers are quantized, too. Weights that are already quantized are loaded as they are.

    Args:
        model: The model, preferably on the meta device (see `init_empty_weights`); modified in place.
        bnb_quantization_config: The quantization config.
        weights_location: A weight file, an index, or a folder with one of these. None: the model's present values.
        device_map: Devices by name of module, or ``"auto"``, ``"balanced"``, ``"balanced_low_0"``, ``"sequential"``.
            None: the whole model goes to this process's device.
        no_split_module_classes: Names of classes whose modules stay on one device, for a computed map.
        max_memory: Limits by device, for a computed map.
        offload_folder: Folder for the weights of parts on ``"disk"``.
        offload_state_dict: Accepted for compatibility; weights are read one by one, so there is no second copy to offload.

    Returns:
        The model.

    Raises:
        ImportError: if bitsandbytes is not installed.
        ValueError: if the weights do not match the model or the config, with all problems in one message; for a model on
            the meta device without `weights_location`; if the map is incomplete, or uses the disk without `offload_folder`.

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
        logger.warning("%s has no linear layers to quantize.", type(model).__name__)
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
            f'quantization needs bitsandbytes, which cannot be imported ({error}): `pip install "accelerate[quantization]"`.'
        ) from error


@dataclass
class _QuantizeJob:
    """One quantization of a model.

    Attributes:
        in_memory: Offloaded weights in CPU memory.
        on_disk: Index of the offloaded weights on disk.
        replaced: The original modules that quantized layers have replaced, by name.
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
        """The device that runs offloaded parts: the first device of the map that computes."""
        return with_index(next((device for device in self.where.values() if device not in OFFLOADED), "cpu"))

    @cached_property
    def waiting(self) -> Sequence[str]:
        """Devices whose weights are offloaded. If no accelerator is used, parts on "cpu" run in place."""
        return OFFLOADED if self.main.type != "cpu" else OFFLOADED[1:]

    # Validation

    def check(self, weights: Folder | None) -> None:
        """Validates the map and the model, before the weights are inspected."""
        check_device_map(self.model, self.where)
        if "disk" in self.where.values() and self.folder is None:
            raise ValueError("the device_map assigns modules to 'disk': pass an offload_folder for their weights.")
        empty = [name for name, tensor in self.model.named_parameters() if tensor.is_meta]
        if weights is None and empty:
            raise ValueError(
                f"{type(self.model).__name__} is empty ({empty[0]!r} and {len(empty) - 1} others have no values): pass "
                "weights_location, the file or folder to load its weights from."
            )

    def _check_weights(self, weights: Folder) -> dict[str, WeightFile]:
        """Returns the file of each tensor.

        Raises:
            WeightsError: with all mismatches.
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
            f"{name} belongs to a quantized weight, but the layer is not to be quantized: remove it from skip_modules"
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
            return [f"{layer.name} is quantized to {bits} bits in the files, but the config requests {wanted}"]
        shapes = {
            None: layer.stored_shape,
            8: (layer.outputs, layer.inputs),
            4: ((layer.outputs * layer.inputs + 1) // 2, 1),
        }
        expected, shape = shapes[bits], source[weight].shapes[weight]
        return [] if shape == expected else [f"{weight} has shape {shape} in the files, and {expected} in the model"]

    # Loading

    def load(self, weights: Folder) -> None:
        """Loads and quantizes the weights layer by layer; restores the model if validation fails."""
        from .layers import empty_layer

        try:
            quantized = {layer: self._replace(layer, empty_layer(layer, self.config)) for layer in self.layers}
            source = self._check_weights(weights)
        except BaseException:
            for name, module in self.replaced.items():
                self._put(name, module)
            raise
        self.replaced.clear()
        for layer, module in quantized.items():
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
        """Quantizes the model's present values, and frees each original weight at once."""
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
        """Attaches the hooks that load offloaded weights, if there are any."""
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
        """Offloads a weight to CPU memory or disk."""
        if device_of(name, self.where) != "disk":
            self.in_memory[name] = value.to("cpu")
            return
        assert self.folder is not None
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        offload_weight(value, name, self.folder, self.on_disk)

    # Other tensors

    def _place_rest(self, source: Mapping[str, WeightFile]) -> None:
        """Loads all tensors that are not quantized; of tied ones, the one that has values."""
        quantized = {f"{layer.name}.weight" for layer in self.layers}
        aliases: dict[str, str] = {}
        for group in self.tied:
            first = next((name for name in group if name in source), group[0])
            aliases.update((name, first) for name in group if name != first)
        for name in _names(self.model):
            if name not in quantized and name not in aliases:
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
    """Returns the names of parameters and of persistent buffers."""
    left_out = get_non_persistent_buffers(model, recurse=True, fqns=True)
    buffers = (name for name, _ in model.named_buffers(remove_duplicate=False) if name not in left_out)
    return [*(name for name, _ in model.named_parameters(remove_duplicate=False)), *buffers]


def _companions(layer: str, names: Mapping[str, object]) -> list[str]:
    """Returns the names of the tensors that accompany a layer's quantized weight."""
    return [name for ending in _BESIDE if (name := f"{layer}.{ending}") in names]


def _own_device() -> torch.device:
    """Returns this process's device, without initializing the process state."""
    if world.is_joined():
        return world.current().device
    return torch.empty(0, device=default_kind().name).device
