"""The other subcommands, and the ways to call them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.conftest import Run

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).resolve().parents[1] / "data" / "launch_behaviors.json").read_text()
)
COMMANDS = ["config", "env", "estimate-memory", "launch", "merge-weights", "test", "to-fsdp2", "tpu-config"]
MODULES = {"estimate-memory": "estimate", "merge-weights": "merge", "to-fsdp2": "to_fsdp2", "tpu-config": "tpu"}


def test_help_lists_the_commands(accelerate: Run) -> None:
    done = accelerate("--help")
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in COMMANDS)
    bare = accelerate()
    assert (bare.returncode, bare.stderr) == (2, done.stdout)
    assert accelerate("--version").stdout.strip()


def test_an_unknown_command_is_one_line(accelerate: Run) -> None:
    done = accelerate("lunch")
    assert (done.returncode, done.stderr) == (2, "accelerate: unknown command lunch. Did you mean launch?\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_under_all_its_names(name: str, accelerate: Run) -> None:
    shown = accelerate(name, "--help")
    assert shown.returncode == 0 and f"accelerate {name}" in shown.stdout
    module = MODULES.get(name, name if name != "config" else "config.config")
    same = accelerate("--help", command=[sys.executable, "-m", f"accelerate.commands.{module}"])
    assert (same.returncode, same.stdout) == (0, shown.stdout)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["config", "update"], "default_config.yaml does not exist. `accelerate config` writes one."),
        (["config", "nothing"], "invalid choice: 'nothing'"),
        (["to-fsdp2"], "to-fsdp2: the following arguments are required: --config_file"),
        (["checkpoint"], "required: action"),
        (["config", "explain", "--config_file", "none.yaml"], "none.yaml does not exist"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_what_cannot_be_done_is_one_line_and_code_2(words: list[str], message: str, accelerate: Run) -> None:
    done = accelerate(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "name",
    [[name] for name in COMMANDS] + [["config", name] for name in ("default", "update", "explain")],
)
def test_help_shows_one_spelling_in_80_columns(name: list[str], accelerate: Run) -> None:
    shown = accelerate(*name, "--help").stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert not re.search(r"--[a-z]+-[a-z]+", shown) and "%%" not in shown


def test_a_configuration_without_questions(accelerate: Run, tmp_path: Path) -> None:
    done = accelerate("config", "default", "--mixed-precision", "bf16", CUDA_VISIBLE_DEVICES="")
    path = tmp_path / "hf" / "accelerate" / "default_config.yaml"
    assert (done.returncode, done.stdout) == (0, f"accelerate configuration saved at {path}\n")
    written = yaml.safe_load(path.read_text())
    assert written == {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "NO",
        "downcast_bf16": False,
        "enable_cpu_affinity": False,
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "bf16",
        "num_machines": 1,
        "num_processes": 1,
        "rdzv_backend": "static",
        "same_network": False,
        "tpu_use_cluster": False,
        "tpu_use_sudo": False,
        "use_cpu": True,
    }
    again = accelerate("config", "default")
    assert again.returncode == 0 and "exists already" in again.stdout
    other = accelerate("config", "default", "--config_file", "mine.yaml")
    assert other.returncode == 0 and (tmp_path / "mine.yaml").exists()
    wrong = accelerate("config", "default", "--mixed_precision", "fp15")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1


def test_the_check_of_the_set_up(accelerate: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    done = accelerate("test", "--config_file", "c.yaml")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "Everything works: 2 process(es) on cpu."
    assert len([line for line in lines if line.startswith("ok: ")]) >= 9


def test_the_check_fails_where_the_set_up_does(accelerate: Run) -> None:
    done = accelerate("test", "--cpu", "--num_processes", "1", WORLD_SIZE="2", RANK="5")
    assert done.returncode == 1 and "contradict each other" in done.stderr
