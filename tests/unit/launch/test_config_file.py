"""The configuration file: its keys, the keys of earlier releases, its mistakes, and what a flag does to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from accelerate.commands.config import ClusterConfig, SageMakerConfig, load_config_from_file
from accelerate.launch import config_file
from accelerate.launch.parse import merge_settings, parse
from accelerate.launch.plan import build_plan
from accelerate.settings.launcher import LaunchSettings
from accelerate.settings.option import OptionSpec, SettingsError, option_specs
from tests.unit.launch.test_parse import other_value


def written(folder: Path, content: Any, name: str = "config.yaml") -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def launched(folder: Path, content: Any, *flags: str) -> LaunchSettings:
    return parse(["--config_file", written(folder, content), *flags, "s.py"])


def in_a_file(entry: OptionSpec, value: Any) -> dict[str, Any]:
    """`value` where it lies in a file."""
    plain = list(value) if isinstance(value, tuple) else value
    key = entry.section.key if entry.section is not None else None
    return {entry.key: plain} if key is None else {key: {entry.key: plain}}


@pytest.mark.parametrize("entry", option_specs(LaunchSettings), ids=lambda entry: entry.dest)
def test_a_key_means_what_its_flag_means(entry: OptionSpec, tmp_path: Path) -> None:
    value = {"dynamo_backend": "inductor", "parallelism_config_sp_backend": "deepspeed"}.get(
        entry.dest, other_value(entry)
    )
    content = {"distributed_type": "MULTI_GPU", "num_processes": 2, **in_a_file(entry, value)}
    if entry.dest in (
        "config_file",
        "quiet",
        "module",
        "no_python",
        "dry_run",
    ):  # about one command, not about the machine
        with pytest.raises(SettingsError, match=f"unknown key {entry.dest}"):
            launched(tmp_path, content)
        return
    if entry.option.secret:
        with pytest.raises(SettingsError, match=f"{entry.dest}: secrets do not belong in this file"):
            launched(tmp_path, content)
        return
    assert entry.get(launched(tmp_path, content)) == value


def test_flag_then_file_then_default(tmp_path: Path) -> None:
    content = {
        "distributed_type": "FSDP",
        "mixed_precision": "bf16",
        "num_processes": 4,
        "fsdp_config": {"fsdp_version": 2, "fsdp_use_orig_params": False},
    }
    settings = launched(tmp_path, content, "--num_processes", "2", "--fsdp_use_orig_params", "true")
    assert (settings.num_processes, settings.mixed_precision, settings.use_fsdp) == (2, "bf16", True)
    assert (settings.fsdp.version, settings.fsdp.use_orig_params, settings.fsdp.min_num_params) == (
        2,
        True,
        100_000_000,
    )


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("NO", {"num_processes": 1}),
        ("MULTI_CPU", {"cpu": True, "device": "cpu"}),
        ("MULTI_GPU", {"multi_gpu": True, "device": "cuda"}),
        ("MULTI_XPU", {"multi_gpu": True, "device": "xpu"}),
        ("FSDP", {"use_fsdp": True}),
        ("DEEPSPEED", {"use_deepspeed": True}),
        ("MEGATRON_LM", {"use_megatron_lm": True}),
        ("XLA", {"tpu": True}),
        ("TPU", {"tpu": True}),
    ],
)
def test_what_distributed_type_stands_for(kind: str, changed: dict[str, Any], tmp_path: Path) -> None:
    settings = launched(tmp_path, {"distributed_type": kind, "num_processes": 8})
    expected = {"num_processes": 8, "cpu": False, "multi_gpu": False, "use_fsdp": False, "tpu": False, **changed}
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [("", None), ({"compute_environment": "LOCAL_MACHINE", "debug": True}, None), ({"num_processes": 3}, 3)],
)
def test_a_file_may_leave_the_way_of_distributing_open(content: Any, said: int | None, tmp_path: Path) -> None:
    settings = launched(tmp_path, content)
    assert (settings.num_processes, settings.cpu, settings.multi_gpu) == (said, False, False)
    assert launched(tmp_path, content, "--cpu", "--num_processes", "2").num_processes == 2


def test_numbers_of_the_documentation_stand_for_choices(tmp_path: Path) -> None:
    numbers = {"fsdp_state_dict_type": 3, "fsdp_auto_wrap_policy": 1, "fsdp_backward_prefetch_policy": "2"}
    fsdp = launched(tmp_path, {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": numbers}).fsdp
    assert fsdp.state_dict_type == "SHARDED_STATE_DICT" and fsdp.auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
    assert fsdp.backward_prefetch == "BACKWARD_POST"


def test_flags_overrule_distributed_type(tmp_path: Path) -> None:
    alone = {"distributed_type": "NO", "num_processes": 8, "use_cpu": True}
    assert launched(tmp_path, alone, "--num_processes", "2").num_processes == 2
    assert not launched(tmp_path, alone, "--multi_gpu").cpu
    engine = {"distributed_type": "DEEPSPEED", "num_processes": 2}
    assert not launched(tmp_path, engine, "--use_fsdp").use_deepspeed
    assert launched(tmp_path, engine, "--cpu").use_deepspeed
    assert not launched(tmp_path, {"distributed_type": "MULTI_GPU", "num_processes": 2}, "--cpu").multi_gpu


def test_a_bare_no_is_a_word(tmp_path: Path) -> None:
    text = "distributed_type: NO\nmixed_precision: no\ndowncast_bf16: 'no'\ndynamo_backend: NO\ngpu_ids: 0,1\n"
    settings = launched(tmp_path, text)
    assert (settings.num_processes, settings.mixed_precision) == (1, "no")
    assert settings.gpu_ids == "0,1" and settings.dynamo.backend == "no" and not settings.tpus.downcast_bf16


def test_keys_of_earlier_releases(tmp_path: Path) -> None:
    content = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_CPU",
        "num_processes": -1,
        "dynamo_backend": "INDUCTOR",
        "ipex_config": {"ipex": True},
        "mpirun_config": {"mpirun_ccl": "1", "mpirun_hostfile": "hosts"},
        "fsdp_config": {"fsdp_backward_prefetch_policy": "BACKWARD_PRE", "fsdp_cpu_offload": True},
        "fp8_config": {
            "amax_compute_algorithm": "max",
            "amax_history_length": 3,
            "backend": "TE",
            "fp8_format": "E4M3",
            "override_linear_precision": False,
            "opt_level": "O1",
        },
        "megatron_lm_config": {},
        "deepspeed_config": None,
        "tpu_env": [],
        "command_file": None,
        "commands": None,
    }
    settings = launched(tmp_path, content)
    assert settings.num_processes is None
    assert settings.dynamo.backend == "inductor" and settings.ipex
    assert (settings.mpirun.ccl, settings.mpirun.hostfile) == ("1", "hosts")
    assert (settings.fsdp.backward_prefetch, settings.fsdp.offload_params) == ("BACKWARD_PRE", True)
    fp8 = settings.fp8
    assert (fp8.amax_compute_algo, fp8.amax_history_len, fp8.backend, fp8.format) == ("max", 3, "te", "E4M3")
    assert fp8.override_linear_precision == (False, False, False) and fp8.opt_level == "O1"


def test_the_fields_that_deepspeed_got_from_the_file_are_told(tmp_path: Path) -> None:
    section = {"zero_stage": 3, "gradient_accumulation_steps": 2, "deepspeed_config_file": "ds.json"}
    settings = launched(tmp_path, {"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": section})
    environment = build_plan(settings).environment
    fields = environment["ACCELERATE_CONFIG_DS_FIELDS"].split(",")
    assert sorted(fields) == ["gradient_accumulation_steps", "zero_stage"]
    assert environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == "ds.json"


def test_a_mesh_in_the_file_is_used(tmp_path: Path) -> None:
    content = {"distributed_type": "FSDP", "num_processes": 4, "parallelism_config": {"parallelism_config_tp_size": 2}}
    settings = launched(tmp_path, content)
    assert settings.use_parallelism_config and settings.parallelism.tp_size == 2
    assert not launched(tmp_path, {**content, "parallelism_config": {}}).use_parallelism_config


def test_json_is_read_as_well(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps({"distributed_type": "MULTI_CPU", "num_processes": 3}), "config.json")
    assert parse(["--config_file", path, "s.py"]).num_processes == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("distributed_type: [", "is not valid yaml"),
        ("just words", "expected keys and values"),
        ("- a\n- b\n", "expected keys and values"),
        ("1: 2\n", "expected a word as key, found 1"),
        ({"fsdp_config": {"fsdp_version": 2}}, "but the key is missing. Its sections are about FSDP"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, "distributed_type: expected one of NO, DATA_PARALLEL"),
        ({"distributed_type": "MULTI"}, "found 'MULTI'"),
        ({"distributed_type": "NO", "compute_environment": "CLOUD"}, "compute_environment: expected LOCAL_MACHINE"),
        ({"distributed_type": "NO", "num_procesess": 1}, "unknown key num_procesess. Did you mean num_processes?"),
        ({"distributed_type": "NO", "num_processes": "two"}, "num_processes: expected a whole number, found 'two'"),
        ({"distributed_type": "NO", "num_processes": 0}, "num_processes: expected at least 1"),
        ({"distributed_type": "NO", "mixed_precision": "fp15"}, "mixed_precision: expected one of"),
        ({"distributed_type": "NO", "use_cpu": "perhaps"}, "use_cpu: expected true or false"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_versoin": 2}}, "fsdp_config.fsdp_versoin. Did you mean"),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 3}},
            "fsdp_config.fsdp_version: expected one of 1, 2",
        ),
        ({"distributed_type": "FSDP", "fsdp_config": [1]}, "fsdp_config: expected keys and values of its own"),
        ({"distributed_type": "FSDP", "fsdp_config": {3: 1}}, "unknown key fsdp_config.3"),
    ],
)
def test_a_mistake_names_file_and_key(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        launched(tmp_path, content)
    assert message in str(caught.value) and str(tmp_path / "config.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        parse(["--config_file", str(tmp_path / "none.yaml"), "s.py"])
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\x00")
    with pytest.raises(SettingsError, match=r"binary\.yaml: is not valid yaml"):
        parse(["--config_file", str(tmp_path / "binary.yaml"), "s.py"])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(SettingsError, match=r"broken\.json"):
        parse(["--config_file", str(tmp_path / "broken.json"), "s.py"])


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates()
keys = st.text() | st.sampled_from([key for entry in option_specs(LaunchSettings) for key in entry.keys])
sections = st.sampled_from(["fsdp_config", "deepspeed_config", "fp8_config", "dynamo_config", "mpirun_config"])
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))
kinds = st.fixed_dictionaries({"distributed_type": st.sampled_from(["NO", "FSDP", "MULTI_CPU"])})


@given(st.dictionaries(keys | sections, values, max_size=5), kinds | st.just({}))
def test_whatever_a_file_holds_is_settings_or_one_message(content: dict[str, Any], kind: dict[str, str]) -> None:
    try:
        file = config_file.parse_content({**content, **kind}, "the/file.yaml")
        merge_settings({}, file, "s.py", ())
    except SettingsError as error:
        assert "the/file.yaml" in str(error)


# Where the file is ---------------------------------------------------------------------------------------------------


def test_the_default_file_is_searched_where_documented(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_file.default_path() == str(tmp_path / ".cache/huggingface/accelerate/default_config.yaml")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert config_file.default_path() == str(tmp_path / "xdg/huggingface/accelerate/default_config.yaml")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert config_file.default_path() == str(tmp_path / "hf/accelerate/default_config.yaml")
    assert config_file.load_config(None) is None
    (tmp_path / "hf/accelerate").mkdir(parents=True)
    Path(config_file.default_path()).write_text("distributed_type: MULTI_CPU\nnum_processes: 5\n")
    assert parse(["s.py"]).num_processes == 5


# As objects ----------------------------------------------------------------------------------------------------------


def test_a_file_as_an_object(tmp_path: Path) -> None:
    content = {
        "distributed_type": "FSDP",
        "num_processes": 2,
        "fsdp_config": {"fsdp_version": 2},
        "downcast_bf16": "no",
    }
    config = load_config_from_file(written(tmp_path, content))
    assert isinstance(config, ClusterConfig)
    assert config.to_dict()["fsdp_config"] == {"fsdp_version": 2}
    assert config.to_dict()["distributed_type"] == "FSDP" and config.downcast_bf16 is False
    assert "gpu_ids" not in config.to_dict()  # keys without a value are left out
    config.to_yaml_file(tmp_path / "again.yaml")
    config.to_json_file(tmp_path / "again.json")
    assert load_config_from_file(tmp_path / "again.yaml") == config
    assert ClusterConfig.from_json_file(tmp_path / "again.json") == config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json", "again.yaml", "config.yaml"]


def test_a_sagemaker_file_as_an_object(tmp_path: Path) -> None:
    content = {
        "compute_environment": "AMAZON_SAGEMAKER",
        "distributed_type": "DATA_PARALLEL",
        "ec2_instance_type": "ml.p3.16xlarge",
        "iam_role_name": "role",
    }
    config = load_config_from_file(written(tmp_path, content))
    assert isinstance(config, SageMakerConfig) and config.region == "us-east-1"
    with pytest.raises(ValueError, match="iam_role_name"):
        load_config_from_file(written(tmp_path, {**content, "iam_role_name": ""}))


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml"):
        load_config_from_file(tmp_path / "nothing.yaml")
