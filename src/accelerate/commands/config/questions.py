"""The questions of `accelerate config`: their order and conditions.

To add one, give the option an ``ask=`` where it is declared (`settings.launcher`, `settings.option_groups`,
`settings.clouds`) and add a row here. A row names the option and its conditions; see `flow.Question` for its other fields
and `predicates.py` for conditions and checks. A question that only selects others is declared in `routing_questions.py`.
"""

from __future__ import annotations

import os.path

from ...settings.enums import FSDP2_STATE_DICT_TYPE, FSDP_SHARDING_STRATEGY, FSDP_STATE_DICT_TYPE
from ...settings.option_groups import DYNAMO_BACKENDS
from .flow import Question, QuestionGroup
from .predicates import (
    are_numbers_or_all,
    are_variables,
    closes_the_mesh,
    fewest_processes,
    fills_all,
    first,
    is_a_count,
    is_a_port,
    is_a_rank,
    is_an_address,
    more_than_none,
    more_than_one,
    not_standard,
    not_version_1,
    not_yes,
    one_or_three,
    unless_all,
    upper,
    yes_or_no,
)
from .role import ROLE_NAME
from .routing_questions import MACHINES

DEVICES = tuple(kind for kind in MACHINES if kind not in ("NO", "MULTI_CPU", "XLA"))
SEVERAL = ("MULTI_CPU", *DEVICES)

FIRST = (
    QuestionGroup(
        (
            Question(
                "compute_environment",
                choices={"LOCAL_MACHINE": "This machine", "AMAZON_SAGEMAKER": "AWS (Amazon SageMaker)"},
            ),
        )
    ),
)

MACHINE = QuestionGroup(
    (
        Question("machine", choices={kind: label for kind, (label, _) in MACHINES.items()}),
        Question("cpu", when={"machine": "NO"}),
        Question("cpu", when={"machine": "MULTI_CPU"}, fixed=True),
        Question("num_machines", when={"machine": SEVERAL}, default=1),
    )
)

MACHINES_MEET = QuestionGroup(
    (
        Question("machine_rank", default=0, check=is_a_rank),
        Question("main_process_ip", check=is_an_address),
        Question("main_process_port", default=29500, check=is_a_port),
        Question("same_network", default=True),
        Question("rdzv_backend", when={"same_network": False}),
    ),
    when={"num_machines": more_than_one},
)

DEBUG = QuestionGroup((Question("debug"),), when={"machine": SEVERAL})

MPIRUN = QuestionGroup(
    (
        Question("mpirun_hostfile", default="~/hostfile", write=os.path.expanduser),
        Question("mpirun_ccl", default="1", check=is_a_count),
    ),
    gate="mpirun",
    when={"machine": "MULTI_CPU", "machine_rank": first},
)

DYNAMO = QuestionGroup(
    (
        Question(
            "dynamo_backend",
            choices=[name for name in DYNAMO_BACKENDS if name not in ("no", "torhchxla_trace_once")],
            default="inductor",
            write=upper,
        ),
        Question("dynamo_details"),
        Question("dynamo_mode", when={"dynamo_details": True}),
        Question("dynamo_use_fullgraph", when={"dynamo_details": True}),
        Question("dynamo_use_dynamic", when={"dynamo_details": True}),
        Question("dynamo_use_regional_compilation", when={"dynamo_details": True}),
    ),
    gate="dynamo",
)

DEEPSPEED = QuestionGroup(
    (
        Question("deepspeed_file"),
        Question("deepspeed_config_file", when={"deepspeed_file": True}, write=os.path.expanduser),
        Question(
            "zero_stage",
            when={"deepspeed_file": False},
            default=2,
            choices={
                0: "nothing is sharded",
                1: "optimizer states",
                2: "optimizer states and gradients",
                3: "optimizer states, gradients and parameters",
            },
        ),
        Question("offload_optimizer_device", when={"zero_stage": (2, 3)}, default="none"),
        Question("offload_optimizer_nvme_path", when={"offload_optimizer_device": "nvme"}, default="/nvme"),
        Question("offload_param_device", when={"zero_stage": 2}, fixed="none"),
        Question("offload_param_device", when={"zero_stage": 3}, default="none"),
        Question("offload_param_nvme_path", when={"offload_param_device": "nvme"}, default="/nvme"),
        Question("gradient_accumulation_steps", when={"deepspeed_file": False}, default=1),
        Question("clipping", when={"deepspeed_file": False}),
        Question("gradient_clipping", when={"clipping": True}, default=1.0),
        Question("zero3_save_16bit_model", when={"zero_stage": 3}, default=False),
        Question("zero3_init_flag", default=False),
        Question("moe"),
        Question("deepspeed_moe_layer_cls_names", when={"moe": True}),
        Question("deepspeed_multinode_launcher", when={"machine_rank": 0}, default="pdsh"),
        # The other launchers start all machines from the first one.
        Question("deepspeed_multinode_launcher", when={"machine_rank": more_than_none}, fixed="standard"),
        Question(
            "deepspeed_hostfile",
            when={"deepspeed_multinode_launcher": not_standard},
            default="/job/hostfile",
            write=os.path.expanduser,
        ),
        Question("exclusion", when={"deepspeed_multinode_launcher": ("pdsh", "slurm", "nossh")}),  # MPI uses all hosts
        Question("deepspeed_exclusion_filter", when={"exclusion": True}),
        Question("inclusion", when={"exclusion": False}),  # DeepSpeed takes one of the two
        Question("deepspeed_inclusion_filter", when={"inclusion": True}),
    ),
    gate="use_deepspeed",
    when={"machine": ("NO", *DEVICES)},
)

