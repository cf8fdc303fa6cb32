"""`accelerate checkpoint verify` and `list`, as typed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from accelerate import Accelerator
from accelerate.commands import accelerate_cli
from accelerate.settings.handlers import ProjectConfiguration

Typed = Callable[..., tuple[int, str]]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    """Runs `accelerate checkpoint` in this process and returns its exit code and output: a new one would import torch."""

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        return accelerate_cli.main(["checkpoint", *words]), capsys.readouterr().out

    return run


def test_verify_and_list(tmp_path: Path, typed: Typed) -> None:
    config = ProjectConfiguration(project_dir=str(tmp_path), automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=config)
    first, second = accelerator.save_state(), accelerator.save_state()
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "checkpoint", "verify", str(first)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.endswith("whole\n")
    assert re.search(r"^file +holds +size +state$", done.stdout, re.MULTILINE)
    assert re.search(r"^random_states_0\.pkl +random states of a process +\S+ KB +ok$", done.stdout, re.MULTILINE)
    (second / "random_states_0.pkl").write_bytes(b"short")
    code, output = typed("verify", str(second))
    assert code == 1 and re.search(r"^random_states_0\.pkl .*corrupt: it has 5 bytes", output, re.MULTILINE)
    code, output = typed("list", str(tmp_path))
    assert code == 0
    headers, _, whole, damaged, _, legend = output.splitlines()
    assert headers.split() == ["checkpoint", "saved", "processes", "size", "state"]
    assert re.fullmatch(r"checkpoint_0 +\S+ \S+ UTC +1 +\S+ KB +complete", whole)
    assert legend.startswith("complete: all files are there in the size they were saved with.") and "verify" in legend
    assert damaged.startswith("checkpoint_1 ") and damaged.endswith("not whole")
    assert typed("list", str(tmp_path / "none"))[0] == 1
    assert typed("verify", str(tmp_path))[0] == 1


def test_what_a_listing_has_not_read_it_does_not_call_whole(tmp_path: Path, typed: Typed) -> None:
    config = ProjectConfiguration(project_dir=str(tmp_path), automatic_checkpoint_naming=True)
    saved = Path(Accelerator(cpu=True, project_config=config).save_state()) / "random_states_0.pkl"
    content = saved.read_bytes()
    saved.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "whole" not in typed("list", str(tmp_path))[1]
    assert "not whole: 1 problem" in typed("verify", str(saved.parent))[1]


def test_a_file_is_no_checkpoint(tmp_path: Path, typed: Typed) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    code, output = typed("verify", str(tmp_path / "model.bin"))
    assert code == 1 and "it is a file; a checkpoint is a folder" in output
    assert "there is no such folder" in typed("verify", str(tmp_path / "none"))[1]
