"""Groups of options with a section of their own in the configuration file: one settings class each.

`settings.launcher.LaunchSettings` holds one of each.
"""

from __future__ import annotations

from typing import ClassVar

from .enums import (
    DEEPSPEED_MULTINODE_LAUNCHERS,
    FSDP_AUTO_WRAP_POLICY,
    FSDP_BACKWARD_PREFETCH,
    FSDP_SHARDING_STRATEGY,
    FSDP_STATE_DICT_TYPE,
    TORCH_DYNAMO_MODES,
)
from .option import Section, Settings, option

RESOURCES = "Resource Selection Arguments"

DYNAMO_BACKENDS = (
    "no",
    "eager",
    "aot_eager",
    "inductor",
    "aot_ts_nvfuser",
    "nvprims_nvfuser",
    "cudagraphs",
    "ofi",
    "fx2trt",
    "onnxrt",
    "tensorrt",
    "aot_torchxla_trace_once",
    "torchxla_trace_once",
    "torhchxla_trace_once",  # how it was once misspelt, and is still written in files
    "tvm",
    "hpu_backend",
    "neuron",
)
# A strategy by name, or by its number in torch's own order.
_SHARDING = (*FSDP_SHARDING_STRATEGY, *(str(number) for number in range(1, 6)))


class DynamoSettings(Settings):
    """torch.compile."""

    section: ClassVar[Section] = Section(
        RESOURCES, "dynamo_config", "dynamo_", variables="ACCELERATE_DYNAMO_", truth=("True", "False")
    )

    backend: str = option(
        "no",
        "compile the model with this backend of torch.compile",
        choices=DYNAMO_BACKENDS,
        ask="Which backend of torch dynamo do you want to use?",
    )
    mode: str = option(
        "default",
        "optimization goal of the compiler",
        choices=tuple(TORCH_DYNAMO_MODES),
        ask="What should the compiler optimize for?",
    )
    use_fullgraph: bool = option(
        False,
        "compile the model as one graph or fail",
        switch=True,
        ask="Should the model be compiled as one graph, and refused where it breaks into several?",
    )
    use_dynamic: bool = option(
        False, "trace with dynamic shapes", switch=True, ask="Should it be compiled for shapes that change (dynamic)?"
    )
    use_regional_compilation: bool = option(
        False,
        "compile the repeated blocks of the model once instead of the whole",
        switch=True,
        ask="Should repeated blocks be compiled once instead of the whole model (regional)?",
    )


