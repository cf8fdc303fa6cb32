"""`accelerate checkpoint verify` and `list`, as typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.settings.handlers import ProjectConfiguration


def typed(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "checkpoint", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_verify_and_list(tmp_path: Path) -> None:
    config = ProjectConfiguration(project_dir=str(tmp_path), automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=config)
    first, second = accelerator.save_state(), accelerator.save_state()
    assert typed("verify", str(first)).returncode == 0
    (second / "random_states_0.pkl").write_bytes(b"short")
    done = typed("verify", str(second))
    assert done.returncode == 1 and "random_states_0.pkl" in done.stdout and "corrupt" in done.stdout
    listing = typed("list", str(tmp_path))
    assert listing.returncode == 0
    assert [line.split()[0] for line in listing.stdout.splitlines()] == ["checkpoint_0", "checkpoint_1"]
    assert "not whole" in listing.stdout.splitlines()[1]
    assert typed("list", str(tmp_path / "none")).returncode == 1
    assert typed("verify", str(tmp_path)).returncode == 1
