"""Files of earlier releases brought up to date: each old key by its name, comments kept, nothing lost."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from accelerate.commands.config.rewrite import rewritten
from accelerate.commands.config.update import migrate, update_config
from accelerate.launch.config_file import default_path
from accelerate.launch.parse import parse
from accelerate.settings.option import SettingsError

CURRENT: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "distributed_type": "MULTI_GPU",
    "downcast_bf16": False,
    "enable_cpu_affinity": False,
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "fp16",
    "num_machines": 1,
    "num_processes": 1,
    "rdzv_backend": "static",
    "same_network": False,
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": False,
}
# What a file of an earlier release holds, what it holds then, and what is said.
MIGRATIONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "extension of Intel": ({"ipex_config": {"ipex": True, "use_xpu": False}}, {}, "ipex_config: removed"),
    "compiler at the top": (
        {"dynamo_backend": "INDUCTOR"},
        {"dynamo_config": {"dynamo_backend": "INDUCTOR"}},
        "dynamo_backend: renamed, it is dynamo_config.dynamo_backend today",
    ),
    "compiler at the top and below": (
        {"dynamo_backend": "INDUCTOR", "dynamo_config": {"dynamo_mode": "default"}},
        {"dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_mode": "default"}},
        "dynamo_backend: renamed",
    ),
    "compiler without prefix": (
        {"dynamo_config": {"backend": "EAGER"}},
        {"dynamo_config": {"dynamo_backend": "EAGER"}},
        "dynamo_config.backend: renamed, it is dynamo_config.dynamo_backend today",
    ),
    "misspelt compiler": (
        {"dynamo_config": {"dynamo_backend": "TORHCHXLA_TRACE_ONCE"}},
        {"dynamo_config": {"dynamo_backend": "torchxla_trace_once"}},
        "dynamo_config.dynamo_backend: TORHCHXLA_TRACE_ONCE is torchxla_trace_once today",
    ),
    "prefetch policy": (
        {"fsdp_config": {"fsdp_backward_prefetch_policy": "BACKWARD_PRE"}},
        {"fsdp_config": {"fsdp_backward_prefetch": "BACKWARD_PRE"}},
        "fsdp_config.fsdp_backward_prefetch_policy: renamed, it is fsdp_config.fsdp_backward_prefetch today",
    ),
    "offload": (
        {"fsdp_config": {"fsdp_cpu_offload": True}},
        {"fsdp_config": {"fsdp_offload_params": True}},
        "fsdp_config.fsdp_cpu_offload: renamed, it is fsdp_config.fsdp_offload_params today",
    ),
    "offload in two ways": (
        {"fsdp_config": {"fsdp_offload_params": True, "fsdp_cpu_offload": None}},
        {"fsdp_config": {"fsdp_offload_params": True}},
        "fsdp_config.fsdp_cpu_offload: renamed",
    ),
    "strategy by number": (
        {"fsdp_config": {"fsdp_sharding_strategy": 2}},
        {"fsdp_config": {"fsdp_sharding_strategy": "SHARD_GRAD_OP"}},
        "fsdp_config.fsdp_sharding_strategy: 2 is SHARD_GRAD_OP today",
    ),
    "shards without prefix": (
        {"fsdp_config": {"min_num_params": 2000, "sharding_strategy": "1"}},
        {"fsdp_config": {"fsdp_min_num_params": 2000, "fsdp_sharding_strategy": "FULL_SHARD"}},
        "fsdp_config.min_num_params: renamed",
    ),
    "processes not said": ({"num_processes": -1}, {}, "num_processes: -1 removed"),
    "TPU": ({"distributed_type": "TPU"}, {"distributed_type": "XLA"}, "distributed_type: TPU is XLA today"),
    "MPS": ({"distributed_type": "MPS"}, {"distributed_type": "NO"}, "distributed_type: MPS is NO today"),
    "flag's name for a key": ({"vm": ["a"]}, {"tpu_vm": ["a"]}, "vm: renamed, it is tpu_vm today"),
    "mesh without prefix": (
        {"parallelism_config": {"tp_size": 2}},
        {"parallelism_config": {"parallelism_config_tp_size": 2}},
        "parallelism_config.tp_size: renamed",
    ),
}
# Documented spellings that stay as they are.
UNCHANGED: dict[str, dict[str, Any]] = {
    "fp8, long names": {
        "fp8_config": {
            "amax_compute_algorithm": "max",
            "amax_history_length": 1024,
            "backend": "TE",
            "fp8_format": "HYBRID",
            "interval": 1,
            "margin": 0,
            "override_linear_precision": False,
            "use_autocast_during_eval": False,
        }
    },
    "fp8, MS-AMP": {"fp8_config": {"backend": "MSAMP", "opt_level": "O2"}},
    "mpirun": {"mpirun_config": {"mpirun_ccl": "1", "mpirun_hostfile": "/home/user/hostfile"}},
    "DeepSpeed": {
        "deepspeed_config": {"deepspeed_config_file": "ds.json", "zero3_init_flag": True},
        "distributed_type": "DEEPSPEED",
    },
    "Megatron-LM": {"megatron_lm_config": {"megatron_lm_tp_degree": 2, "megatron_lm_sequence_parallelism": True}},
    "nothing": {"command_file": None, "commands": None, "tpu_name": None, "fsdp_config": {}, "downcast_bf16": "no"},
}


@pytest.mark.parametrize("name", MIGRATIONS)
def test_an_old_key_is_migrated_and_named(name: str) -> None:
    old, new, said = MIGRATIONS[name]
    without = {key: value for key, value in CURRENT.items() if key not in old}
    content, changes = migrate({**without, **old}, "the/file")
    assert content == {**without, **new}
    assert any(change.startswith(said) for change in changes), changes
    assert migrate(content, "the/file") == (content, ())


@pytest.mark.parametrize("name", UNCHANGED)
def test_a_documented_spelling_stays(name: str) -> None:
    content = {**CURRENT, **UNCHANGED[name]}
    assert migrate(content, "the/file") == (content, ())


def updated(path: Path) -> Path:
    return update_config(argparse.Namespace(config_file=str(path)))


def test_a_file_of_today_is_left_byte_for_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"# mine\r\n" + yaml.safe_dump(CURRENT).encode().replace(b"\n", b"\r\n"))
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    assert updated(path) == path
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, stamp)
    assert capsys.readouterr().out == f"{path} is up to date and was left as it is\n"


OLD = """\
# the group's machine
compute_environment: LOCAL_MACHINE
distributed_type: FSDP  # sharded

