"""Linear layers of bitsandbytes, extended: their weights can be offloaded, and their state dicts can be loaded again.

This module imports bitsandbytes, so it is imported only when a model is quantized.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import nn

from ..settings.plugins.quantization import BnbQuantizationConfig
from .selection import Linear

Companions = Mapping[str, torch.Tensor]

_NUMBERS_AT_ONCE = 2**18


class Linear8bitLt(bnb.nn.Linear8bitLt):
    """An 8-bit linear layer, initially without a weight.

    Args:
        shape: The layer that it replaces.
        config: The quantization config.
    """

    offloaded = False

    def __init__(self, shape: Linear, config: BnbQuantizationConfig) -> None:
        super().__init__(
            shape.inputs,
            shape.outputs,
            bias=shape.bias,
            has_fp16_weights=False,
            threshold=config.llm_int8_threshold,
            device="meta",
        )

    def quantize_weight(self, weight: torch.Tensor, device: torch.device) -> None:
        """Quantizes a weight of shape (outputs, inputs) to 8 bits on a device."""
        values = torch.empty(weight.shape, dtype=torch.int8, device=device)
        scales = torch.empty(weight.shape[0], dtype=torch.float32, device=device)
        for rows, part in _parts(weight, device):
            values[rows], scales[rows], _ = bnb.functional.int8_vectorwise_quant(part.half())
        self._hold(values, scales)

    def load_quantized(self, weight: torch.Tensor, companions: Companions, device: torch.device) -> None:
        """Sets an already quantized weight."""
        self._hold(weight.to(device), companions["SCB"].to(device))

    def _hold(self, values: torch.Tensor, scales: torch.Tensor) -> None:
        self.state.reset_grads()
        self.weight = _int8(values, values, scales)

    def release(self) -> torch.Tensor:
        """Returns the weight, to be offloaded and loaded for each forward; the layer keeps the scales."""
        values, scales = self.weight.data, self.weight.SCB
        self.weight = _int8(torch.empty_like(values, device="meta"), None, scales)
        self.offloaded = True
        return values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.offloaded:
            return super().forward(x)
        self.weight.CB = self.weight.data  # bitsandbytes expects the loaded weight here
        try:
            return super().forward(x)
        finally:
            scales, self.state.CB = self.state.SCB, None  # otherwise it would stay on the device
            self.weight.CB, self.weight.SCB, self.state.SCB = None, scales, None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.weight.SCB is None and self.state.SCB is not None:  # moved to `state` by a forward
            self.weight.CB, self.weight.SCB = self.state.CB, self.state.SCB
        self.state.reset_grads()
        super()._load_from_state_dict(state_dict, prefix, *args)


def _parts(weight: torch.Tensor, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields blocks of rows of a weight, small enough to limit the temporaries of bitsandbytes.

    The number of rows is a multiple of 64, so that the scales of 4-bit weights (one per 64 elements) are the same.
    """
    step = len(weight)
    if device.type == "cpu":  # on a GPU, one call allocates only its result
        step = max(_NUMBERS_AT_ONCE // (64 * weight.shape[1]), 1) * 64
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        yield rows, weight[rows].to(device).contiguous()


def _nested(state: QuantState) -> QuantState:
    """Quantizes the scales, too, as `bitsandbytes.functional.quantize_4bit` does for a whole weight."""
    offset = state.absmax.mean()
    scales, second = bnb.functional.quantize_blockwise(state.absmax - offset, blocksize=256)
    return QuantState(
        scales, state.shape, state.code, state.blocksize, state.quant_type, state.dtype, offset=offset, state2=second
    )


def _int8(values: torch.Tensor, kept: torch.Tensor | None, scales: torch.Tensor) -> bnb.nn.Int8Params:
    return bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=kept, SCB=scales)


def _four_bits(values: torch.Tensor, state: QuantState, layer: nn.Module) -> bnb.nn.Params4bit:
    return bnb.nn.Params4bit(
        values,
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=values.dtype,
        module=layer,
        bnb_quantized=True,
    )


