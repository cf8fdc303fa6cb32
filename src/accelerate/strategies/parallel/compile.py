"""torch.compile over a prepared model: whole, or region by region."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...runtime.tensors.forward import extract_model_from_parallel, is_compiled_module

if TYPE_CHECKING:
    from ...settings.handlers import TorchDynamoPlugin


def compile_model(model: nn.Module, plugin: TorchDynamoPlugin) -> nn.Module:
    """Compiles a model with the plugin's options, whole or by region; a compiled model is returned unchanged."""
    if is_compiled_module(model) or has_compiled_regions(model):
        return model
    if plugin.use_regional_compilation:
        return compile_regions(model, **plugin.to_kwargs())
    return torch.compile(model, **plugin.to_kwargs())  # type: ignore[return-value]  # a module in gives a module out


def allow_tf32() -> None:
    """Allows TensorFloat-32 in fp32 matrix products: changes torch's default precision to ``high``, and no other setting."""
    if torch.get_float32_matmul_precision() == "highest":
        torch.set_float32_matmul_precision("high")


def compile_regions(module: nn.Module, **compile_kwargs: Any) -> nn.Module:
    """Compiles the repeated blocks of a model in place.

    A block is a child of an ``nn.ModuleList`` whose class occurs more than once there. Blocks share one compiled graph, so
    compilation takes as long as for one block. A model without repeated blocks is compiled whole.

    Returns:
        The same module with compiled blocks, or the compiled module.
    """
    blocks = repeated_blocks(extract_model_from_parallel(module))
    if not blocks:
        return torch.compile(module, **compile_kwargs)  # type: ignore[return-value]
    for block in blocks:
        block.compile(**compile_kwargs)
    return module


def compile_regions_fsdp2(module: nn.Module, **compile_kwargs: Any) -> nn.Module:
    """Compiles the repeated blocks of a model for ``fully_shard``, with all-gathers outside of the graphs.

    Args:
        module: Model, before or after its blocks are sharded.
        **compile_kwargs: For `torch.compile`.
    """
    return compile_regions(module, **compile_kwargs)


def compile_regions_deepspeed(module: nn.Module, **compile_kwargs: Any) -> None:
    """Compiles the repeated blocks, or the module, in place, as DeepSpeed's engine keeps a reference. See `compile_regions`.

    Args:
        module: Model, before or after DeepSpeed's engine wraps it.
        **compile_kwargs: For `torch.compile`.
    """
    for region in repeated_blocks(extract_model_from_parallel(module)) or [module]:
        region.compile(**compile_kwargs)


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Returns the children of module lists whose class occurs more than once in their list."""
    blocks: list[nn.Module] = []
    for child in module.modules():
        if isinstance(child, nn.ModuleList):
            counts = Counter(type(block) for block in child)
            blocks += [block for block in child if counts[type(block)] > 1]
    return blocks


def has_compiled_regions(module: nn.Module) -> bool:
    """Returns whether any submodule is compiled in place."""
    return any(child._compiled_call_impl is not None for child in module.modules())
