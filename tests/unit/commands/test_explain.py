"""What `accelerate config explain` says of each value, and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from accelerate.commands.config.config import main
from accelerate.commands.config.explain import Row, _as_json, _table, explain
from accelerate.settings.launcher import LaunchSettings
from accelerate.settings.option import option_specs
from tests.helpers.slurm import task

FILE = """\
distributed_type: FSDP
num_processes: 2
use_cpu: true
mixed_precision: bf16
dynamo_backend: INDUCTOR
fsdp_config:
  fsdp_version: 2
  fsdp_cpu_offload: true
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "c.yaml").write_text(FILE)


def rows(*words: str) -> dict[str, Row]:
    return {row.entry.dest: row for row in explain(words).rows}


def sources(found: dict[str, Row], *names: str) -> list[tuple[Any, str, str]]:
    return [(found[name].value, found[name].source, found[name].detail) for name in names]


def test_each_value_has_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # launch overrules it
    found = rows(
        "--config_file", "c.yaml", "--fsdp_version", "1", "--role", "default", "script.py", "--num_processes", "9"
    )
    names = ("fsdp_version", "role", "fsdp_offload_params", "use_fsdp", "dynamo_backend", "mixed_precision")
    assert sources(found, *names) == [
        (1, "flag", ""),
        ("default", "flag", ""),
        (True, "file", "fsdp_config.fsdp_cpu_offload"),
        (True, "file", "distributed_type FSDP"),
        ("inductor", "file", "dynamo_backend"),
        ("bf16", "file", "mixed_precision"),
    ]
    names = ("gradient_accumulation_steps", "num_processes", "max_restarts")
    assert sources(found, *names) == [
        ("4", "variable", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
        (2, "file", "num_processes"),
        (0, "default", ""),
    ]
    assert found["num_cpu_threads_per_process"].source == "machine"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert sources(rows("--cpu"), "num_cpu_threads_per_process") == [("7", "variable", "OMP_NUM_THREADS")]


def test_without_flags_and_file_the_machine_decides() -> None:
    found = rows("--cpu")
    assert sources(found, "cpu", "num_processes") == [(True, "flag", ""), (1, "machine", "")]
    assert {row.entry for row in found.values()} >= set(option_specs(LaunchSettings))


def test_what_slurm_says_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in task(1, [1, 1]).items():
        monkeypatch.setenv(name, value)
    found = rows("--cpu", "--main_process_port", "29600")
    assert sources(found, "num_machines", "machine_rank") == [(2, "machine", "SLURM"), (1, "machine", "SLURM")]
    assert sources(found, "main_process_ip", "main_process_port") == [
        ("node01", "machine", "SLURM"),
        (29600, "flag", ""),
    ]


def test_the_table_fits_and_shows_what_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    long = "--megatron_lm_use_precision_aware_optimizer"
    words = ["--config_file", "c.yaml", long, "true", "--rdzv_conf", "a=" + "b" * 90, "script.py"]
    main(["explain", *words])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    lines = [line.split() for line in text.splitlines()]
    assert ["starts", "2", "processes", "on", "cpu,", "through", "torch.distributed.run"] in lines
    assert ["FSDP", "Arguments"] in lines and ["mixed_precision", "bf16", "file"] in lines
    assert ["fsdp_offload_params", "true", "file:", "fsdp_cpu_offload"] in lines
    assert not any(line[:1] == ["max_restarts"] for line in lines)
    main(["explain", "--all", *words])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"  {entry.dest}" in text for entry in option_specs(LaunchSettings))


def test_for_programs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    main(["explain", "--json", "--config_file", "c.yaml", "--aws_secret_access_key", "sesame", "script.py"])
    text = capsys.readouterr().out
    found = json.loads(text)
    assert found["config_file"] == "c.yaml" and found["starter"] == "torch" and found["command"][-1] == "script.py"
    assert found["environment"]["OMP_NUM_THREADS"] == "7" and found["environment"]["FSDP_VERSION"] == "2"
    assert found["values"]["mixed_precision"] == {"value": "bf16", "source": "file", "where": "mixed_precision"}
    assert "max_restarts" not in found["values"] and "sesame" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--zzz"], "unknown flag --zzz"),
        (["--config_file", "none.yaml"], "none.yaml does not exist"),
        (["--num_processes", "3", "--num_machines", "2"], "cannot be shared evenly"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["explain", *words])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and message in said and len(said.splitlines()) == 1


def test_a_device_that_is_not_here_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    main(["explain", "--num_processes", "2", "--multi_gpu"])
    assert "2 processes on cpu (this machine has no cuda device)" in capsys.readouterr().out


def test_a_file_for_sagemaker_is_explained_by_its_own_keys(tmp_path: Path) -> None:
    path = tmp_path / "aws.yaml"
    path.write_text(
        "compute_environment: AMAZON_SAGEMAKER\ndistributed_type: 'NO'\nnum_machines: 2\n"
        "ec2_instance_type: ml.g5.2xlarge\niam_role_name: trainer\nadditional_args: {max_run: 60}\n"
    )
    found = explain(["--config_file", str(path), "--aws_access_key_id", "A", "--aws_secret_access_key", "hush"])
    rows = {row.entry.dest: row for row in found.rows}
    assert (rows["ec2_instance_type"].value, rows["ec2_instance_type"].source) == ("ml.g5.2xlarge", "file")
    assert (rows["region"].value, rows["region"].source) == ("us-east-1", "default")
    assert rows["additional_args"].value == {"max_run": 60}
    text = "\n".join(_table(found, everything=False)) + _as_json(found, everything=True)
    assert "2 instances of ml.g5.2xlarge on Amazon SageMaker" in text and "hush" not in text
