"""Weights of bitsandbytes in FSDP: packed 4-bit values are sharded and all-gathered as raw storage.

The checks read attributes only, so that nothing imports bitsandbytes.
"""

from __future__ import annotations

import torch
from torch import nn


def check(model: nn.Module, compute_dtype: torch.dtype | None) -> None:
    """Raises for quantized weights that cannot be sharded, or whose storage mixed precision would cast.

    Args:
        model: Model to shard.
        compute_dtype: Dtype to which parameters are cast when they are all-gathered; None means no cast.

    Raises:
        ValueError: naming the parameter and how to load it.
    """
    for name, param in model.named_parameters():
        if hasattr(param, "SCB"):
            raise ValueError(
                f"{name!r} is quantized to 8 bits, and its scales would be lost in shards: load the model in 4 bits, or "
                "train without FSDP."
            )
        if not hasattr(param, "quant_state"):
            continue
        if getattr(param.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{name!r} was repacked for inference by a forward in eval mode, and can no longer be sharded: load the "
                "model again, and prepare it before its first forward."
            )
        if compute_dtype not in (None, param.dtype) and param.is_floating_point():
            raise ValueError(
                f"{name!r} stores 4-bit values in elements of {param.dtype}, which mixed precision would cast to "
                f"{compute_dtype}, destroying them: load the model with bnb_4bit_quant_storage={compute_dtype}, or train "
                "without mixed_precision."
            )


def disable_cpu_repacking(model: nn.Module) -> None:
    """Keeps layers from repacking weights for CPU inference: the next all-gather returns them in the old packing."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # an attribute of bitsandbytes' layers
