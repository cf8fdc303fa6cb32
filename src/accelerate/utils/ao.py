"""torchao: fp8 training."""

from __future__ import annotations

from ..settings.planned import (
    convert_model_to_fp8_ao,
    filter_first_and_last_linear_layers,
    has_ao_layers,
)

__all__ = ["convert_model_to_fp8_ao", "filter_first_and_last_linear_layers", "has_ao_layers"]
