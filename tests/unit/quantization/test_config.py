"""BnbQuantizationConfig: what it derives, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accelerate.utils import BnbQuantizationConfig, CustomDtype


@pytest.mark.parametrize(
    ("given", "derived"),
    [
        ({"load_in_8bit": True}, (torch.float16, torch.float16, torch.int8)),
        ({"load_in_8bit": True, "torch_dtype": "fp32"}, (torch.float16, torch.float32, torch.int8)),
        ({"load_in_4bit": True}, (torch.float16, torch.float16, CustomDtype.INT4)),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bf16"}, (torch.bfloat16, torch.bfloat16, CustomDtype.INT4)),
        (
            {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32, "torch_dtype": torch.bfloat16},
            (torch.float32, torch.bfloat16, CustomDtype.INT4),
        ),
    ],
)
def test_derived_values(given: dict[str, Any], derived: tuple[Any, ...]) -> None:
    config = BnbQuantizationConfig(**given)
    assert (config.bnb_4bit_compute_dtype, config.torch_dtype, config.target_dtype) == derived
    assert (config.llm_int8_threshold, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (
        6.0,
        "fp4",
        False,
    )


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "exactly one"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "exactly one"),
        ({"load_in_8bit": "yes"}, "load_in_8bit='yes'"),
        ({"load_in_4bit": 1}, "load_in_4bit=1"),
        ({"load_in_8bit": True, "llm_int8_threshold": "six"}, "llm_int8_threshold='six'"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf8"}, "'fp4' or 'nf4'"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": None}, "bnb_4bit_use_double_quant=None"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}, "'fp32', 'fp16', 'bf16'"),
        ({"load_in_8bit": True, "torch_dtype": torch.int8}, "torch_dtype=torch.int8"),
        ({"load_in_8bit": True, "skip_modules": "head"}, "a list of names"),
        ({"load_in_8bit": True, "keep_in_fp32_modules": [1]}, "a list of names"),
    ],
)
def test_refusals(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        BnbQuantizationConfig(**given)