class Linear4bit(bnb.nn.Linear4bit):
    """A 4-bit linear layer, initially without a weight; arguments as for `Linear8bitLt`.

    On CPUs with bf16 instructions, bitsandbytes repacks weights in the first forward and rounds their scales to bf16. The
    original scales are kept for the state dict.
    """

    def __init__(self, shape: Linear, config: BnbQuantizationConfig) -> None:
        super().__init__(
            shape.inputs,
            shape.outputs,
            bias=shape.bias,
            compute_dtype=config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            device="meta",
        )
        # bitsandbytes packs blocks of 32 rows and 64 columns; for other shapes it would raise in the forward.
        if shape.outputs % 32 or shape.inputs % 64:
            self.support_avx512bf16_for_cpu = False

    def quantize_weight(self, weight: torch.Tensor, device: torch.device) -> None:
        """Quantizes a weight of shape (outputs, inputs) to 4 bits on a device."""
        values = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8, device=device)
        scales, done = [], 0
        for _, part in _parts(weight, device):
            found, state = bnb.functional.quantize_4bit(
                part, blocksize=self.weight.blocksize, compress_statistics=False, quant_type=self.weight.quant_type
            )
            values[done : done + len(found)] = found
            scales.append(state.absmax)
            done += len(found)
        state.absmax, state.shape = torch.cat(scales), weight.shape
        self._hold(values, _nested(state) if self.weight.compress_statistics else state)

    def load_quantized(self, weight: torch.Tensor, companions: Companions, device: torch.device) -> None:
        """Sets an already quantized weight."""
        self._hold(weight.to(device), QuantState.from_dict(dict(companions), device=device))

    def _hold(self, values: torch.Tensor, state: QuantState) -> None:
        self.weight = _four_bits(values, state, self)
        self.quantized_state = state
        self._restore()

    def _restore(self) -> None:
        """Sets the original scales, as a copy that bitsandbytes may modify."""
        state = copy.copy(self.quantized_state)
        if not self.weight.is_meta:
            state.to(self.weight.device)
        self.weight.quant_state = self.quant_state = state

    def _unpack(self) -> None:
        if getattr(getattr(self.weight, "quant_state", None), "packing_format_for_cpu", False):
            super()._save_to_state_dict({}, "", True)  # unpacks the weight in place, with rounded scales
            self._restore()

    def __deepcopy__(self, memo: dict[int, Any]) -> Linear4bit:
        # bitsandbytes cannot copy an offloaded weight, and copies of other weights would refer to the original layer.
        self._unpack()
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        memo[id(self.weight)] = _four_bits(self.weight.data.clone(), self.quantized_state, twin)
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        twin._restore()
        return twin

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Linear4bit:
        self._unpack()  # the packed format is specific to the CPU
        moved: Linear4bit = super()._apply(fn, recurse)
        return moved

    def release(self) -> torch.Tensor:
        """Returns the weight, to be offloaded and loaded for each forward; the layer keeps the scales."""
        values = self.weight.data
        self._hold(torch.empty_like(values, device="meta"), self.quantized_state)
        self.support_avx512bf16_for_cpu = False  # repacking is useless for a weight that is loaded for each forward
        return values

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        start = f"{prefix}weight."
        companions = {
            name.removeprefix(prefix): state_dict.pop(name) for name in list(state_dict) if name.startswith(start)
        }
        weight = state_dict.get(f"{prefix}weight")
        if companions and weight is not None:
            device = self.weight.device
            self._hold(torch.empty_like(weight, device=device), QuantState.from_dict(companions, device=device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def empty_layer(shape: Linear, config: BnbQuantizationConfig) -> Linear8bitLt | Linear4bit:
    """Creates the quantized layer that replaces a linear one, without values."""
    layer = Linear8bitLt(shape, config) if config.load_in_8bit else Linear4bit(shape, config)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.to(config.torch_dtype), requires_grad=layer.bias.requires_grad)
    return layer