fsdp_config:
  # as in the paper
  fsdp_sharding_strategy: 1
  fsdp_backward_prefetch_policy: BACKWARD_PRE  # early
  fsdp_transformer_layer_cls_to_wrap: 'BertLayer'
ipex_config:
  ipex: true
mixed_precision: 'no'
num_processes: 2
# that is all
"""


def test_comments_order_and_quotes_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(OLD)
    path.chmod(0o640)
    before = parse(["--config_file", str(path), "s.py"])
    updated(path)
    lines = path.read_text().splitlines()
    assert lines[:10] == [
        "# the group's machine",
        "compute_environment: LOCAL_MACHINE",
        "debug: false",
        "distributed_type: FSDP  # sharded",
        "downcast_bf16: false",
        "enable_cpu_affinity: false",
        "",
        "fsdp_config:",
        "  # as in the paper",
        "  fsdp_sharding_strategy: FULL_SHARD",
    ]
    assert "  fsdp_backward_prefetch: BACKWARD_PRE  # early" in lines and "mixed_precision: 'no'" in lines
    assert "  fsdp_transformer_layer_cls_to_wrap: 'BertLayer'" in lines and "# that is all" in lines
    assert "could not be kept" not in capsys.readouterr().out
    assert path.stat().st_mode & 0o777 == 0o640
    after = parse(["--config_file", str(path), "s.py"])
    assert after.replace(ipex=True, machine_rank=None, num_machines=None) == before.replace(
        fsdp=after.fsdp, tpus=after.tpus, config_file=after.config_file
    )
    assert before.fsdp.replace(sharding_strategy="FULL_SHARD") == after.fsdp


def test_the_comment_of_a_key_that_goes_goes_with_it() -> None:
    text = "# top\na: 1\n# about b\nb: 2  # behind b\nfsdp_backward_prefetch_policy: NO  # early\nc: 3  # behind c\n# end\n"
    wanted = {"a": 1, "z": 9, "fsdp_backward_prefetch": "NO", "y": 8}
    made = rewritten(text.encode(), wanted, as_json=False)
    assert made == ("# top\na: 1\nz: 9\nfsdp_backward_prefetch: 'NO'  # early\ny: 8\n# end\n", True)
    made = rewritten(b"b: 2  # behind b\nc: 3\n", {"n": 2, "c": 3}, as_json=False, renamed={"b": "n"})
    assert made.text == "n: 2  # behind b\nc: 3\n"


def test_where_comments_cannot_be_kept_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("{distributed_type: NO,  # alone\n num_processes: 1}\n")
    updated(path)
    assert capsys.readouterr().out.endswith("comments in the file could not be kept\n")
    assert parse(["--config_file", str(path), "s.py"]).num_processes == 1


def test_json_stays_json_and_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(json.dumps({"distributed_type": "TPU", "num_processes": 8}))
    os.symlink("real.json", tmp_path / "c.json")
    updated(tmp_path / "c.json")
    content = json.loads((tmp_path / "real.json").read_text())
    assert (content["distributed_type"], content["num_processes"]) == ("XLA", 8)
    assert (tmp_path / "c.json").is_symlink() and len(list(tmp_path.iterdir())) == 2


def test_unknown_keys_are_told_at_once_and_the_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("distributed_type: NO\nnum_procs: 2\nfsdp_config: {fsdp_verison: 1}\nzzz: 1\n")
    with pytest.raises(SettingsError) as caught:
        updated(path)
    assert str(caught.value).splitlines() == [
        f"configuration file {path} has 3 problems:",
        "  unknown key num_procs. Did you mean num_processes?",
        "  unknown key fsdp_config.fsdp_verison. Did you mean fsdp_version?",
        "  unknown key zzz.",
    ]
    assert path.read_text().startswith("distributed_type: NO\nnum_procs: 2")


def test_an_amazon_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "compute_environment: AMAZON_SAGEMAKER\ndistributed_type: DATA_PARALLEL\nec2_instance_type: ml.p3.16xlarge\n"
        "iam_role_name: xxxxx\nprofile: xxxxx\n"
    )
    updated(path)
    content = yaml.safe_load(path.read_text())
    assert (content["region"], content["num_machines"], content["profile"]) == ("us-east-1", 1, "xxxxx")
    assert "aws" not in path.read_text() and "num_processes" not in content


def test_the_default_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(SettingsError, match="does not exist"):
        update_config(argparse.Namespace(config_file=None))
    Path(default_path()).parent.mkdir(parents=True)
    Path(default_path()).write_text("distributed_type: NO\n")
    assert update_config(argparse.Namespace(config_file=None)) == Path(default_path())
    assert yaml.safe_load(Path(default_path()).read_text())["rdzv_backend"] == "static"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1",
        "{}\n",
        "a: 1\nb:\n  c: 2\n...\n",
        "? a\n: 1\n",
        "--- {a: 1}\n",
        "b: |\n  x\n  # y\na: 1\n",
        "a:\n- 1\n- 2\nb: 3\n",
    ],
)
def test_whatever_the_layout_the_content_is_what_was_asked_for(text: str) -> None:
    wanted = {"a": 5, "b": {"c": "x # y", "d": [1, 2]}, "e": None}
    assert yaml.safe_load(rewritten(text.encode(), wanted, as_json=False).text) == wanted
