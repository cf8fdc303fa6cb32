"""Fully sharded training."""

from __future__ import annotations

from ..checkpointing.fsdp_files import load_fsdp_model, load_fsdp_optimizer, save_fsdp_model, save_fsdp_optimizer
from ..checkpointing.merge import merge_fsdp_weights
from ..runtime.modules import get_parameters_from_modules
from ..settings.fsdp import disable_fsdp_ram_efficient_loading, enable_fsdp_ram_efficient_loading

__all__ = [
    "disable_fsdp_ram_efficient_loading",
    "enable_fsdp_ram_efficient_loading",
    "get_parameters_from_modules",
    "load_fsdp_model",
    "load_fsdp_optimizer",
    "merge_fsdp_weights",
    "save_fsdp_model",
    "save_fsdp_optimizer",
]
