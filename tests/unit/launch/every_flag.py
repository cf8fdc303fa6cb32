"""Where each of the launcher's options must come out: the table behind `test_every_flag`.

A row says with which words around it the option matters, and how its value is read at the far end: from a plugin made in
the child's environment, from the plan's command, or by whoever else reads the child's variable. The variable alone does
not count.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from accelerate.launch.engines.sagemaker import credentials
from accelerate.launch.host import HostInfo, resolve_settings
from accelerate.launch.plan import LaunchPlan
from accelerate.parallelism_config import ParallelismConfig
from accelerate.runtime import world
from accelerate.settings import env, resolve_args
from accelerate.settings.fp8 import AORecipeKwargs, FP8RecipeKwargs, TERecipeKwargs
from accelerate.settings.handlers import TorchDynamoPlugin
from accelerate.settings.launcher import LaunchSettings
from accelerate.settings.parallel import DeepSpeedSequenceParallelConfig, TorchContextParallelConfig
from accelerate.settings.plugins.deepspeed import DeepSpeedPlugin
from accelerate.settings.plugins.fsdp import FullyShardedDataParallelPlugin
from accelerate.settings.plugins.megatron import MegatronLMPlugin

UNSET: Any = object()


class End(NamedTuple):
    """What a command line comes to; the child's environment is the process's while a row reads."""

    settings: LaunchSettings
    plan: LaunchPlan


class Row(NamedTuple):
    """Where one option comes out.

    Attributes:
        read: What stands at the far end, asked in the child's environment.
        text: The option's value on the command line; UNSET: one that differs from the default.
        value: What must be read; UNSET: the text as the option's type.
        around: Words on the command line without which the option does not matter.
        file: Keys of the file without which it does not.
        other: Another value, for a file that the flag overrules; UNSET: the default.
    """

    read: Callable[[End], Any]
    text: str = UNSET
    value: Any = UNSET
    around: tuple[str, ...] = ()
    file: dict[str, Any] = {}
    other: Any = UNSET


def field(
    make: Callable[[], Any], name: str, text: str = UNSET, value: Any = UNSET, *around: str, other: Any = UNSET
) -> Row:
    """A field of a plugin, made as a script would: without arguments."""
    return Row(lambda _: plain(getattr(make(), name)), text, value, around, other=other)


def after(flag: str, text: str = UNSET, *around: str, **rest: Any) -> Row:
    """The word after a flag in the plan's command."""
    return Row(lambda end: word_after(end.plan.command, flag), text, rest.pop("value", text), around, **rest)


def has(word: str, *around: str, **rest: Any) -> Row:
    """Whether a word is in the plan's command."""
    return Row(lambda end: word in end.plan.command, around=around, **rest)


def note(word: str) -> Row:
    """Whether the plan's notes say something about it: that it has no effect any more."""
    return Row(lambda end: any(word in line for line in end.plan.notices))