class DeepSpeedSettings(Settings):
    """DeepSpeed."""

    section: ClassVar[Section] = Section(
        "DeepSpeed Arguments", "deepspeed_config", variables="ACCELERATE_DEEPSPEED_", enabled_by="use_deepspeed"
    )

    deepspeed_config_file: str | None = option(
        None,
        "DeepSpeed's own configuration file (json)",
        env="ACCELERATE_DEEPSPEED_CONFIG_FILE",
        ask="Please enter the path to the json DeepSpeed config file",
    )
    zero_stage: int | None = option(
        None, "stage of ZeRO", choices=(0, 1, 2, 3), ask="Which stage of ZeRO do you want to use?"
    )
    offload_optimizer_device: str | None = option(
        None,
        "where optimizer states are kept",
        choices=("none", "cpu", "nvme"),
        ask="Where should optimizer states be kept?",
    )
    offload_param_device: str | None = option(
        None, "where parameters are kept", choices=("none", "cpu", "nvme"), ask="Where should parameters be kept?"
    )
    offload_optimizer_nvme_path: str | None = option(
        None, "folder on NVMe for optimizer states", ask="Which folder on NVMe should hold the optimizer states?"
    )
    offload_param_nvme_path: str | None = option(
        None, "folder on NVMe for parameters", ask="Which folder on NVMe should hold the parameters?"
    )
    gradient_accumulation_steps: int | None = option(
        None,
        "micro-batches per optimizer step (read by every kind of run)",
        minimum=1,
        env="ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        ask="How many gradient accumulation steps does your script use?",
    )
    gradient_clipping: float | None = option(
        None,
        "largest norm of the gradient",
        minimum=0,
        env="ACCELERATE_GRADIENT_CLIPPING",
        ask="What is the gradient clipping value?",
    )
    zero3_init_flag: bool | None = option(
        None,
        "build the model under deepspeed.zero.Init (stage 3)",
        env="ACCELERATE_DEEPSPEED_ZERO3_INIT",
        ask="Do you want to enable `deepspeed.zero.Init` when using ZeRO Stage-3 for constructing massive models?",
    )
    zero3_save_16bit_model: bool | None = option(
        None, "save 16-bit weights (stage 3)", ask="Do you want to save 16-bit model weights when using ZeRO Stage-3?"
    )
    deepspeed_hostfile: str | None = option(
        None, "DeepSpeed's list of hosts", env="", ask="Please enter the path to the hostfile"
    )
    deepspeed_exclusion_filter: str | None = option(
        None,
        "hosts and devices to leave out",
        env="",
        ask="Which hosts and devices should be left out, as in worker-0@worker-1:0,2?",
    )
    deepspeed_inclusion_filter: str | None = option(
        None,
        "hosts and devices to use",
        env="",
        ask="Which hosts and devices should be used, as in worker-0@worker-1:0,2?",
    )
    deepspeed_multinode_launcher: str | None = option(
        None,
        "how processes on other machines are started",
        choices=tuple(DEEPSPEED_MULTINODE_LAUNCHERS),
        env="",
        ask="How should processes on other machines be started?",
    )
    deepspeed_moe_layer_cls_names: str | None = option(
        None,
        "class names of mixture-of-experts layers, by commas",
        env="ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES",
        ask="What are the class names of the Mixture-of-Experts layers, separated by commas (MixtralSparseMoeBlock, ...)?",
    )


class FsdpSettings(Settings):
    """Fully sharded data parallelism."""

    section: ClassVar[Section] = Section(
        "FSDP Arguments", "fsdp_config", "fsdp_", variables="FSDP_", enabled_by="use_fsdp"
    )

    version: int = option(
        1,
        "1: FullyShardedDataParallel, 2: fully_shard",
        choices=(1, 2),
        ask="Which version of FSDP do you want to use?",
    )
    offload_params: bool = option(
        False,
        "keep parameters and gradients on the CPU",
        keys=("fsdp_cpu_offload",),
        ask="Do you want to offload parameters and gradients to the CPU?",
    )
    min_num_params: int = option(
        100_000_000,
        "smallest unit of size-based wrapping, in parameters",
        minimum=0,
        ask="How many parameters should a wrapped unit have at least?",
    )
    sharding_strategy: str = option(
        "FULL_SHARD", "what is sharded (version 1)", choices=_SHARDING, ask="What should be sharded?"
    )
    reshard_after_forward: str = option(
        "true",
        "free gathered parameters after the forward; version 1 takes a sharding strategy here as well",
        choices=("true", "false", *FSDP_SHARDING_STRATEGY),
        ask="Should gathered parameters be freed after the forward?",
    )
    auto_wrap_policy: str | None = option(
        None,
        "which modules become units",
        choices=tuple(FSDP_AUTO_WRAP_POLICY),
        numbered=tuple(FSDP_AUTO_WRAP_POLICY),
        ask="Which modules should become units of their own?",
    )
    transformer_layer_cls_to_wrap: str | None = option(
        None,
        "class names of the layers that become units, by commas",
        env="FSDP_TRANSFORMER_CLS_TO_WRAP",
        ask="What are the class names of the transformer layers to wrap, separated by commas (BertLayer, ...)?",
    )
    backward_prefetch: str | None = option(
        None,
        "when the backward gathers the next unit (version 1)",
        choices=tuple(FSDP_BACKWARD_PREFETCH),
        numbered=tuple(FSDP_BACKWARD_PREFETCH),
        flags=("--fsdp_backward_prefetch", "--fsdp_backward_prefetch_policy"),
        keys=("fsdp_backward_prefetch_policy",),
        ask="When should the backward gather the next unit?",
    )
    state_dict_type: str | None = option(
        None,
        "how checkpoints are written",
        choices=tuple(FSDP_STATE_DICT_TYPE),
        numbered=tuple(FSDP_STATE_DICT_TYPE),
        ask="How should checkpoints be written?",
    )
    forward_prefetch: bool = option(
        False,
        "gather the next unit during the forward (version 1)",
        ask="Should the forward gather the next unit ahead (for models that run the same way each time)?",
    )
    use_orig_params: bool = option(
        True,
        "let a unit hold frozen and trained parameters (version 1)",
        ask="Should a unit be able to hold frozen and trained parameters (use_orig_params)?",
    )
    cpu_ram_efficient_loading: bool = option(
        True,
        "only the first process reads the pretrained weights",
        ask="Should only the first process read the pretrained weights (for Transformers models)?",
    )
    sync_module_states: bool = option(
        True,
        "broadcast parameters from rank 0 (version 1)",
        ask="Should rank 0 send its parameters to the others at the start?",
    )
    activation_checkpointing: bool = option(
        False, "recompute activations in the backward", ask="Do you want to use activation checkpointing?"
    )
    activation_checkpointing_offload: bool = option(False, "keep checkpointed activations on the CPU")
    ignored_modules: str | None = option(None, "regular expression for modules that are not sharded")


