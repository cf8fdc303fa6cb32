"""`accelerate checkpoint verify` and `list`, as typed."""

from __future__ import annotations

import re
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
    done = typed("verify", str(first))
    assert done.returncode == 0 and done.stdout.endswith("whole\n")
    assert re.search(r"^file +holds +size +state$", done.stdout, re.MULTILINE)
    assert re.search(r"^random_states_0\.pkl +random states of a process +\S+ KB +ok$", done.stdout, re.MULTILINE)
    (second / "random_states_0.pkl").write_bytes(b"short")
    done = typed("verify", str(second))
    assert done.returncode == 1 and re.search(
        r"^random_states_0\.pkl .*corrupt: it has 5 bytes", done.stdout, re.MULTILINE
    )
    listing = typed("list", str(tmp_path))
    assert listing.returncode == 0
    headers, _, whole, damaged = listing.stdout.splitlines()
    assert headers.split() == ["checkpoint", "saved", "step", "processes", "size", "state"]
    assert re.fullmatch(r"checkpoint_0 +\S+ \S+ UTC +0 +1 +\S+ KB +whole", whole)
    assert damaged.startswith("checkpoint_1 ") and damaged.endswith("not whole")
    assert typed("list", str(tmp_path / "none")).returncode == 1
    assert typed("verify", str(tmp_path)).returncode == 1