FSDP = QuestionGroup(
    (
        Question("fsdp_version", choices={1: "FullyShardedDataParallel", 2: "fully_shard"}),
        Question("fsdp_sharding_strategy", when={"fsdp_version": 1}, choices=FSDP_SHARDING_STRATEGY),
        Question(
            "fsdp_reshard_after_forward",
            when={"fsdp_version": 2},
            choices={"false": "no", "true": "yes"},
            write=lambda word: word == "true",
        ),
        Question("fsdp_offload_params"),
        Question("fsdp_auto_wrap_policy", default="TRANSFORMER_BASED_WRAP"),
        Question("no_split_modules", when={"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}),
        Question("fsdp_transformer_layer_cls_to_wrap", when={"no_split_modules": False}),
        Question("fsdp_min_num_params", when={"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}),
        Question("fsdp_backward_prefetch", when={"fsdp_version": 1}, default="BACKWARD_PRE"),
        Question("fsdp_forward_prefetch", when={"fsdp_version": 1}),
        Question(
            "fsdp_state_dict_type",
            when={"fsdp_version": 1},
            choices=FSDP_STATE_DICT_TYPE,
            default="SHARDED_STATE_DICT",
        ),
        Question(
            "fsdp_state_dict_type",
            when={"fsdp_version": 2},
            choices=FSDP2_STATE_DICT_TYPE,
            default="SHARDED_STATE_DICT",
        ),
        Question("fsdp_use_orig_params", when={"fsdp_version": 1}),
        Question("fsdp_cpu_ram_efficient_loading"),
        # Ranks that do not read the weights must receive them.
        Question(
            "fsdp_sync_module_states", when={"fsdp_version": 1, "fsdp_cpu_ram_efficient_loading": True}, fixed=True
        ),
        Question("fsdp_sync_module_states", when={"fsdp_version": 1, "fsdp_cpu_ram_efficient_loading": False}),
        Question("fsdp_activation_checkpointing"),
    ),
    gate="use_fsdp",
    when={"machine": DEVICES, "use_deepspeed": False},
)

MEGATRON = QuestionGroup(
    (
        Question("megatron_lm_tp_degree"),
        Question("megatron_lm_sequence_parallelism", when={"megatron_lm_tp_degree": more_than_one}, default=True),
        Question("megatron_lm_pp_degree"),
        Question("megatron_lm_num_micro_batches", when={"megatron_lm_pp_degree": more_than_one}, default=1),
        Question("megatron_lm_recompute_activations", default=True),
        Question("megatron_lm_use_distributed_optimizer", default=True),
        Question("megatron_lm_gradient_clipping"),
    ),
    gate="use_megatron_lm",
    when={"machine": "MULTI_GPU", "use_deepspeed": False, "use_fsdp": False},
)

PARALLELISM = QuestionGroup(
    (
        Question("parallelism_config_dp_replicate_size"),
        Question("parallelism_config_dp_shard_size", when={"use_fsdp": True}),
        Question("parallelism_config_dp_shard_size", when={"use_deepspeed": True}),
        Question("parallelism_config_tp_size", when={"use_fsdp": True}),
        Question("parallelism_config_tp_size", when={"use_deepspeed": False, "use_fsdp": False}, check=closes_the_mesh),
        Question("parallelism_config_cp_size", when={"use_fsdp": True}, check=closes_the_mesh),
        Question("parallelism_config_cp_comm_strategy", when={"parallelism_config_cp_size": more_than_one}),
        Question("parallelism_config_sp_size", when={"use_deepspeed": True}, check=closes_the_mesh),
        Question("parallelism_config_sp_seq_length_is_variable", when={"parallelism_config_sp_size": more_than_one}),
        Question("parallelism_config_sp_seq_length", when={"parallelism_config_sp_seq_length_is_variable": False}),
        Question(
            "parallelism_config_sp_attn_implementation",
            when={"parallelism_config_sp_size": more_than_one},
            choices=("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),  # as settings.parallel has it
        ),
    ),
    gate="use_parallelism_config",
    when={"machine": DEVICES, "use_megatron_lm": not_yes, "fsdp_version": not_version_1},
)

TPU = QuestionGroup(
    (
        Question("main_training_function", default="main"),
        Question("tpu_use_cluster"),
        Question("tpu_name", when={"tpu_use_cluster": True}),
        Question("tpu_zone", when={"tpu_use_cluster": True}),
        Question("tpu_use_sudo", when={"tpu_use_cluster": True}),
        Question("tpu_vms", when={"tpu_use_cluster": True}),
        Question("vm", when={"tpu_vms": True}),
        Question("tpu_variables", when={"tpu_use_cluster": True}),
        Question("env", when={"tpu_variables": True}, check=are_variables),
        Question("tpu_install", when={"tpu_use_cluster": True}),
        Question("commands", when={"tpu_install": True}, fixed=("pip install --upgrade accelerate",)),
        Question("tpu_startup", when={"tpu_use_cluster": True}),
        Question("tpu_file", when={"tpu_startup": True}),
        Question("command_file", when={"tpu_file": True}),
        Question("commands", when={"tpu_file": False}),
    ),
    when={"machine": "XLA"},
)

PROCESSES = QuestionGroup(
    (
        Question("num_processes", when={"machine": SEVERAL}, default=fewest_processes, check=fills_all),
        Question("num_processes", when={"machine": "XLA"}, default=8),
        Question("gpu_ids", when={"machine": DEVICES}, default="all", check=are_numbers_or_all, write=unless_all),
        Question("gpu_ids", when={"cpu": False}, default="all", check=are_numbers_or_all, write=unless_all),
        Question("enable_cpu_affinity", when={"machine": "MULTI_GPU"}),
    )
)

PRECISION = QuestionGroup(
    (
        # Set in DeepSpeed's own file.
        Question("mixed_precision", when={"deepspeed_file": not_yes}, default="no"),
        Question("downcast_bf16", when={"machine": "XLA", "mixed_precision": "bf16"}, write=yes_or_no),
    )
)

FP8 = QuestionGroup(
    (
        Question(
            "fp8_backend",
            default="te",
            choices={"te": "TransformerEngine", "ao": "torchao", "msamp": "MS-AMP"},
            write=upper,
        ),
        Question("fp8_use_autocast_during_eval", when={"fp8_backend": "te"}),
        Question("fp8_margin", when={"fp8_backend": "te"}),
        Question("fp8_interval", when={"fp8_backend": "te"}),
        Question("fp8_format", when={"fp8_backend": "te"}),
        Question("fp8_amax_history_len", when={"fp8_backend": "te"}),
        Question("fp8_amax_compute_algo", when={"fp8_backend": "te"}, default="max"),
        Question("fp8_override_linear_precision", when={"fp8_backend": "te"}, write=one_or_three),
        Question("fp8_opt_level", when={"fp8_backend": "msamp"}),
        Question("fp8_enable_fsdp_float8_all_gather", when={"fp8_backend": "ao"}),
        Question("fp8_pad_inner_dim", when={"fp8_backend": "ao"}),
    ),
    when={"mixed_precision": "fp8"},
)

LOCAL = (
    MACHINE,
    MACHINES_MEET,
    DEBUG,
    MPIRUN,
    DYNAMO,
    DEEPSPEED,
    FSDP,
    MEGATRON,
    PARALLELISM,
    TPU,
    PROCESSES,
    PRECISION,
    FP8,
)

ACCOUNT = QuestionGroup(
    (
        Question(
            "authorization",
            choices={"profile": "AWS profile", "keys": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"},
        ),
        Question("profile", when={"authorization": "profile"}, default="default"),
        Question("region"),
        Question(
            "iam_role",
            choices={"name": "by a role that exists", "create": f"by a new role, {ROLE_NAME}, made now"},
        ),
        Question("iam_role_name", when={"iam_role": "name"}),
        Question("iam_role_name", when={"iam_role": "create"}, fixed=ROLE_NAME),
        # Needed only to create the role.
        Question("aws_access_key_id", when={"iam_role": "create", "authorization": "keys"}),
        Question("aws_secret_access_key", when={"iam_role": "create", "authorization": "keys"}),
    )
)

JOB = QuestionGroup(
    (
        Question("image"),
        Question("image_uri", when={"image": True}),
        Question("inputs"),
        Question("sagemaker_inputs_file", when={"inputs": True}),
        Question("metrics"),
        Question("sagemaker_metrics_file", when={"metrics": True}),
        Question("sagemaker_mode", choices={"NO": "No distributed training", "DATA_PARALLEL": "data parallelism"}),
    )
)

INSTANCES = QuestionGroup(
    (
        Question("ec2_instance_type", when={"sagemaker_mode": "NO"}, default="ml.p3.2xlarge"),
        Question("ec2_instance_type", when={"sagemaker_mode": "DATA_PARALLEL"}, default="ml.p3.16xlarge"),
        Question("debug", when={"sagemaker_mode": "DATA_PARALLEL"}),
        Question("num_machines", when={"sagemaker_mode": "DATA_PARALLEL"}, default=1),
        Question("mixed_precision", default="no"),
    )
)

SAGEMAKER = (ACCOUNT, JOB, DYNAMO, INSTANCES, FP8)
