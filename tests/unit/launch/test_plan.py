"""Plans as values: what each flag puts into the child's environment and command, for every way of starting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerate.launch.parse import parse, split_args
from accelerate.launch.plan import LaunchPlan, build_plan, plan, select_launcher
from accelerate.settings.launcher import LaunchSettings
from accelerate.settings.option import OptionSpec, SettingsError, option_specs
from tests.unit.launch.test_parse import as_flags, other_value

DATA = Path(__file__).resolve().parents[2] / "data"
FACTS: dict[str, dict[str, Any]] = json.loads((DATA / "launcher_environment.json").read_text())
CASES = [
    pytest.param(facts["argv"], flag, {**facts["env"], **extra}, id=f"{name} {flag}".strip())
    for name, facts in FACTS.items()
    for flag, extra in [("", {}), *facts["by_flag"].items()]
]
# Observed with values that mean nothing (xval, 7): a name that is no choice is refused.
REFUSED = {
    "--offload_optimizer_device xval",
    "--offload_param_device xval",
    "--zero3_init_flag xval",
    "--zero3_save_16bit_model xval",
    "--zero_stage 7",
    "--fsdp_auto_wrap_policy xval",
    "--fsdp_backward_prefetch xval",
    "--fsdp_sharding_strategy xval",
    "--fsdp_state_dict_type xval",
    "--megatron_lm_attention_softmax_in_fp32 xval",
    "--megatron_lm_calculate_per_token_loss xval",
    "--megatron_lm_recompute_activations xval",
    "--megatron_lm_recompute_granularity xval",
    "--megatron_lm_recompute_method xval",
    "--megatron_lm_sequence_parallelism xval",
    "--megatron_lm_use_distributed_optimizer xval",
    "--megatron_lm_use_rotary_position_embeddings xval",
}
# A flag that changes neither command nor environment, and who reads it instead.
NOT_IN_A_PLAN = {
    "config_file": "read while parsing",
    "quiet": "the launcher's own lines",
    "dry_run": "prints the plan instead of starting it",
    "multi_gpu": "one process per GPU is the default where there are several",
    "ipex": "accepted without effect, with a note",
    "use_xpu": "accepted without effect, with a note",
    "aws_access_key_id": "told to the libraries of AWS, in the launcher only",
    "aws_secret_access_key": "told to the libraries of AWS, in the launcher only",
}


@pytest.fixture(autouse=True)
def no_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))


@pytest.mark.parametrize(("argv", "flag", "expected"), CASES)
def test_the_childs_environment(argv: list[str], flag: str, expected: dict[str, str]) -> None:
    words = [*argv, *flag.split(), "script.py"]
    if flag in REFUSED:
        with pytest.raises(SettingsError, match=flag.split()[0]):
            plan(words)
        return
    expected = {name: value for name, value in expected.items() if name != "OMP_NUM_THREADS" or "cpu_threads" in flag}
    environment = plan(words).environment
    assert {name: environment.get(name) for name in expected} == expected


def contexts(entry: OptionSpec) -> list[list[str]]:
    """Command lines on which an option may matter."""
    paradigm = entry.section.enabled_by if entry.section is not None else None
    lines = [["--num_processes", "2"], ["--num_processes", "1"]]
    lines.append(["--num_processes", "4", "--num_machines", "2", "--main_process_ip", "10.0.0.1"])
    lines.append([*lines[-1], "--use_deepspeed", "--deepspeed_hostfile", "H"])
    lines.append(["--num_processes", "4", "--main_process_ip", "10.0.0.1"])
    lines.append(["--tpu", "--mixed_precision", "bf16"])
    lines += [["--tpu", "--vm", "machine"], ["--tpu", "--tpu_cluster", "--vm", "machine"]]
    lines += [[*lines[0], "--parallelism_config_cp_size", "2", "--use_parallelism_config"]]
    lines += [[*lines[0], "--parallelism_config_sp_size", "2", "--use_parallelism_config"]]
    if paradigm is not None:
        lines += [
            [*lines[0], f"--{paradigm}", *({"fp8_backend": ["te"], "mpirun_hostfile": ["hosts"]}.get(paradigm, []))]
        ]
    return [line for line in lines if paradigm not in ("aws_access_key_id",)]


@pytest.mark.parametrize("entry", option_specs(LaunchSettings), ids=lambda entry: entry.dest)
def test_a_flag_changes_the_plan(entry: OptionSpec) -> None:
    value = {
        "mpirun_ccl": "3",
        "dynamo_backend": "inductor",
        "num_processes": 6,
        "num_machines": 2,
        "env": ("A=b",),
    }.get(entry.dest, other_value(entry))
    if entry.dest == "machine_rank":
        value = 1
    if len(entry.option.choices) == 1:
        return  # there is nothing to choose yet

    def same(line: list[str]) -> bool:
        try:
            return _essence(plan([*line, *as_flags(entry, value), "s.py"])) == _essence(plan([*line, "s.py"]))
        except SettingsError:  # this line and this flag do not go together
            return True

    unread = all(same(line) for line in contexts(entry)) if entry.dest != "config_file" else True
    assert unread == (entry.dest in NOT_IN_A_PLAN), NOT_IN_A_PLAN.get(entry.dest, "nothing reads this flag")


def _essence(made: LaunchPlan) -> tuple[Any, ...]:
    return made.launcher, made.command, made.environment, made.parallel_commands


@pytest.mark.parametrize(
    ("flags", "starter", "command"),
    [
        ("--num_processes 1", "python", "PY s.py a"),
        ("--num_processes 1 -m", "python", "PY -m s.py a"),
        ("--num_processes 1 --no_python", "python", "s.py a"),
        (
            "--cpu --num_processes 2",
            "torch",
            "PY -m torch.distributed.run --nnodes 1 --nproc_per_node 2 --master_addr 127.0.0.1 --master_port 29500 s.py a",
        ),
        (
            "--num_processes 2 --main_process_port 7 --max_restarts 3 --tee 3 -m",
            "torch",
            (
                "PY -m torch.distributed.run --nnodes 1 --nproc_per_node 2 --master_addr 127.0.0.1 --master_port 7 --tee 3 "
                "--max_restarts 3 --module s.py a"
            ),
        ),
        (
            "--num_processes 4 --num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29600",
            "torch",
            (
                "PY -m torch.distributed.run --nnodes 2 --nproc_per_node 2 --node_rank 1 --rdzv_backend static "
                "--rdzv_endpoint 10.0.0.1:29600 s.py a"
            ),
        ),
        (
            "--num_processes 4 --num_machines 2 --main_process_ip 10.0.0.1 --same_network",
            "torch",
            (
                "PY -m torch.distributed.run --nnodes 2 --nproc_per_node 2 --node_rank 0 --rdzv_backend static "
                "--master_addr 10.0.0.1 --master_port 29500 s.py a"
            ),
        ),
        (
            "--use_fsdp --num_processes 1",
            "torch",
            "PY -m torch.distributed.run --nnodes 1 --nproc_per_node 1 --master_addr 127.0.0.1 --master_port 29500 s.py a",
        ),
        (
            (
                "--use_deepspeed --num_processes 4 --num_machines 2 --deepspeed_hostfile H --main_process_ip 10.0.0.1 "
                "--main_process_port 29600"
            ),
            "deepspeed",
            (
                "deepspeed --hostfile H --no_local_rank --launcher pdsh --num_gpus 2 --master_addr 10.0.0.1 "
                "--master_port 29600 s.py a"
            ),
        ),
        (
            "--num_processes 2 --mpirun_hostfile H",
            "mpirun",
            "mpirun --hostfile H --npernode 2 -n 2 --bind-to socket PY s.py a",
        ),
        ("--tpu", "tpu", "PY -m accelerate.launch.engines.tpu_worker --function main s.py a"),
        ("--tpu --num_processes 1", "tpu", "PY s.py a"),
    ],
)
def test_commands(flags: str, starter: str, command: str) -> None:
    made = build_plan(parse([*flags.split(), "s.py", "a"]).replace(python=("PY",)))
    assert (made.launcher, " ".join(made.command)) == (starter, command)


def test_ranks_print_without_a_buffer_and_take_the_interpreters_options() -> None:
    settings = parse(["--num_processes", "2", "s.py", "a"]).replace(python=("PY", "-X", "dev"))
    assert build_plan(settings).worker == ("PY", "-X", "dev", "-u", "s.py", "a")
    assert build_plan(settings.replace(num_processes=1)).worker == ("PY", "-X", "dev", "s.py", "a")


def test_several_cpu_processes_meet_on_the_loopback() -> None:
    settings = parse(["--cpu", "--num_processes", "2", "s.py"]).replace(interface="lo", threads=4)
    made = build_plan(settings)
    assert made.environment["ACCELERATE_USE_CPU"] == "True"
    assert made.environment["GLOO_SOCKET_IFNAME"] == "lo" and "KMP_AFFINITY" not in made.environment
    assert made.overridable >= {"GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"}
    assert "GLOO_SOCKET_IFNAME" not in build_plan(settings.replace(num_processes=1)).environment
    gpus = build_plan(settings.replace(cpu=False, device="cuda")).environment
    assert gpus["GLOO_SOCKET_IFNAME"] == gpus["NCCL_SOCKET_IFNAME"] == "lo"
    far = build_plan(
        settings.replace(num_machines=2, main_process_ip="10.0.0.1", interface="eth1", device="cuda", cpu=False)
    )
    assert far.environment["GLOO_SOCKET_IFNAME"] == "eth1" and "NCCL_SOCKET_IFNAME" not in far.environment


def test_a_rendezvous_that_was_named_counts_on_one_machine_too() -> None:
    command = plan(
        ["--cpu", "--num_processes", "2", "--rdzv_backend", "c10d", "--main_process_port", "1", "s.py"]
    ).command
    assert " ".join(command).endswith("--rdzv_backend c10d --rdzv_endpoint 127.0.0.1:1 s.py")


def test_a_value_that_is_there_wins_over_a_default_only() -> None:
    settings = parse(["--num_processes", "1", "s.py"]).replace(threads=4)
    assert build_plan(settings).merged_environment({"OMP_NUM_THREADS": "9"})["OMP_NUM_THREADS"] == "9"
    assert build_plan(settings).merged_environment({"A": "1"}) == {"A": "1", **build_plan(settings).environment}
    chosen = settings.replace(num_cpu_threads_per_process=2)
    assert build_plan(chosen).merged_environment({"OMP_NUM_THREADS": "9"})["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(
    ("device", "variable"),
    [("cuda", "CUDA_VISIBLE_DEVICES"), ("xpu", "ZE_AFFINITY_MASK"), ("npu", "ASCEND_RT_VISIBLE_DEVICES")],
)
def test_devices_are_hidden_by_their_own_variable(device: str, variable: str) -> None:
    settings = parse(["--gpu_ids", "1,3", "s.py"]).replace(device=device)
    assert build_plan(settings).environment[variable] == "1,3"
    assert variable not in build_plan(settings.replace(gpu_ids="all")).environment


def test_fp8_variables_only_where_fp8_is_used() -> None:
    made = plan(["--mixed_precision", "fp8", "--fp8_override_linear_precision", "true,false,true", "s.py"]).environment
    assert made["ACCELERATE_FP8_MARGIN"] == "0" and made["ACCELERATE_FP8_FORMAT"] == "HYBRID"
    assert [made[f"ACCELERATE_FP8_OVERRIDE_{name}"] for name in ("FPROP", "DGRAD", "WGRAD")] == [
        "true",
        "false",
        "true",
    ]
    assert not [name for name in plan(["s.py"]).environment if "FP8" in name]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "no script given"),
        ("-m --no_python s.py", "--module and --no_python contradict"),
        ("--num_processes 3 --num_machines 2 --main_process_ip h s.py", "cannot be shared evenly by 2 machines"),
        ("--num_processes 2 --machine_rank 1 s.py", "numbered 0 to 0"),
        ("--num_processes 4 --num_machines 2 s.py", "--main_process_ip"),
        ("--num_processes 2 --main_process_port 70000 s.py", "at most 65535"),
        ("--num_machines 2 --main_process_ip h --main_process_port 0 s.py", "cannot guess"),
    ],
)
def test_contradictions_are_refused(words: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        plan(words.split())


@given(st.lists(st.sampled_from(["--cpu", "--debug", "--use_fsdp", "--num_processes=2", "--mixed_precision=bf16"])))
def test_building_is_a_function_of_the_settings(flags: list[str]) -> None:
    words = split_args([*flags, "s.py"])
    settings = LaunchSettings(script=words.script)
    before = repr(settings)
    assert build_plan(settings) == build_plan(LaunchSettings(script=words.script))
    assert repr(settings) == before
    assert select_launcher(settings) == "python"


def test_an_address_of_version_6_stands_in_brackets() -> None:
    words = ["--num_machines", "2", "--num_processes", "2", "--rdzv_backend", "c10d", "--main_process_ip"]
    assert "[fd77::1]:29500" in plan([*words, "fd77::1", "s.py"]).command
    assert "first:29500" in plan([*words, "first", "s.py"]).command


@pytest.mark.parametrize(
    ("words", "starter"),
    [
        ([], "python"),
        (["--num_processes", "1"], "python"),
        (["--num_processes", "2"], "torch"),
        (["--max_restarts", "1"], "torch"),  # who becomes the script cannot start it again
        (["--use_fsdp"], "torch"),
    ],
)
def test_who_starts_a_single_process(words, starter):
    assert plan([*words, "train.py"]).launcher == starter
