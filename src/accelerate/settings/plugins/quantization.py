"""`BnbQuantizationConfig`: quantization of weights by bitsandbytes, validated on construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..enums import CustomDtype

if TYPE_CHECKING:
    import torch

_FORMATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_TYPES_OF_4_BIT = ("fp4", "nf4")


@dataclass
class BnbQuantizationConfig:
    """Configures `load_and_quantize_model`: 8 or 4 bits, the layers to skip, and the dtype of the other weights.

    Attributes:
        target_dtype: dtype of quantized weights in the sizes of a device map: ``torch.int8`` or ``CustomDtype.INT4``.

    Raises:
        ValueError: unless exactly one of `load_in_8bit` and `load_in_4bit` is True, or if a value is invalid.

    Example:
        ```python
        BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bf16")
        ```
    """

    load_in_8bit: bool = False
    """Whether linear layers are quantized to 8 bits, with one scale per row."""
    llm_int8_threshold: float = 6.0
    """Outlier threshold of LLM.int8(): input columns with a larger absolute value are computed in 16 bits."""
    load_in_4bit: bool = False
    """Whether linear layers are quantized to 4 bits, with one scale per block of 64 weights."""
    bnb_4bit_quant_type: str = "fp4"
    """The 4-bit data type: ``fp4``, or ``nf4``, whose 16 values are quantiles of a normal distribution."""
    bnb_4bit_use_double_quant: bool = False
    """Whether the scales are quantized too, which saves 0.4 bits per weight."""
    bnb_4bit_compute_dtype: Any = "fp16"
    """Compute dtype of 4-bit layers: ``fp32``, ``fp16``, ``bf16`` or a `torch.dtype`."""
    torch_dtype: Any = None
    """dtype of all other weights, in the same notation. None: float16 with 8 bits, the compute dtype with 4 bits."""
    skip_modules: list[str] | None = None
    """Names of modules to leave unquantized. None: the output head. Weights tied to another module are never quantized."""
    keep_in_fp32_modules: list[str] | None = None
    """Names of modules to keep in float32. None: the model's own list, as some models of transformers have."""

    def __post_init__(self) -> None:
        import torch

        for name in ("load_in_8bit", "load_in_4bit", "bnb_4bit_use_double_quant"):
            _require(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        threshold = self.llm_int8_threshold
        is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        _require(is_number, "llm_int8_threshold", "a number", threshold)
        if self.load_in_8bit == self.load_in_4bit:
            raise ValueError(
                f"load_in_8bit and load_in_4bit are both {self.load_in_8bit}: exactly one of them must be True."
            )
        types = " or ".join(map(repr, _TYPES_OF_4_BIT))
        _require(self.bnb_4bit_quant_type in _TYPES_OF_4_BIT, "bnb_4bit_quant_type", types, self.bnb_4bit_quant_type)
        for name in ("skip_modules", "keep_in_fp32_modules"):
            value = getattr(self, name)
            is_names = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
            _require(value is None or is_names, name, "a list of names of modules", value)
        self.bnb_4bit_compute_dtype = _resolve_dtype("bnb_4bit_compute_dtype", self.bnb_4bit_compute_dtype)
        if self.torch_dtype is None:
            self.torch_dtype = torch.float16 if self.load_in_8bit else self.bnb_4bit_compute_dtype
        self.torch_dtype = _resolve_dtype("torch_dtype", self.torch_dtype)
        self.target_dtype = torch.int8 if self.load_in_8bit else CustomDtype.INT4


def _require(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise ValueError(f"BnbQuantizationConfig({name}={value!r}): expected {expected}.")


def _resolve_dtype(name: str, value: object) -> torch.dtype:
    import torch

    if isinstance(value, str) and value in _FORMATS:
        found: torch.dtype = getattr(torch, _FORMATS[value])
        return found
    accepted = f"{', '.join(map(repr, _FORMATS))} or a floating-point torch.dtype"
    _require(isinstance(value, torch.dtype) and value.is_floating_point, name, accepted, value)
    assert isinstance(value, torch.dtype)
    return value
