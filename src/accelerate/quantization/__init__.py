"""Quantization with bitsandbytes: 8-bit and 4-bit linear layers, quantized while their weights are loaded."""

from __future__ import annotations

from ..settings.plugins.quantization import BnbQuantizationConfig
from .loading import load_and_quantize_model
from .selection import has_4bit_bnb_layers

__all__ = ["BnbQuantizationConfig", "has_4bit_bnb_layers", "load_and_quantize_model"]
