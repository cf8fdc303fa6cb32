"""What weights that bitsandbytes packed need of fully sharded training: their bits are gathered as they are.

Only attributes are looked at, so that nothing imports bitsandbytes. In a unit they lie beside adapters in another format.
"""

from __future__ import annotations

import torch
from torch import nn


def check(model: nn.Module, compute_dtype: torch.dtype | None) -> None:
    """Refuses packed weights that a shard could not hold, or that would be converted as if they were numbers.

    Args:
        model: What is to be sharded.
        compute: The format parameters are converted to as they are gathered; None: they stay as they are.

    Raises:
        ValueError: saying how to load them instead.
    """
    for name, param in model.named_parameters():
        if hasattr(param, "SCB"):
            raise ValueError(
                f"{name!r} is quantised to 8 bits, and its scales would be lost in shards: load the model in 4 bits, or "
                "train without FSDP."
            )
        if not hasattr(param, "quant_state"):
            continue
        if getattr(param.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{name!r} was packed anew for inference, by a forward in eval mode, and can no longer be sharded: load the "
                "model again, and prepare it before it computes anything."
            )
        if compute_dtype not in (None, param.dtype) and param.is_floating_point():
            raise ValueError(
                f"{name!r} holds 4-bit numbers in elements of {param.dtype}, which mixed precision would convert to "
                f"{compute_dtype}, bits and all: load the model with bnb_4bit_quant_storage={compute_dtype}, or train "
                "without mixed_precision."
            )


def disable_cpu_repacking(model: nn.Module) -> None:
    """Keeps layers from packing their weights anew for inference on a CPU: what is gathered next would not be packed so."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # an attribute of bitsandbytes' layers