def word_after(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words[:-1] else None


def plain(value: Any) -> Any:
    """What a plugin holds, as a word where it is a member, a policy or a torch function."""
    if hasattr(value, "offload_params"):
        return value.offload_params
    return getattr(value, "name", getattr(value, "__name__", value))


def float8() -> AORecipeKwargs:
    """torchao's recipe; torchao itself, which only takes the values over, may be missing."""
    if "torchao.float8" not in sys.modules:
        module: Any = types.ModuleType("torchao.float8")
        fields = [("pad_inner_dim", bool), ("enable_fsdp_float8_all_gather", bool)]
        module.Float8LinearConfig = dataclasses.make_dataclass("Float8LinearConfig", fields)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
            patch.setitem(sys.modules, "torchao.float8", module)
            return AORecipeKwargs()
    return AORecipeKwargs()


def kind(_: End) -> str | None:
    """What the run is distributed by, as `Accelerator` finds it."""
    found = resolve_args.plugins().distributed_type
    return None if found is None else found.value


def affinity(_: End) -> bool:
    """Whether joining a run binds the process: seen by who is asked to."""
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.runtime.system.system_info.set_numa_affinity", lambda *_, **__: asked.append(1))
        world.forget()
        try:
            world.join(cpu=True)
        finally:
            world.forget()
    return bool(asked)


def debug(_: End) -> bool:
    world.forget()
    try:
        return world.join(cpu=True).debug
    finally:
        world.forget()


def _fsdp(name: str, text: str = UNSET, value: Any = UNSET, *around: str, other: Any = UNSET) -> Row:
    return field(FullyShardedDataParallelPlugin, name, text, value, "--use_fsdp", *around, other=other)


def _deepspeed(name: str, text: str = UNSET, *around: str, value: Any = UNSET) -> Row:
    return field(DeepSpeedPlugin, name, text, value, "--use_deepspeed", *around)


def _te(name: str, text: str = UNSET, value: Any = UNSET) -> Row:
    return field(TERecipeKwargs, name, text, value, "--fp8_backend", "te")


def _mesh(name: str, *around: str, make: Callable[[], Any] = ParallelismConfig, text: str = UNSET) -> Row:
    return field(make, name, text, UNSET, "--use_parallelism_config", *around)


_SECOND = ("--fsdp_version", "2")
_WIDE = ("--num_machines", "2", "--num_processes", "2", "--main_process_ip", "10.0.0.1")
_HOSTS = ("--use_deepspeed", *_WIDE, "--deepspeed_hostfile", "hosts")
_POD = {"tpu_name": "v4", "tpu_zone": "us-central1"}
_AROUND_POD = ("--tpu", "--tpu_cluster")
_SP = ("--parallelism_config_sp_size", "2")
_AT_LEAST_TWO = ("--num_processes", "2")

_MEGATRON = (
    "tp_degree", "use_custom_fsdp", "no_load_optim", "eod_mask_loss", "overlap_cpu_optimizer_d2h_h2d", "no_save_optim",
    "optimizer_cpu_offload", "use_precision_aware_optimizer", "decoder_last_pipeline_num_layers", "pp_degree",
    "num_micro_batches", "sequence_parallelism", "recompute_activations", "use_distributed_optimizer",
    "gradient_clipping", "recompute_num_layers", "expert_model_parallel_size", "context_parallel_size",
    "attention_dropout", "hidden_dropout", "expert_tensor_parallel_size",
)  # fmt: skip
# Options whose sample must be another one, because the plugin's default is not the launcher's.
_MEGATRON_TEXTS = {
    "recompute_granularity": "selective",
    "recompute_method": "block",
    "attention_backend": "flash",
    "attention_softmax_in_fp32": "false",
    "calculate_per_token_loss": "false",
    "use_rotary_position_embeddings": "false",
}

ROWS: dict[str, Row] = {
    "module": has("-m", "--cpu"),
    "no_python": Row(lambda end: end.plan.command[0] == "train.py", around=("--cpu",)),
    "debug": Row(debug),
    "cpu": Row(lambda _: env.flag("ACCELERATE_USE_CPU"), file={"distributed_type": "NO"}),
    "multi_gpu": Row(
        lambda end: resolve_settings(end.settings, HostInfo("cpu", 0, 2, None, "", ("python",))).device == "cuda",
        file={"distributed_type": "NO"},
    ),
    "tpu": Row(lambda end: end.plan.launcher == "tpu", around=("--main_training_function", "main")),
    "ipex": note("--ipex"),
    "use_xpu": note("--use_xpu"),
    "mixed_precision": Row(lambda _: precision(), "bf16"),
    "num_processes": after("--nproc_per_node", "3"),
    "num_machines": after("--nnodes", "2", "--main_process_ip", "10.0.0.1"),
    "num_cpu_threads_per_process": Row(
        lambda end: end.plan.environment.get("OMP_NUM_THREADS"), "3", "3"
    ),  # torch reads it
    "enable_cpu_affinity": Row(affinity),
    "gpu_ids": Row(lambda end: end.plan.environment.get("CUDA_VISIBLE_DEVICES"), "1", "1"),  # CUDA reads it
    "same_network": Row(lambda end: "--master_addr" in end.plan.command, around=_WIDE),
    "machine_rank": after("--node_rank", "1", *_WIDE),
    "main_process_ip": after("--rdzv_endpoint", "10.0.0.2", *_WIDE[:4], value="10.0.0.2:29500", other="10.0.0.9"),
    "main_process_port": after("--master_port", "1234", *_AT_LEAST_TWO),
    "tee": after("--tee", "3", *_AT_LEAST_TWO),
    "log_dir": after("--log_dir", "logs", *_AT_LEAST_TWO),
    "role": after("--role", "trainer", *_AT_LEAST_TWO),
    "rdzv_backend": after("--rdzv_backend", "c10d", *_WIDE),
    "rdzv_conf": after("--rdzv_conf", "timeout=7", *_AT_LEAST_TWO),
    "max_restarts": after("--max_restarts", "2", *_AT_LEAST_TWO),
    "monitor_interval": after("--monitor_interval", "0.5", *_AT_LEAST_TWO),
    # Ways of distributing
    "use_fsdp": Row(kind, value="FSDP"),
    "use_deepspeed": Row(kind, value="DEEPSPEED"),
    "use_megatron_lm": Row(kind, value="MEGATRON_LM"),
    # torch.compile
    "dynamo_backend": field(TorchDynamoPlugin, "backend", "eager", "EAGER"),
    "dynamo_mode": field(TorchDynamoPlugin, "mode", "max-autotune"),
    "dynamo_use_fullgraph": field(TorchDynamoPlugin, "fullgraph"),
    "dynamo_use_dynamic": field(TorchDynamoPlugin, "dynamic"),
    "dynamo_use_regional_compilation": field(TorchDynamoPlugin, "use_regional_compilation"),
    # TPUs
    "tpu_use_cluster": Row(lambda end: end.plan.launcher == "tpu-pod", around=("--tpu",), file=_POD),
    "tpu_use_sudo": Row(lambda end: "sudo" in " ".join(end.plan.command), around=_AROUND_POD, file=_POD),
    "vm": Row(lambda end: "a-vm" in end.plan.command, "a-vm", True, _AROUND_POD, _POD, ["b-vm"]),
    "env": Row(lambda end: "A=1" in " ".join(end.plan.command), "A=1", True, _AROUND_POD, _POD, ["B=2"]),
    "main_training_function": after("--function", "start", "--tpu"),
    "downcast_bf16": Row(
        lambda end: "XLA_DOWNCAST_BF16" in end.plan.environment, around=("--tpu", "--mixed_precision", "bf16")
    ),
    # DeepSpeed
    "zero_stage": _deepspeed("zero_stage", "3"),
    "offload_optimizer_device": _deepspeed("offload_optimizer_device", "cpu"),
    "offload_param_device": _deepspeed("offload_param_device", "cpu"),
    "offload_optimizer_nvme_path": _deepspeed("offload_optimizer_nvme_path", "/nvme"),
    "offload_param_nvme_path": _deepspeed("offload_param_nvme_path", "/nvme"),
    "gradient_accumulation_steps": Row(lambda _: resolve_args.gradient_accumulation(None, 1).num_steps, "4"),
    "gradient_clipping": _deepspeed("gradient_clipping", "0.5"),
    "zero3_init_flag": _deepspeed("zero3_init_flag", "true"),
    "zero3_save_16bit_model": _deepspeed("zero3_save_16bit_model", "true"),
    "deepspeed_moe_layer_cls_names": _deepspeed("transformer_moe_cls_names", "A,B"),
    "deepspeed_hostfile": after("--hostfile", "other", *_HOSTS[:-2], other="hosts"),
    "deepspeed_exclusion_filter": after("--exclude", "a:1", *_HOSTS),
    "deepspeed_inclusion_filter": after("--include", "a:1", *_HOSTS),
    "deepspeed_multinode_launcher": after("--launcher", "openmpi", *_HOSTS, other="pdsh"),
    # FSDP
    "fsdp_version": _fsdp("fsdp_version", "2"),
    "fsdp_offload_params": _fsdp("cpu_offload", "true"),
    "fsdp_min_num_params": _fsdp("min_num_params", "77", 77, "--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP"),
    "fsdp_sharding_strategy": _fsdp("sharding_strategy", "SHARD_GRAD_OP"),
    "fsdp_reshard_after_forward": _fsdp("reshard_after_forward", "false", False, *_SECOND),
    "fsdp_auto_wrap_policy": _fsdp(
        "auto_wrap_policy", "SIZE_BASED_WRAP", "size_based_auto_wrap_policy", other="NO_WRAP"
    ),
    "fsdp_transformer_layer_cls_to_wrap": _fsdp(
        "transformer_cls_names_to_wrap", "A,B", ["A", "B"], "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"
    ),
    "fsdp_backward_prefetch": _fsdp("backward_prefetch", "BACKWARD_POST", other="BACKWARD_PRE"),
    "fsdp_state_dict_type": _fsdp("state_dict_type", "SHARDED_STATE_DICT", other="LOCAL_STATE_DICT"),
    "fsdp_forward_prefetch": _fsdp("forward_prefetch", "true"),
    "fsdp_use_orig_params": _fsdp("use_orig_params", "false"),
    "fsdp_cpu_ram_efficient_loading": _fsdp("cpu_ram_efficient_loading", "false"),
    "fsdp_sync_module_states": _fsdp("sync_module_states", "false", False, "--fsdp_cpu_ram_efficient_loading", "false"),
    "fsdp_activation_checkpointing": _fsdp("activation_checkpointing", "true"),
    "fsdp_activation_checkpointing_offload": _fsdp(
        "activation_checkpointing_offload", "true", True, "--fsdp_activation_checkpointing", "true"
    ),
    "fsdp_ignored_modules": _fsdp("ignored_modules", "head.*"),
    # Megatron-LM
    **{f"megatron_lm_{name}": field(MegatronLMPlugin, name, UNSET, UNSET, "--use_megatron_lm") for name in _MEGATRON},
    **{
        f"megatron_lm_{name}": field(MegatronLMPlugin, name, text, UNSET, "--use_megatron_lm")
        for name, text in _MEGATRON_TEXTS.items()
    },
    # FP8
    "fp8_backend": field(FP8RecipeKwargs, "backend", "msamp", "MSAMP", other="te"),
    "fp8_use_autocast_during_eval": _te("use_autocast_during_eval"),
    "fp8_margin": _te("margin"),
    "fp8_interval": _te("interval"),
    "fp8_format": _te("fp8_format", "E4M3"),
    "fp8_amax_history_len": _te("amax_history_len"),
    "fp8_amax_compute_algo": _te("amax_compute_algo", "max"),
    "fp8_override_linear_precision": _te("override_linear_precision", "true,false,true"),
    "fp8_use_mxfp8_block_scaling": _te("use_mxfp8_block_scaling"),
    "fp8_opt_level": field(FP8RecipeKwargs, "opt_level", "O1", UNSET, "--fp8_backend", "msamp"),
    "fp8_enable_fsdp_float8_all_gather": field(
        float8, "enable_fsdp_float8_all_gather", "false", UNSET, "--fp8_backend", "ao"
    ),
    "fp8_pad_inner_dim": field(float8, "pad_inner_dim", "false", UNSET, "--fp8_backend", "ao"),
    # Amazon SageMaker
    "aws_access_key_id": Row(
        lambda end: credentials(end.settings).get("AWS_ACCESS_KEY_ID"), "an-id", around=("--aws_secret_access_key", "x")
    ),
    "aws_secret_access_key": Row(
        lambda end: credentials(end.settings).get("AWS_SECRET_ACCESS_KEY"), "a-key", around=("--aws_access_key_id", "x")
    ),
    # mpirun
    "mpirun_hostfile": after("--hostfile", "hosts", "--cpu"),
    "mpirun_ccl": Row(
        lambda end: end.plan.environment.get("CCL_WORKER_COUNT"), "2", "2", ("--mpirun_hostfile", "hosts")
    ),
    # The mesh
    "parallelism_config_dp_replicate_size": _mesh("dp_replicate_size"),
    "parallelism_config_dp_shard_size": _mesh("dp_shard_size"),
    "parallelism_config_tp_size": _mesh("tp_size"),
    "parallelism_config_cp_size": _mesh("cp_size"),
    "parallelism_config_sp_size": _mesh("sp_size"),
    "parallelism_config_cp_comm_strategy": _mesh(
        "cp_comm_strategy", "--parallelism_config_cp_size", "2", make=TorchContextParallelConfig, text="alltoall"
    ),
    "parallelism_config_sp_seq_length": _mesh("sp_seq_length", *_SP, make=DeepSpeedSequenceParallelConfig),
    "parallelism_config_sp_seq_length_is_variable": _mesh(
        "sp_seq_length_is_variable",
        *_SP,
        "--parallelism_config_sp_seq_length",
        "64",
        make=DeepSpeedSequenceParallelConfig,
    ),  # fmt: skip
    "parallelism_config_sp_attn_implementation": _mesh(
        "sp_attn_implementation", *_SP, make=DeepSpeedSequenceParallelConfig, text="flash_attention_2"
    ),
}


def precision() -> str:
    """What a run computes in, as the state finds it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        return AcceleratorState(cpu=True).mixed_precision
    finally:
        AcceleratorState._reset_state(True)


# Options that change what the launcher itself does: option -> its module that asks for it, and the tests that look at it.
LAUNCHERS_OWN = {
    "config_file": ("launch/parse.py", "tests/unit/launch/test_every_flag.py"),
    "quiet": ("launch/run.py", "tests/cli/test_launch.py"),
    "dry_run": ("launch/run.py", "tests/cli"),
}
# Options of which there is one choice: nothing can be told apart at the far end, but the field is read.
ONE_CHOICE = {
    "parallelism_config_cp_backend": (ParallelismConfig, "cp_backend"),
    "parallelism_config_sp_backend": (ParallelismConfig, "sp_backend"),
}
