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
    """The model compiled as the plugin says; a model that is compiled already is left alone."""
    if is_compiled_module(model) or has_compiled_regions(model):
        return model
    if plugin.use_regional_compilation:
        return compile_regions(model, **plugin.to_kwargs())
    return torch.compile(model, **plugin.to_kwargs())  # type: ignore[return-value]  # a module in gives a module out


def allow_tf32() -> None:
    """Lets matrix products of fp32 tensors use TensorFloat-32, as the documented library does for compiled models.

    Sets torch's precision of fp32 matrix products to ``high`` where it is the default; another choice stays.
    """
    if torch.get_float32_matmul_precision() == "highest":
        torch.set_float32_matmul_precision("high")


def compile_regions(module: nn.Module, **compile_kwargs: Any) -> nn.Module:
    """Compiles the blocks that a model repeats, each once, and leaves the rest as it is.

    A block is a child of an ``nn.ModuleList`` whose class occurs more than once there: they share one compiled graph,
    so that compiling takes as long as for one block. A model without such blocks is compiled whole.

    Returns:
        The same module, its blocks compiled in place; or the compiled module.
    """
    blocks = repeated_blocks(extract_model_from_parallel(module))
    if not blocks:
        return torch.compile(module, **compile_kwargs)  # type: ignore[return-value]
    for block in blocks:
        block.compile(**compile_kwargs)
    return module


def compile_regions_fsdp2(module: nn.Module, **compile_kwargs: Any) -> nn.Module:
    """See `compile_regions`, which serves modules sharded by ``fully_shard`` too: their gathering stays outside the graphs.

    Args:
        module: A model whose blocks are sharded, or are about to be.
        **compile_kwargs: For `torch.compile`.
    """
    return compile_regions(module, **compile_kwargs)


def compile_regions_deepspeed(module: nn.Module, **compile_kwargs: Any) -> None:
    """See `compile_regions`; always in place, since an engine keeps the module it was given.

    Args:
        module: A model that DeepSpeed's engine holds, or is about to.
        **compile_kwargs: For `torch.compile`.
    """
    for region in repeated_blocks(extract_model_from_parallel(module)) or [module]:
        region.compile(**compile_kwargs)


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The children of module lists whose class occurs more than once in their list."""
    blocks: list[nn.Module] = []
    for child in module.modules():
        if isinstance(child, nn.ModuleList):
            counts = Counter(type(block) for block in child)
            blocks += [block for block in child if counts[type(block)] > 1]
    return blocks


def has_compiled_regions(module: nn.Module) -> bool:
    """Whether any submodule has been compiled in place."""
    return any(child._compiled_call_impl is not None for child in module.modules())
