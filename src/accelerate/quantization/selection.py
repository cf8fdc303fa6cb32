"""Which layers of a model are quantised, and how large each tensor then is. Nothing here changes a model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..offload.sizes import Dtype
from ..offload.tied_weights import find_tied_parameters
from ..settings.plugins.quantization import BnbQuantizationConfig


@dataclass(frozen=True)
class Linear:
    """A layer that multiplies with a matrix.

    Attributes:
        name: Its dotted name.
        inputs, outputs: The matrix's sizes.
        bias: Whether it adds one.
        transposed: Its weight lies as (inputs, outputs), as in the Conv1D of GPT-2.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool
    transposed: bool

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The shape of its weight before it is quantised."""
        return (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)

    def upright(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as (outputs, inputs)."""
        return weight.t() if self.transposed else weight


def named(name: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted name is, or lies inside, a module that a pattern names: by its whole path or by a part of it."""
    return any(f".{pattern}." in f".{name}." for pattern in patterns)


def fp32_modules(model: nn.Module, config: BnbQuantizationConfig) -> list[str]:
    """Names of modules that stay in float32: the configuration's, else the model's own."""
    if config.keep_in_fp32_modules is not None:
        return list(config.keep_in_fp32_modules)
    return list(getattr(model, "_keep_in_fp32_modules", None) or ())


def layers_to_quantize(model: nn.Module, config: BnbQuantizationConfig) -> list[Linear]:
    """The layers of a model that a configuration quantises, in order.

    Only plain linear layers: a subclass may look at its weight itself, as that inside `nn.MultiheadAttention` does. Weights
    that another module shares stay as they are.

    Args:
        model: The model, empty or not.
        config: How it is quantised.
    """
    found = [layer for name, module in model.named_modules() if (layer := _as_linear(name, module)) is not None]
    shared = {name for group in find_tied_parameters(model) for name in group}
    kept = fp32_modules(model, config)
    if config.skip_modules is not None:
        kept += config.skip_modules
    candidates = [
        layer for layer in found if layer.name and f"{layer.name}.weight" not in shared and not named(layer.name, kept)
    ]
    if config.skip_modules is not None:
        return candidates
    # The head is the model's last part, unless that is most of the model: a decoder, or the whole in another module.
    last = [name for name, _ in model.named_children()][-1:]
    others = [layer for layer in candidates if layer.name.split(".")[0] not in last]
    return others if 2 * len(others) >= len(candidates) else candidates


def _as_linear(name: str, module: Any) -> Linear | None:
    if type(module) is nn.Linear:
        return Linear(name, module.in_features, module.out_features, module.bias is not None, transposed=False)
    transformers: Any = sys.modules.get("transformers.pytorch_utils")  # else no model can have its layers
    if transformers is not None and type(module) is transformers.Conv1D:
        inputs, outputs = module.weight.shape
        return Linear(name, inputs, outputs, bias=True, transposed=True)
    return None


def special_dtypes(model: nn.Module, layers: Sequence[Linear], config: BnbQuantizationConfig) -> dict[str, Dtype]:
    """What each tensor that is not quantised is kept in, for the sizes of a device map."""
    quantised = {f"{layer.name}.weight" for layer in layers}
    kept = fp32_modules(model, config)
    return {
        name: torch.float32 if named(name, kept) else config.torch_dtype
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in quantised and isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    }


def has_4bit_bnb_layers(model: nn.Module) -> bool:
    """Whether a model has layers that bitsandbytes quantised to 4 bits."""
    bitsandbytes: Any = sys.modules.get("bitsandbytes")  # else no model can have its layers
    return bitsandbytes is not None and any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in model.modules())
