"""Quantization with bitsandbytes."""

from __future__ import annotations

from ..quantization import has_4bit_bnb_layers, load_and_quantize_model

__all__ = ["has_4bit_bnb_layers", "load_and_quantize_model"]
