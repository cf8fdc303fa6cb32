"""How weights are quantised with bitsandbytes: `BnbQuantizationConfig`, checked when it is made."""

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
    """How `load_and_quantize_model` quantises: in 8 bits or in 4, which layers not, and what the rest is kept in.

    Attributes:
        target_dtype: What a quantised weight is counted as when a device map is made: ``torch.int8`` or
            ``CustomDtype.INT4``.

    Raises:
        ValueError: unless exactly one of `load_in_8bit` and `load_in_4bit` is True, and for a value that is none.

    Example:
        ```python
        BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bf16")
        ```
    """

    load_in_8bit: bool = False
    """Quantise linear layers to 8 bits, a scale for each row."""
    llm_int8_threshold: float = 6.0
    """In 8 bits: columns of an input in which a value is larger than this are computed in 16 bits."""
    load_in_4bit: bool = False
    """Quantise linear layers to 4 bits, a scale for each 64 weights."""
    bnb_4bit_quant_type: str = "fp4"
    """Which 16 values there are: ``fp4``, or ``nf4``, whose values lie as normally distributed weights do."""
    bnb_4bit_use_double_quant: bool = False
    """Quantise the scales too: 0.4 bits less for each weight."""
    bnb_4bit_compute_dtype: Any = "fp16"
    """In 4 bits: what layers compute in: ``fp32``, ``fp16``, ``bf16`` or a `torch.dtype`."""
    torch_dtype: Any = None
    """What all that is not quantised is kept in, in the same words. None: float16 in 8 bits, in 4 bits the compute dtype."""
    skip_modules: list[str] | None = None
    """Names of modules that are not quantised. None: the output head. Weights shared with another module never are."""
    keep_in_fp32_modules: list[str] | None = None
    """Names of modules that stay in float32. None: those that the model itself names, as some of transformers' do."""

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
        self.bnb_4bit_compute_dtype = _number_format("bnb_4bit_compute_dtype", self.bnb_4bit_compute_dtype)
        if self.torch_dtype is None:
            self.torch_dtype = torch.float16 if self.load_in_8bit else self.bnb_4bit_compute_dtype
        self.torch_dtype = _number_format("torch_dtype", self.torch_dtype)
        self.target_dtype = torch.int8 if self.load_in_8bit else CustomDtype.INT4


def _require(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise ValueError(f"BnbQuantizationConfig({name}={value!r}): expected {expected}.")


def _number_format(name: str, value: object) -> torch.dtype:
    import torch

    if isinstance(value, str) and value in _FORMATS:
        found: torch.dtype = getattr(torch, _FORMATS[value])
        return found
    accepted = f"{', '.join(map(repr, _FORMATS))} or a floating-point torch.dtype"
    _require(isinstance(value, torch.dtype) and value.is_floating_point, name, accepted, value)
    assert isinstance(value, torch.dtype)
    return value
