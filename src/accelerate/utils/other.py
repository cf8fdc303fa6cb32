"""Miscellaneous helpers."""

from __future__ import annotations

from ..checkpointing import clean_state_dict_for_safetensors, load, save
from ..runtime.helpers import convert_bytes, get_pretty_name, merge_dicts, recursive_getattr, wait_for_everyone
from ..runtime.system.system_info import check_os_kernel, get_free_port, is_port_in_use
from ..runtime.tensors.forward import extract_model_from_parallel, is_compiled_module
from ..runtime.tensors.modules import get_model_tp_size, get_module_children_bottom_up, model_has_dtensor
from ..strategies.parallel.compile import (
    compile_regions,
    compile_regions_deepspeed,
    compile_regions_fsdp2,
    has_compiled_regions,
)

__all__ = [
    "check_os_kernel",
    "clean_state_dict_for_safetensors",
    "compile_regions",
    "compile_regions_deepspeed",
    "compile_regions_fsdp2",
    "convert_bytes",
    "extract_model_from_parallel",
    "get_free_port",
    "get_model_tp_size",
    "get_module_children_bottom_up",
    "get_pretty_name",
    "has_compiled_regions",
    "is_compiled_module",
    "is_port_in_use",
    "load",
    "merge_dicts",
    "model_has_dtensor",
    "recursive_getattr",
    "save",
    "wait_for_everyone",
]
