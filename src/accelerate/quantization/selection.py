"""Selects the layers of a model to quantize, and the dtypes of its tensors. Nothing here changes a model."""

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
    """A linear layer.

    Attributes:
        name: Its dotted name.
        inputs, outputs: Number of input and output features.
        bias: Whether it has a bias.
        transposed: Its weight has shape (inputs, outputs), as in the Conv1D of GPT-2.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool
    transposed: bool

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The shape of its weight before quantization."""
        return (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)

    def upright(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the weight with shape (outputs, inputs)."""
        return weight.t() if self.transposed else weight


def named(name: str, patterns: Iterable[str]) -> bool:
    """Returns whether a pattern occurs in a dotted name, as a sequence of whole components."""
    return any(f".{pattern}." in f".{name}." for pattern in patterns)


def fp32_modules(model: nn.Module, config: BnbQuantizationConfig) -> list[str]:
    """Returns the names of modules that stay in float32: from the config, otherwise from the model."""
    if config.keep_in_fp32_modules is not None:
        return list(config.keep_in_fp32_modules)
    return list(getattr(model, "_keep_in_fp32_modules", None) or ())


def layers_to_quantize(model: nn.Module, config: BnbQuantizationConfig) -> list[Linear]:
    """Returns the layers of a model to quantize, in order.

    Only plain linear layers are quantized, since a subclass may use its weight directly, as in `nn.MultiheadAttention`. Tied
    weights are not quantized.

    Args:
        model: The model, possibly on the meta device.
        config: The quantization config.
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
    # The last child is taken to be the head, unless it has most of the layers: a decoder, or the wrapped model.
    last = [name for name, _ in model.named_children()][-1:]
    others = [layer for layer in candidates if layer.name.split(".")[0] not in last]
    return others if 2 * len(others) >= len(candidates) else candidates


def _as_linear(name: str, module: Any) -> Linear | None:
    if type(module) is nn.Linear:
        return Linear(name, module.in_features, module.out_features, module.bias is not None, transposed=False)
    transformers: Any = sys.modules.get("transformers.pytorch_utils")  # not imported: no model can have its layers
    if transformers is not None and type(module) is transformers.Conv1D:
        inputs, outputs = module.weight.shape
        return Linear(name, inputs, outputs, bias=True, transposed=True)
    return None


def special_dtypes(model: nn.Module, layers: Sequence[Linear], config: BnbQuantizationConfig) -> dict[str, Dtype]:
    """Returns the dtype of each floating-point tensor that is not quantized, to compute a device map."""
    quantized = {f"{layer.name}.weight" for layer in layers}
    kept = fp32_modules(model, config)
    return {
        name: torch.float32 if named(name, kept) else config.torch_dtype
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in quantized and isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    }


def has_4bit_bnb_layers(model: nn.Module) -> bool:
    """Returns whether a model has 4-bit layers of bitsandbytes."""
    bitsandbytes: Any = sys.modules.get("bitsandbytes")  # not imported: no model can have its layers
    return bitsandbytes is not None and any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in model.modules())
