"""The table of questions: documented answers give documented files, and every path a file that launch reads."""

from __future__ import annotations

import json
import os.path
import random
from collections.abc import Iterator
from typing import Any

import pytest

from accelerate.commands.config import questions
from accelerate.commands.config.flow import Answers, QuestionGroup
from accelerate.commands.config.prompts import Prompt, answer
from accelerate.commands.config.questionnaire import fill_in
from accelerate.commands.config.routing_questions import ENTRIES, MACHINES, RoutingQuestions
from accelerate.launch import config_file, config_io
from accelerate.launch.parse import merge_settings
from accelerate.launch.plan import build_plan
from accelerate.settings.clouds import SageMakerSettings, TpuCommandSettings
from accelerate.settings.launcher import LaunchSettings
from accelerate.settings.option import SettingsError, option_specs
from tests.helpers.questionnaire import ALWAYS, CASES, EXAMPLES, Case, Typist, flat

TABLES = {"LOCAL_MACHINE": questions.LOCAL, "AMAZON_SAGEMAKER": questions.SAGEMAKER}


def filled_in(answers: dict[str, Any]) -> dict[str, Any]:
    typist = Typist(answers)
    content, _ = fill_in(typist)
    assert not typist.unasked(), typist.unasked()
    return content


# The documented questionnaires ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.example)
def test_the_documented_file_comes_out(case: Case) -> None:
    assert flat(filled_in(case.answers)) == case.expected


def test_every_example_is_compared() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == {case.example for case in CASES}


# What no document shows ----------------------------------------------------------------------------------------------

