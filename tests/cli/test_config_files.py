"""Configuration files and what a launch would do, as typed: update, explain, to-fsdp2, a dry run pasted into a shell."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from accelerate.commands import accelerate_cli
from tests.cli.conftest import Run

Write = Callable[..., str]
REPORT = """\
import json, os, sys
names = ("RANK", "ROLE_NAME", "FSDP_TRANSFORMER_CLS_TO_WRAP", "ACCELERATE_MIXED_PRECISION", "PYTHONPATH")
report = {"argv": sys.argv[1:], **{name: os.environ.get(name) for name in names}}
os.write(1, (json.dumps(report) + "\\n").encode())  # at once: ranks share the stream
"""
SHELL = [
    "a b",
    "$HOME",
    "${local_rank}",
    "$$",
    "`id`",
    "it's",
    '"',
    ";|&<>",
    "*",
    "\\",
    "new\nline",
    "ü",
    "-x",
    "",
    "#",
]
META = "".join(SHELL)


def reports(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return sorted(found, key=lambda report: report["RANK"] or "")


def pasted(text: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_dry_run_starts_nothing_and_can_be_pasted(
    accelerate: Run, script: Write, tmp_path: Path, environment: dict[str, str]
) -> None:
    name = script(REPORT, "it's $mine.py")
    done = accelerate("launch", "--dry_run", "--mixed-precision", "bf16", "--num_processes", "1", name, *SHELL)
    assert (done.returncode, done.stderr) == (0, "") and '"argv"' not in done.stdout
    assert "ACCELERATE_MIXED_PRECISION=bf16 \\\n" in done.stdout
    (report,) = reports(pasted(done.stdout, tmp_path, environment))
    assert report["argv"] == SHELL and report["ACCELERATE_MIXED_PRECISION"] == "bf16"
    missing = accelerate("launch", "--dry-run", "nothing.py")
    assert missing.returncode == 2 and "script nothing.py does not exist" in missing.stderr


@pytest.mark.slow
def test_a_dry_run_of_two_ranks_can_be_pasted(
    accelerate: Run, script: Write, tmp_path: Path, environment: dict[str, str]
) -> None:
    # Port 0: torch takes a free one.
    words = ["--cpu", "--num_processes", "2", "--main_process_port", "0", "--role", META, script(REPORT)]
    done = accelerate("launch", "--dry-run", *words, *SHELL)
    assert "-m torch.distributed.run --nnodes 1 --nproc_per_node 2" in done.stdout
    first, second = reports(pasted(done.stdout, tmp_path, environment))
    assert first["argv"] == second["argv"] == SHELL and first["ROLE_NAME"] == META
    assert (first["RANK"], second["RANK"]) == ("0", "1")


@pytest.mark.slow
def test_what_a_shell_would_read_reaches_the_ranks_as_text(accelerate: Run, script: Write, tmp_path: Path) -> None:
    content = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": META}}
    (tmp_path / f"{META.replace('/', '')[:40]}.yaml").write_text(yaml.safe_dump({**content, "use_cpu": True}))
    file = next(tmp_path.glob("*.yaml")).name
    words = ["--config_file", file, "--num_processes", "2", "--role", META, script(REPORT, f"{META[:30]}.py")]
    for report in reports(accelerate("launch", "-q", *words, *SHELL)):
        assert report["argv"] == SHELL
        assert report["FSDP_TRANSFORMER_CLS_TO_WRAP"] == report["ROLE_NAME"] == META


def test_what_a_shell_would_read_reaches_one_process_as_text(accelerate: Run, script: Write, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"distributed_type": "NO", "role": META, "log_dir": META}))
    (report,) = reports(accelerate("launch", "--config_file", "c.yaml", "--rdzv_conf", META, script(REPORT), *SHELL))
    assert report["argv"] == SHELL


def test_update_explain_and_to_fsdp2_as_typed(accelerate: Run, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_sharding_strategy: 1}\nuse_cpu: yes\n"
    )
    done = accelerate("config", "update", "--config-file", "c.yaml")
    assert done.returncode == 0 and "fsdp_sharding_strategy: 1 is FULL_SHARD today" in done.stdout
    before = path.read_bytes()
    assert (
        accelerate("config", "update", "--config_file", "c.yaml").stdout
        == "c.yaml is up to date and was left as it is\n"
    )
    assert path.read_bytes() == before
    done = accelerate("config", "explain", "--config_file", "c.yaml", "--mixed-precision", "bf16", "train.py")
    assert done.returncode == 0 and ["mixed_precision", "bf16", "flag"] in [
        line.split() for line in done.stdout.splitlines()
    ]
    done = accelerate("to-fsdp2", "--config_file", "c.yaml", "--output_file", "two.yaml")
    assert done.returncode == 0 and yaml.safe_load((tmp_path / "two.yaml").read_text())["fsdp_config"] == {
        "fsdp_reshard_after_forward": True,
        "fsdp_version": 2,
    }


HOSTILE = {
    "bytes.yaml": b"\xff\xfe\xfd\x00",
    "tag.yaml": b"distributed_type: !!python/object/apply:os.system ['touch here']\n",
    "deep.yaml": b"[" * 100_000,
    "keys.yaml": b"num_procs: 1\ndistributed_type: NO\nfsdp_config: {a: 1}\n",
    "values.yaml": b"distributed_type: MULTI_CPU\nnum_processes: 3\nnum_machines: 2\nmain_process_ip: a\n",
    "text.json": b'{"distributed_type": "NO", "log_dir": "\\u0000"}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_file_gives_a_traceback(
    name: str, accelerate: Run, script: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(HOSTILE[name])
    done = accelerate("launch", "--config_file", name, script("print('started')"))
    assert (done.returncode, done.stdout) == (2, "") and name in done.stderr and "Traceback" not in done.stderr
    refused = [["config", "explain"]]
    if name != "values.yaml":  # whose keys and values are right, each by itself
        refused += [["config", "update"], ["test"]]
        os.chdir(tmp_path)
        assert accelerate_cli.main(["env", "--config_file", name]) == 2  # in this process: it imports torch
        assert "Traceback" not in capfd.readouterr().err
    for words in refused:
        done = accelerate(*words, "--config_file", name)
        assert done.returncode == 2 and "Traceback" not in done.stderr, (words, done.stdout)
    assert not (tmp_path / "here").exists()


def test_neither_torch_nor_rich_is_imported(accelerate: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("distributed_type: FSDP\nnum_processes: 2\n")
    for words in (["config", "update"], ["config", "explain"], ["to-fsdp2", "--overwrite"]):
        done = accelerate(*words, "--config_file", "c.yaml", PYTHONPROFILEIMPORTTIME="1")
        imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
        assert done.returncode == 0 and "yaml" in imported and not imported & {"torch", "numpy", "rich", "questionary"}