class MegatronSettings(Settings):
    """Megatron-LM."""

    section: ClassVar[Section] = Section(
        "Megatron-LM Arguments",
        "megatron_lm_config",
        "megatron_lm_",
        variables="MEGATRON_LM_",
        enabled_by="use_megatron_lm",
        truth=("True", "False"),
    )

    tp_degree: int = option(
        1, "degree of tensor parallelism", minimum=1, ask="What is the Tensor Parallelism degree/size?"
    )
    use_custom_fsdp: bool = option(False, "Megatron's own FSDP")
    no_load_optim: bool = option(False, "do not load optimizer states")
    eod_mask_loss: bool = option(False, "leave the loss of end-of-document tokens out")
    overlap_cpu_optimizer_d2h_h2d: bool = option(False, "overlap the copies of the optimizer on the CPU")
    no_save_optim: bool = option(False, "do not save optimizer states")
    optimizer_cpu_offload: bool = option(False, "keep the optimizer on the CPU")
    use_precision_aware_optimizer: bool = option(False, "keep optimizer states in lower precision")
    decoder_last_pipeline_num_layers: int | None = option(None, "layers on the last pipeline stage", minimum=1)
    pp_degree: int = option(
        1, "degree of pipeline parallelism", minimum=1, ask="What is the Pipeline Parallelism degree/size?"
    )
    num_micro_batches: int | None = option(
        None, "micro-batches of the pipeline", minimum=1, ask="What is the number of micro-batches?"
    )
    sequence_parallelism: bool | None = option(
        None, "shard activations along the sequence", ask="Do you want to enable Sequence Parallelism?"
    )
    recompute_activations: bool | None = option(
        None, "recompute activations in the backward", ask="Do you want to enable selective activation recomputation?"
    )
    use_distributed_optimizer: bool | None = option(
        None,
        "shard optimizer states and gradients",
        ask="Do you want to use distributed optimizer which shards optimizer state and gradients across data parallel "
        "ranks?",
    )
    gradient_clipping: float = option(
        1.0,
        "largest norm of the gradient, 0 for none",
        minimum=0,
        ask="What is the gradient clipping value based on global L2 Norm (0 to disable)?",
    )
    recompute_granularity: str | None = option(None, "what is recomputed", choices=("full", "selective"))
    recompute_method: str | None = option(None, "which layers are recomputed", choices=("uniform", "block"))
    recompute_num_layers: int | None = option(None, "layers per unit of recomputation", minimum=1)
    attention_backend: str | None = option(None, "implementation of attention")
    expert_model_parallel_size: int | None = option(None, "ranks that share the experts", minimum=1)
    context_parallel_size: int | None = option(None, "ranks that share a sequence", minimum=1)
    attention_dropout: float | None = option(None, "dropout of attention", minimum=0)
    hidden_dropout: float | None = option(None, "dropout of hidden states", minimum=0)
    attention_softmax_in_fp32: bool | None = option(None, "softmax of attention in float32")
    expert_tensor_parallel_size: int | None = option(None, "tensor parallelism of the experts", minimum=1)
    calculate_per_token_loss: bool | None = option(None, "normalize the loss by tokens")
    use_rotary_position_embeddings: bool | None = option(None, "rotary position embeddings")


