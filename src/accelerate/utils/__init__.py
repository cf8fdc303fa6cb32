"""The shop window: the documented helpers under their documented names.

It re-exports and does nothing else: a name is looked up in its real home when it is first used, so that importing this
package costs nothing. Nothing inside accelerate imports from here.
"""

from __future__ import annotations

import importlib

# A function and a submodule of one name: bound now, or looking it up would find the submodule.
from .tqdm import tqdm as tqdm

_HOMES: dict[str, tuple[str, ...]] = {
    "checkpointing": (
        "clean_state_dict_for_safetensors",
        "load",
        "save",
    ),
    "commands.config.default": ("write_basic_config",),
    "launch.documented": (
        "PrepareForLaunch",
        "prepare_deepspeed_cmd_env",
        "prepare_multi_gpu_env",
        "prepare_simple_launcher_cmd_env",
        "prepare_tpu",
    ),
    "precision.helpers": (
        "get_grad_scaler",
        "get_mixed_precision_context_manager",
    ),
    "runtime.collectives": (
        "CannotPadNestedTensorWarning",
        "GatheredParameters",
        "broadcast",
        "broadcast_object_list",
        "copy_tensor_to_devices",
        "gather",
        "gather_object",
        "pad_across_processes",
        "pad_input_tensors",
        "reduce",
    ),
    "runtime.forward": (
        "extract_model_from_parallel",
        "is_compiled_module",
    ),
    "runtime.helpers": (
        "convert_bytes",
        "get_pretty_name",
        "merge_dicts",
        "recursive_getattr",
        "wait_for_everyone",
    ),
    "runtime.machine": (
        "check_cuda_fp8_capability",
        "check_cuda_p2p_ib_support",
        "check_os_kernel",
        "get_cpu_distributed_information",
        "get_current_device_type",
        "get_gpu_info",
        "is_port_in_use",
        "set_numa_affinity",
    ),
    "runtime.memory": (
        "find_executable_batch_size",
        "release_memory",
    ),
    "runtime.modules": (
        "get_module_children_bottom_up",
        "is_peft_model",
    ),
    "runtime.probe": (
        "compare_versions",
        "deepspeed_required",
        "is_4bit_bnb_available",
        "is_8bit_bnb_available",
        "is_aim_available",
        "is_amdsmi_available",
        "is_bf16_available",
        "is_bitsandbytes_multi_backend_available",
        "is_bnb_available",
        "is_boto3_available",
        "is_clearml_available",
        "is_comet_ml_available",
        "is_cuda_available",
        "is_datasets_available",
        "is_deepspeed_available",
        "is_dvclive_available",
        "is_fp16_available",
        "is_fp8_available",
        "is_habana_gaudi1",
        "is_hpu_available",
        "is_import_timer_available",
        "is_ipex_available",
        "is_lomo_available",
        "is_matplotlib_available",
        "is_megatron_lm_available",
        "is_mlflow_available",
        "is_mlu_available",
        "is_mps_available",
        "is_msamp_available",
        "is_musa_available",
        "is_neuron_available",
        "is_npu_available",
        "is_numpy_available",
        "is_pandas_available",
        "is_peft_available",
        "is_pippy_available",
        "is_pynvml_available",
        "is_pytest_available",
        "is_rich_available",
        "is_rocm_available",
        "is_sagemaker_available",
        "is_schedulefree_available",
        "is_sdaa_available",
        "is_swanlab_available",
        "is_tensorboard_available",
        "is_timm_available",
        "is_torch_distributed_available",
        "is_torch_version",
        "is_torch_xla_available",
        "is_torchao_available",
        "is_torchdata_available",
        "is_torchdata_stateful_dataloader_available",
        "is_torchvision_available",
        "is_tqdm_available",
        "is_trackio_available",
        "is_transformer_engine_available",
        "is_transformer_engine_mxfp8_available",
        "is_transformers_available",
        "is_triton_available",
        "is_wandb_available",
        "is_weights_only_available",
        "is_xccl_available",
        "is_xpu_available",
        "torchao_required",
    ),
    "runtime.pytree": (
        "TensorInformation",
        "concatenate",
        "convert_outputs_to_fp32",
        "convert_to_fp32",
        "find_batch_size",
        "find_device",
        "get_data_structure",
        "honor_type",
        "ignorant_find_batch_size",
        "initialize_tensors",
        "is_namedtuple",
        "is_tensor_information",
        "is_torch_tensor",
        "listify",
        "recursively_apply",
        "send_to_device",
        "slice_tensors",
    ),
    "runtime.rng": (
        "set_seed",
        "synchronize_rng_state",
        "synchronize_rng_states",
    ),
    "runtime.verify": ("DistributedOperationException",),
    "settings.enums": (
        "MITA_PROFILING_AVAILABLE_PYTORCH_VERSION",
        "MODEL_NAME",
        "OPTIMIZER_NAME",
        "PROFILE_PATTERN_NAME",
        "RNG_STATE_NAME",
        "SAFE_MODEL_NAME",
        "SAFE_WEIGHTS_INDEX_NAME",
        "SAFE_WEIGHTS_NAME",
        "SAFE_WEIGHTS_PATTERN_NAME",
        "SAMPLER_NAME",
        "SCALER_NAME",
        "SCHEDULER_NAME",
        "TORCH_DISTRIBUTED_OPERATION_TYPES",
        "TORCH_LAUNCH_PARAMS",
        "WEIGHTS_INDEX_NAME",
        "WEIGHTS_NAME",
        "WEIGHTS_PATTERN_NAME",
        "XPU_PROFILING_AVAILABLE_PYTORCH_VERSION",
        "ComputeEnvironment",
        "CustomDtype",
        "DDPCommunicationHookType",
        "DistributedType",
        "DynamoBackend",
        "LoggerType",
        "PrecisionType",
        "RNGType",
        "SageMakerDistributedType",
    ),
    "settings.env": (
        "are_libraries_initialized",
        "clear_environment",
        "convert_dict_to_env_variables",
        "get_int_from_env",
        "parse_choice_from_env",
        "parse_flag_from_env",
        "patch_environment",
        "purge_accelerate_environment",
        "str_to_bool",
    ),
    "settings.fp8": (
        "AORecipeKwargs",
        "FP8RecipeKwargs",
        "MSAMPRecipeKwargs",
        "TERecipeKwargs",
    ),
    "settings.handlers": (
        "AutocastKwargs",
        "DataLoaderConfiguration",
        "DistributedDataParallelKwargs",
        "GradScalerKwargs",
        "GradientAccumulationPlugin",
        "InitProcessGroupKwargs",
        "KwargsHandler",
        "ProfileKwargs",
        "ProjectConfiguration",
        "TorchDynamoPlugin",
    ),
    "strategies.compile": (
        "compile_regions",
        "has_compiled_regions",
    ),
}
_EXPORTS = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = (
    "constants",
    "dataclasses",
    "environment",
    "imports",
    "launch",
    "memory",
    "modeling",
    "operations",
    "other",
    "random",
    "tqdm",
    "versions",
)

__all__ = sorted([*_EXPORTS, "tqdm"])  # noqa: PLE0605 - the table above is the list


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        value: object = getattr(importlib.import_module(f"accelerate.{_EXPORTS[name]}"), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_SUBMODULES})
