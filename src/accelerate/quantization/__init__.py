"""Models with quantised weights, by bitsandbytes: linear layers in 8 or 4 bits, made while the weights are read."""

from __future__ import annotations

from ..settings.plugins.quantization import BnbQuantizationConfig
from .loading import load_and_quantize_model
from .selection import has_4bit_bnb_layers

__all__ = ["BnbQuantizationConfig", "has_4bit_bnb_layers", "load_and_quantize_model"]