class Fp8Settings(Settings):
    """8-bit floating point. In the file, most keys go without the prefix."""

    section: ClassVar[Section] = Section(
        "FP8 Arguments", "fp8_config", "fp8_", variables="ACCELERATE_FP8_", enabled_by="fp8_backend"
    )

    backend: str | None = option(
        None,
        "library that computes in 8 bits",
        choices=("ao", "te", "msamp"),
        key="backend",
        ask="Which library should compute in FP8?",
    )
    use_autocast_during_eval: bool = option(
        False,
        "8 bits in evaluation as well (te)",
        switch=True,
        key="use_autocast_during_eval",
        ask="Should evaluation run in FP8 as well (results are usually better without)?",
    )
    margin: int = option(
        0, "margin of the scaling factor (te)", minimum=0, key="margin", ask="What is the margin of the scaling factor?"
    )
    interval: int = option(
        1,
        "steps between scaling factors (te)",
        minimum=1,
        key="interval",
        ask="How many steps lie between two computations of the scaling factor?",
    )
    format: str = option(
        "HYBRID",
        "number format (te)",
        choices=("HYBRID", "E4M3", "E5M2"),
        ask="Which FP8 number format do you want to use?",
    )
    amax_history_len: int = option(
        1024,
        "steps that the scaling factor looks back (te)",
        minimum=1,
        key="amax_history_length",
        ask="How many steps should the scaling factor look back?",
    )
    amax_compute_algo: str = option(
        "most_recent",
        "how the scaling factor looks back (te)",
        choices=("max", "most_recent"),
        key="amax_compute_algorithm",
        ask="How should the scaling factor look back?",
    )
    override_linear_precision: tuple[bool, bool, bool] = option(
        (False, False, False),
        "higher precision for fprop, dgrad, wgrad: true,false,true",
        env="",
        key="override_linear_precision",
        ask="Should matrix products run in higher precision? yes, no, or a word each for fprop,dgrad,wgrad",
    )
    use_mxfp8_block_scaling: bool = option(False, "MXFP8 block scaling (te)", switch=True)
    opt_level: str = option(
        "O2",
        "level of MS-AMP",
        choices=("O1", "O2"),
        keys=("optimization_level",),
        key="opt_level",
        ask="Which optimization level of MS-AMP do you want to use?",
    )
    enable_fsdp_float8_all_gather: bool = option(
        True,
        "gather FSDP parameters in 8 bits (ao)",
        key="enable_fsdp_float8_all_gather",
        ask="Should FSDP gather parameters in FP8?",
    )
    pad_inner_dim: bool = option(
        True,
        "pad matrices to multiples of 16 (ao)",
        key="pad_inner_dim",
        ask="Should matrices be padded to multiples of 16?",
    )