DEVICE = {"use_cpu": False, "mixed_precision": "no"}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing but Enter": ({}, {"distributed_type": "NO", "mixed_precision": "no"}),
    "one GPU by its number": (
        {"gpu_ids": "1", "mixed_precision": "FP16"},
        {"distributed_type": "NO", "gpu_ids": "1", "mixed_precision": "fp16"},
    ),
    "several machines that are not on one network": (
        {
            "machine": "multi-GPU",
            "num_machines": "2",
            "machine_rank": "1",
            "main_process_ip": "node0",
            "main_process_port": "1234",
            "same_network": "no",
            "rdzv_backend": "c10d",
            "debug": "yes",
            "num_processes": "8",
            "gpu_ids": "0, 1,2,3",
            "enable_cpu_affinity": "y",
        },
        {
            "distributed_type": "MULTI_GPU",
            "num_machines": 2,
            "machine_rank": 1,
            "main_process_ip": "node0",
            "main_process_port": 1234,
            "same_network": False,
            "rdzv_backend": "c10d",
            "debug": True,
            "num_processes": 8,
            "gpu_ids": "0,1,2,3",
            "enable_cpu_affinity": True,
            "mixed_precision": "no",
        },
    ),
    "torch dynamo": (
        {
            "cpu": "yes",
            "dynamo": "yes",
            "dynamo_details": "yes",
            "dynamo_mode": "2",
            "dynamo_use_fullgraph": "on",
            "dynamo_use_dynamic": "no",
            "dynamo_use_regional_compilation": "yes",
        },
        {
            "distributed_type": "NO",
            "use_cpu": True,
            "dynamo_config.dynamo_backend": "INDUCTOR",
            "dynamo_config.dynamo_mode": "max-autotune",
            "dynamo_config.dynamo_use_fullgraph": True,
            "dynamo_config.dynamo_use_dynamic": False,
            "dynamo_config.dynamo_use_regional_compilation": True,
            "mixed_precision": "no",
        },
    ),
    "DeepSpeed on several machines": (
        {
            "machine": "multi-GPU",
            "num_machines": "2",
            "main_process_ip": "node0",
            "use_deepspeed": "yes",
            "zero_stage": "3",
            "offload_optimizer_device": "nvme",
            "offload_optimizer_nvme_path": "/fast",
            "offload_param_device": "nvme",
            "moe": "yes",
            "deepspeed_moe_layer_cls_names": "JetMoEAttention,JetMoEBlock",
            "deepspeed_multinode_launcher": "slurm",
            "deepspeed_hostfile": "/job/hosts",
            "inclusion": "yes",
            "deepspeed_inclusion_filter": "worker-0@worker-1:0,2",
            "num_processes": "4",
        },
        {
            "distributed_type": "DEEPSPEED",
            "num_machines": 2,
            "main_process_ip": "node0",
            "main_process_port": 29500,
            "num_processes": 4,
            "deepspeed_config.zero_stage": 3,
            "deepspeed_config.offload_optimizer_device": "nvme",
            "deepspeed_config.offload_optimizer_nvme_path": "/fast",
            "deepspeed_config.offload_param_device": "nvme",
            "deepspeed_config.offload_param_nvme_path": "/nvme",
            "deepspeed_config.gradient_accumulation_steps": 1,
            "deepspeed_config.zero3_save_16bit_model": False,
            "deepspeed_config.zero3_init_flag": False,
            "deepspeed_config.deepspeed_moe_layer_cls_names": "JetMoEAttention,JetMoEBlock",
            "deepspeed_config.deepspeed_multinode_launcher": "slurm",
            "deepspeed_config.deepspeed_hostfile": "/job/hosts",
            "deepspeed_config.deepspeed_inclusion_filter": "worker-0@worker-1:0,2",
            "mixed_precision": "no",
        },
    ),
    "FSDP version 2 with a device mesh": (
        {
            "machine": "multi-XPU (Intel)",
            "use_fsdp": "yes",
            "fsdp_version": "2",
            "fsdp_reshard_after_forward": "false",
            "fsdp_auto_wrap_policy": "SIZE_BASED_WRAP",
            "fsdp_min_num_params": "2000",
            "fsdp_cpu_ram_efficient_loading": "no",
            "fsdp_activation_checkpointing": "yes",
            "use_parallelism_config": "yes",
            "parallelism_config_dp_replicate_size": "2",
            "parallelism_config_dp_shard_size": "2",
            "parallelism_config_cp_size": "2",
            "parallelism_config_cp_comm_strategy": "alltoall",
        },
        {
            "distributed_type": "FSDP",
            "num_processes": 8,  # the default is one for each place of the mesh
            "fsdp_config.fsdp_version": 2,
            "fsdp_config.fsdp_reshard_after_forward": False,
            "fsdp_config.fsdp_offload_params": False,
            "fsdp_config.fsdp_auto_wrap_policy": "SIZE_BASED_WRAP",
            "fsdp_config.fsdp_min_num_params": 2000,
            "fsdp_config.fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_config.fsdp_cpu_ram_efficient_loading": False,
            "fsdp_config.fsdp_activation_checkpointing": True,
            "parallelism_config.parallelism_config_dp_replicate_size": 2,
            "parallelism_config.parallelism_config_dp_shard_size": 2,
            "parallelism_config.parallelism_config_tp_size": 1,
            "parallelism_config.parallelism_config_cp_size": 2,
            "parallelism_config.parallelism_config_cp_comm_strategy": "alltoall",
            "mixed_precision": "no",
        },
    ),
    "a pod of TPUs": (
        {
            "machine": "TPU",
            "main_training_function": "train",
            "tpu_use_cluster": "yes",
            "tpu_name": "mine",
            "tpu_zone": "us-central1-a",
            "tpu_use_sudo": "yes",
            "tpu_vms": "yes",
            "vm": ["first", "second", ""],
            "tpu_variables": "yes",
            "env": ["A=1", ""],
            "tpu_install": "yes",
            "tpu_startup": "yes",
            "commands": ["cd /data", "ls, or so", ""],
            "mixed_precision": "bf16",
            "downcast_bf16": "yes",
        },
        {
            "distributed_type": "XLA",
            "main_training_function": "train",
            "num_processes": 8,
            "tpu_use_cluster": True,
            "tpu_use_sudo": True,
            "tpu_name": "mine",
            "tpu_zone": "us-central1-a",
            "tpu_vm": ["first", "second"],
            "tpu_env": ["A=1"],
            "commands": ["pip install --upgrade accelerate", "cd /data", "ls, or so"],
            "mixed_precision": "bf16",
            "downcast_bf16": "yes",
        },
    ),
    "FP8 with torchao": (
        {"machine": "multi-GPU", "mixed_precision": "fp8", "fp8_backend": "ao", "fp8_pad_inner_dim": "no"},
        {
            "distributed_type": "MULTI_GPU",
            "mixed_precision": "fp8",
            "fp8_config.backend": "AO",
            "fp8_config.enable_fsdp_float8_all_gather": True,
            "fp8_config.pad_inner_dim": False,
        },
    ),
    "a device of each other kind": (
        {"machine": "multi-HPU (Gaudi)", "num_processes": "8"},
        {"distributed_type": "MULTI_HPU", "num_processes": 8, "mixed_precision": "no"},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_document_shows(name: str) -> None:
    answers, expected = OTHERS[name]
    assert flat(filled_in(answers)) == {**ALWAYS, "compute_environment": "LOCAL_MACHINE", **expected}


def test_sagemaker_with_everything() -> None:
    answers = {
        "compute_environment": "1",
        "authorization": "keys",
        "region": "eu-west-1",
        "iam_role": "create",
        "aws_access_key_id": "AKIA-mine",
        "aws_secret_access_key": "very secret",
        "image": "yes",
        "image_uri": "here/image:1",
        "inputs": "yes",
        "sagemaker_inputs_file": "inputs.tsv",
        "metrics": "yes",
        "sagemaker_metrics_file": "metrics.tsv",
        "sagemaker_mode": "data parallelism",
        "num_machines": "2",
        "debug": "yes",
        "dynamo": "yes",
    }
    content = filled_in(answers)
    assert "secret" not in str(content) and "AKIA" not in str(content)
    assert content == {
        "base_job_name": "accelerate-sagemaker-1",
        "compute_environment": "AMAZON_SAGEMAKER",
        "debug": True,
        "distributed_type": "DATA_PARALLEL",
        "dynamo_config": {"dynamo_backend": "INDUCTOR"},
        "ec2_instance_type": "ml.p3.16xlarge",
        "iam_role_name": "accelerate_sagemaker_execution_role",
        "image_uri": "here/image:1",
        "mixed_precision": "no",
        "num_machines": 2,
        "py_version": "py38",
        "pytorch_version": "1.10.2",
        "region": "eu-west-1",
        "sagemaker_inputs_file": "inputs.tsv",
        "sagemaker_metrics_file": "metrics.tsv",
        "transformers_version": "4.17.0",
        "use_cpu": False,
    }


def test_paths_that_launch_must_find_are_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    content = filled_in({"machine": "multi-CPU", "mpirun": "yes"})
    assert content["mpirun_config"] == {"mpirun_ccl": "1", "mpirun_hostfile": "/home/user/hostfile"}


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"machine": "multi-GPU", "num_machines": "2", "machine_rank": "2"}, "machine_rank: expected a number from 0 to 1"),
        ({"machine": "multi-GPU", "num_machines": "2", "main_process_ip": "a b"}, "expected a name or an address"),
        ({"machine": "multi-GPU", "num_machines": "2", "main_process_ip": ""}, "main_process_ip: an answer is needed"),
        (
            {"machine": "multi-GPU", "num_machines": "2", "main_process_ip": "a", "main_process_port": "70000"},
            "expected a number from 1 to 65535, found 70000",
        ),
        (
            {"machine": "multi-GPU", "num_machines": "2", "main_process_ip": "a", "num_processes": "3"},
            "num_processes: expected a multiple of 2, for the machines.*, found 3",
        ),
        (
            {"machine": "multi-GPU", "use_megatron_lm": "yes", "megatron_lm_tp_degree": "4", "num_processes": "2"},
            "expected a multiple of 4, for the .*stages and tensor parallel ranks",
        ),
        (
            {
                "machine": "multi-GPU",
                "use_parallelism_config": "yes",
                "parallelism_config_tp_size": "4",
                "num_processes": "8",
            },
            "num_processes: the sizes of the device mesh multiply to 4, found 8",
        ),
        ({"machine": "multi-CPU", "mpirun": "yes", "mpirun_ccl": "no"}, "mpirun_ccl: expected a whole number above 0"),
        ({"gpu_ids": "0 1"}, "gpu_ids: expected numbers separated by commas"),
        ({"machine": "TPU", "tpu_use_cluster": "yes", "tpu_name": "a", "tpu_zone": "b", "tpu_variables": "yes", "env": "A"},
         "env: expected NAME=value, found 'A'"),
        ({"machine": "multi-GPU", "num_machines": "many"}, "num_machines: expected a whole number, found 'many'"),
        ({"machine": "multi-GPU", "num_machines": "0"}, "num_machines: expected at least 1, found '0'"),
        ({"cpu": "perhaps"}, "cpu: expected yes or no, found 'perhaps'"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be(answers: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        filled_in(answers)


# The table itself ----------------------------------------------------------------------------------------------------


def rows(areas: tuple[QuestionGroup, ...]) -> Iterator[tuple[str, set[str]]]:
    """Each question, and the answers it depends on."""
    for area in areas:
        if area.gate is not None:
            yield area.gate, set(area.when)
        for question in area.questions:
            yield question.name, {*area.when, *question.when}


@pytest.mark.parametrize("environment", TABLES)
def test_conditions_are_about_earlier_answers(environment: str) -> None:
    earlier: set[str] = set()
    for name, needed in rows((*questions.FIRST, *TABLES[environment])):
        assert needed <= earlier, f"{name} waits for {needed - earlier}"
        earlier.add(name)


def test_every_question_has_a_row_and_every_row_a_question() -> None:
    listed = {name for areas in (questions.FIRST, *TABLES.values()) for name, _ in rows(areas)}
    assert listed == {name for name, entry in ENTRIES.items() if entry.option.ask is not None}


def test_every_documented_question_is_there() -> None:
    documented = json.loads((EXAMPLES / "questionnaire_keys.json").read_text(encoding="utf-8"))
    asked: dict[str, set[str]] = {}
    for entry in ENTRIES.values():
        if entry.option.ask is not None:
            section = entry.section.key or "" if entry.section is not None else ""
            asked.setdefault(section, set()).update(entry.keys)
    assert not {f"{section}.{key}" for section, keys in documented.items() for key in keys if key not in asked[section]}


def test_every_kind_of_device_can_be_chosen() -> None:
    from accelerate.runtime.devices import DEVICES
    from accelerate.settings.enums import DistributedType

    assert {kind.distributed_type.value for kind in DEVICES.values()} == set(MACHINES)
    assert set(MACHINES) <= {kind.value for kind in DistributedType}


def test_attention_that_can_share_a_sequence() -> None:
    from accelerate.settings.parallel import DeepSpeedSequenceParallelConfig

    name = "parallelism_config_sp_attn_implementation"
    [row] = [question for question in questions.PARALLELISM.questions if question.name == name]
    for choice in row.choices:
        DeepSpeedSequenceParallelConfig(sp_attn_implementation=choice)
    with pytest.raises(ValueError, match=", ".join(row.choices)):
        DeepSpeedSequenceParallelConfig(sp_attn_implementation="eager")


def test_names_mean_one_thing() -> None:
    kinds = (LaunchSettings, SageMakerSettings, TpuCommandSettings, RoutingQuestions)
    assert len(ENTRIES) == sum(len(option_specs(kind)) for kind in kinds)


def test_no_question_is_wider_than_two_lines() -> None:
    for entry in ENTRIES.values():
        assert len(entry.option.ask or "") <= 130, entry.option.ask


# Every path ----------------------------------------------------------------------------------------------------------

TEXTS = {
    "gpu_ids": "all",
    "main_process_ip": "10.0.0.1",
    "env": "A=1",
    "mpirun_ccl": "3",
    "num_machines": "2",
    "machine_rank": "1",
    "num_processes": "",
    "parallelism_config_tp_size": "2",
    "parallelism_config_cp_size": "2",
    "parallelism_config_sp_size": "2",
    "fp8_override_linear_precision": "yes,no,yes",
}


class Wanderer:
    """Answers at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.asked: set[str] = set()

    def __call__(self, prompt: Prompt) -> Any:
        self.asked.add(prompt.name)
        return answer(prompt, self._line(prompt))

    def _line(self, prompt: Prompt) -> str:
        if prompt.choices:
            return str(self.random.choice(prompt.choices).value)
        if prompt.hint in ("yes/NO", "YES/no", "yes/no"):
            return self.random.choice(["yes", "no"])
        typed = TEXTS.get(prompt.name, "7" if ENTRIES[prompt.name].type in ("int", "float") else "word")
        may_be_empty = prompt.default is not None
        return "" if may_be_empty and self.random.random() < 0.5 else typed


def wander(seed: int) -> tuple[dict[str, Any], Answers, set[str]]:
    wanderer = Wanderer(seed)
    content, answers = fill_in(wanderer)
    return content, answers, wanderer.asked


def test_every_path_gives_a_file_that_says_the_same_to_launch() -> None:
    asked: set[str] = set()
    for seed in range(1500):
        content, answers, some = wander(seed)
        asked |= some
        if seed % 10 == 0:
            assert config_io.parse(config_io.dump(content).encode()) == content
        file = config_file.parse_content(content, "config.yaml")
        settings = merge_settings({}, file, "script.py", ())
        build_plan(settings)
        for entry in option_specs(LaunchSettings):
            if entry.dest in answers and not entry.option.secret:
                said = answers[entry.dest]
                if entry.dest == "gpu_ids" and said == "all":
                    said = None  # what a file without the key means
                elif isinstance(said, str):
                    said = os.path.expanduser(said)
                assert entry.get(settings) == said, (seed, entry.dest, answers)
    assert asked == {name for name, entry in ENTRIES.items() if entry.option.ask is not None}
