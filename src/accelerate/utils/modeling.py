"""Sizes, device maps and weights of models; mixed-precision helpers."""

from __future__ import annotations

from ..offload.checkpoints import load_state_dict
from ..offload.device_map import (
    check_device_map,
    check_tied_parameters_in_config,
    check_tied_parameters_on_same_device,
    clean_device_map,
    infer_auto_device_map,
)
from ..offload.disk_weights import load_offloaded_weights, offload_weight, save_offload_index
from ..offload.hooks import (
    align_module_device,
    get_state_dict_from_offload,
    get_state_dict_offloaded_model,
    has_offloaded_params,
)
from ..offload.loading import load_checkpoint_in_model
from ..offload.max_memory import get_balanced_memory, get_max_memory
from ..offload.sizes import (
    calculate_maximum_sizes,
    compute_module_sizes,
    compute_module_total_buffer_size,
    dtype_byte_size,
    get_max_layer_size,
    get_module_leaves,
)
from ..offload.tensors import (
    check_device_same,
    get_non_persistent_buffers,
    id_tensor_storage,
    named_module_tensors,
    set_module_tensor_to_device,
)
from ..offload.tied_weights import find_tied_parameters, retie_parameters
from ..precision.helpers import get_grad_scaler, get_mixed_precision_context_manager
from ..runtime.helpers import convert_file_size_to_int
from ..runtime.memory import clear_device_cache
from ..runtime.tensors.modules import is_peft_model
from ..settings.enums import WEIGHTS_INDEX_NAME

__all__ = [
    "WEIGHTS_INDEX_NAME",
    "align_module_device",
    "calculate_maximum_sizes",
    "check_device_map",
    "check_device_same",
    "check_tied_parameters_in_config",
    "check_tied_parameters_on_same_device",
    "clean_device_map",
    "clear_device_cache",
    "compute_module_sizes",
    "compute_module_total_buffer_size",
    "convert_file_size_to_int",
    "dtype_byte_size",
    "find_tied_parameters",
    "get_balanced_memory",
    "get_grad_scaler",
    "get_max_layer_size",
    "get_max_memory",
    "get_mixed_precision_context_manager",
    "get_module_leaves",
    "get_non_persistent_buffers",
    "get_state_dict_from_offload",
    "get_state_dict_offloaded_model",
    "has_offloaded_params",
    "id_tensor_storage",
    "infer_auto_device_map",
    "is_peft_model",
    "load_checkpoint_in_model",
    "load_offloaded_weights",
    "load_state_dict",
    "named_module_tensors",
    "offload_weight",
    "retie_parameters",
    "save_offload_index",
    "set_module_tensor_to_device",
]