class ParallelismSettings(Settings):
    """Sizes of the device mesh."""

    section: ClassVar[Section] = Section(
        "ParallelismConfig Arguments",
        "parallelism_config",
        "parallelism_config_",
        variables="PARALLELISM_CONFIG_",
        enabled_by="use_parallelism_config",
        truth=("True", "False"),
    )

    dp_replicate_size: int = option(
        1, "replicas of the model", minimum=1, ask="How many replicas of the model should there be (dp_replicate_size)?"
    )
    dp_shard_size: int = option(
        1,
        "ranks that shard a replica",
        minimum=1,
        ask="Over how many ranks should a replica be sharded (dp_shard_size)?",
    )
    tp_size: int = option(
        1, "degree of tensor parallelism", minimum=1, ask="What is the Tensor Parallelism degree/size (tp_size)?"
    )
    cp_size: int = option(
        1, "degree of context parallelism", minimum=1, ask="What is the Context Parallelism degree/size (cp_size)?"
    )
    cp_backend: str = option("torch", "implementation of context parallelism", choices=("torch",))
    cp_comm_strategy: str = option(
        "allgather",
        "how keys and values travel",
        choices=("allgather", "alltoall"),
        ask="How should keys and values travel between context parallel ranks?",
    )
    sp_size: int = option(
        1, "degree of sequence parallelism", minimum=1, ask="What is the Sequence Parallelism degree/size (sp_size)?"
    )
    sp_backend: str = option("deepspeed", "implementation of sequence parallelism", choices=("deepspeed",))
    sp_seq_length: int | None = option(
        None, "length of the sequences", minimum=1, ask="What is the length of the sequences?"
    )
    sp_seq_length_is_variable: bool = option(
        True, "lengths differ from batch to batch", ask="Do lengths differ from batch to batch?"
    )
    sp_attn_implementation: str = option(
        "sdpa", "implementation of attention", ask="Which implementation of attention do you want to use?"
    )


class TpuSettings(Settings):
    """TPUs."""

    section: ClassVar[Section] = Section("TPU", enabled_by="tpu")

    tpu_use_cluster: bool = option(
        False,
        "start on a pod of TPUs",
        switch=True,
        flags=("--tpu_cluster",),
        off="--no_tpu_cluster",
        ask="Are you using a TPU pod (a cluster of several hosts)?",
    )
    tpu_use_sudo: bool = option(
        False, "use sudo on the pod", switch=True, ask="Should the commands on the pod run with sudo?"
    )
    vm: tuple[str, ...] = option(
        (), "name of a compute VM, may be repeated", key="tpu_vm", ask="What is the name of a compute VM of the pod?"
    )
    env: tuple[str, ...] = option(
        (),
        "NAME=value for the VMs, may be repeated",
        key="tpu_env",
        ask="Which variable, as NAME=value, should the VMs have?",
    )
    main_training_function: str | None = option(
        None,
        "function of the script to run",
        ask="What is the name of the function in your script that should run in every process?",
    )
    downcast_bf16: bool = option(
        False,
        "with bf16, float becomes bfloat16 and double becomes float",
        switch=True,
        ask="Should `torch.float` be cast to bfloat16 on TPUs, and `torch.double` to float32?",
    )


class AwsSettings(Settings):
    """Amazon SageMaker."""

    section: ClassVar[Section] = Section("AWS Arguments", enabled_by="aws_access_key_id")

    aws_access_key_id: str | None = option(
        None, "access key for the job", secret=True, ask="What is your AWS Access Key ID?"
    )
    aws_secret_access_key: str | None = option(
        None, "secret key for the job", secret=True, ask="What is your AWS Secret Access Key?"
    )


class MpirunSettings(Settings):
    """mpirun."""

    section: ClassVar[Section] = Section("MPI Arguments", "mpirun_config", "mpirun_", enabled_by="mpirun_hostfile")

    hostfile: str | None = option(
        None,
        "start with mpirun on the hosts of this file",
        ask="Please enter the path to the hostfile to use with mpirun",
    )
    ccl: str | None = option(None, "worker threads of oneCCL", ask="Enter the number of oneCCL worker threads")
