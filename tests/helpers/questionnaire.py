"""The questionnaires of the documentation: what was answered, and the file that must come out of it.

The files in `tests/data/config` are the documented examples, letter for letter. They come from several releases; what
changed since is listed with each, so that the rest is compared key by key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from accelerate.commands.config.prompts import Prompt, answer

EXAMPLES = Path(__file__).resolve().parents[1] / "data" / "config"

# What every file holds by now; earlier releases left some of it out.
ALWAYS = {
    "debug": False,
    "downcast_bf16": "no",
    "enable_cpu_affinity": False,
    "machine_rank": 0,
    "main_training_function": "main",
    "num_machines": 1,
    "num_processes": 1,
    "rdzv_backend": "static",
    "same_network": True,
    "tpu_env": [],
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": False,
}


class Case(NamedTuple):
    """One questionnaire.

    Attributes:
        example: The documented file, in tests/data/config.
        answers: What is typed, by the name of the question; Enter for all others.
        newer: Keys that the example is too old for, and their values: by "section.key", or "key".
        renamed: Keys that have another name by now.
        gone: Keys of the example that are not written, and why.
    """

    example: str
    answers: dict[str, Any]
    newer: dict[str, Any] = {}
    renamed: dict[str, str] = {}
    gone: dict[str, str] = {}

    @property
    def expected(self) -> dict[str, Any]:
        """The file, as it must come out."""
        text = (EXAMPLES / f"{self.example}.yaml").read_text(encoding="utf-8")
        documented = flat(yaml.safe_load(text))
        assert documented.keys() >= {*self.renamed, *self.gone}, "not in the example"
        assert not documented.keys() & self.newer.keys(), "in the example"
        sagemaker = documented.get("compute_environment") == "AMAZON_SAGEMAKER"
        found: dict[str, Any] = {} if sagemaker else {**ALWAYS, "compute_environment": "LOCAL_MACHINE"}
        found.update({self.renamed.get(key, key): value for key, value in documented.items() if key not in self.gone})
        return {**found, **self.newer}


def flat(content: dict[str, Any]) -> dict[str, Any]:
    """Keys and values, with "section.key" for what lies in a section; null and empty sections say nothing."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found.update({f"{key}.{inner}": inner_value for inner, inner_value in value.items()})
        elif value is not None:
            found[key] = value
    return found


class Typist:
    """A prompter that types what a case says, and keeps what it was asked."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.left = {name: list(text) if isinstance(text, list) else [text] for name, text in answers.items()}
        self.asked: list[tuple[Prompt, str]] = []

    def __call__(self, prompt: Prompt) -> Any:
        typed = self.left.get(prompt.name)
        line = typed.pop(0) if typed else ""
        self.asked.append((prompt, line))
        return answer(prompt, line)

    def unasked(self) -> list[str]:
        """Answers that no question was asked for."""
        return [name for name, typed in self.left.items() if typed]


_DEEPSPEED = {"machine": "multi-GPU", "use_deepspeed": "yes", "zero3_init_flag": "yes", "num_processes": "2"}
_IPEX = {"ipex_config.ipex": "IPEX has been taken into PyTorch: there is nothing to switch on"}
_OWN_FILE = {"mixed_precision": "DeepSpeed's own file says it, and the guide's later example leaves it out"}
_TEMPLATES = "/home/ubuntu/accelerate/examples/configs/deepspeed_config_templates"

CASES = [
    Case(
        "fsdp_1",
        {
            "machine": "multi-GPU",
            "use_fsdp": "yes",
            "fsdp_version": "1",
            "no_split_modules": "no",
            "fsdp_transformer_layer_cls_to_wrap": "BertLayer",
            "num_processes": "2",
            "mixed_precision": "bf16",
        },
        newer={"fsdp_config.fsdp_version": 1, "fsdp_config.fsdp_activation_checkpointing": False},
        renamed={"fsdp_config.fsdp_backward_prefetch_policy": "fsdp_config.fsdp_backward_prefetch"},
    ),
    Case(
        "fsdp_2",
        {
            "machine": "multi-GPU",
            "use_fsdp": "yes",
            "fsdp_version": "2",
            "no_split_modules": "no",
            "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
            "num_processes": "4",
            "mixed_precision": "bf16",
        },
        renamed={"fsdp_config.fsdp_cpu_offload": "fsdp_config.fsdp_offload_params"},
    ),
    Case("deepspeed_zero_2", {**_DEEPSPEED, "clipping": "yes", "mixed_precision": "fp16"}),
    Case(
        "deepspeed_zero_3",
        {
            **_DEEPSPEED,
            "zero_stage": "3",
            "offload_optimizer_device": "cpu",
            "offload_param_device": "cpu",
            "clipping": "yes",
            "zero3_save_16bit_model": "yes",
            "mixed_precision": "fp16",
        },
    ),
    Case(
        "deepspeed_file_zero_2",
        {
            **_DEEPSPEED,
            "deepspeed_file": "yes",
            "deepspeed_config_file": f"{_TEMPLATES}/zero_stage2_config.json",
        },
        gone=_OWN_FILE,
    ),
    Case(
        "deepspeed_file_zero_3",
        {
            **_DEEPSPEED,
            "deepspeed_file": "yes",
            "deepspeed_config_file": f"{_TEMPLATES}/zero_stage3_offload_config.json",
        },
        gone=_OWN_FILE,
    ),
    Case(
        "deepspeed_file",
        {**_DEEPSPEED, "deepspeed_file": "yes", "deepspeed_config_file": "ds_config.json", "num_processes": "4"},
        gone={"dynamo_backend": "no is what a file without dynamo_config means"},
    ),
    Case(
        "megatron_lm",
        {
            "machine": "2",
            "use_megatron_lm": "yes",
            "megatron_lm_tp_degree": "2",
            "megatron_lm_pp_degree": "2",
            "megatron_lm_num_micro_batches": "2",
            "num_processes": "4",
            "mixed_precision": "bf16",
        },
    ),
    Case(
        "sagemaker",
        {
            "compute_environment": "1",
            "profile": "xxxxx",
            "iam_role_name": "xxxxx",
            "sagemaker_mode": "1",
            "mixed_precision": "fp16",
        },
        newer={"debug": False},
    ),
    Case("one_cpu", {"cpu": "yes", "mixed_precision": "bf16"}, gone=_IPEX),
    Case(
        "cpus_with_mpirun",
        {
            "machine": "multi-CPU",
            "num_machines": "4",
            "machine_rank": "0",
            "main_process_ip": "36.112.23.24",
            "main_process_port": "29500",
            "same_network": "yes",
            "mpirun": "yes",
            "mpirun_hostfile": "/home/user/hostfile",
            "mpirun_ccl": "1",
            "num_processes": "16",
            "mixed_precision": "bf16",
        },
        gone=_IPEX,
    ),
    Case(
        "fp8_te",
        {"machine": "multi-GPU", "num_processes": "2", "mixed_precision": "fp8", "fp8_backend": "te"},
        newer={"distributed_type": "MULTI_GPU", "num_processes": 2},
    ),
    Case(
        "fp8_msamp",
        {"machine": "multi-GPU", "num_processes": "2", "mixed_precision": "fp8", "fp8_backend": "MS-AMP"},
        newer={"distributed_type": "MULTI_GPU", "num_processes": 2},
    ),
    Case("two_gpus", {"machine": "multi-GPU", "num_processes": "2", "mixed_precision": "fp16"}),
]
