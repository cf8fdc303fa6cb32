"""The command as a person types it: a process, its streams and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

SCRIPT = str(Path(sys.executable).with_name("accelerate"))
COMMAND = [SCRIPT] if os.path.exists(SCRIPT) else [sys.executable, "-m", "accelerate.commands.accelerate_cli"]

Run = Callable[..., subprocess.CompletedProcess[str]]

# Ranks share a stream, and print() writes a line in two pieces.
SAY = "import os\ndef say(*words):\n    os.write(1, (' '.join(map(str, words)) + '\\n').encode())\n"


def clean_environment(home: Path) -> dict[str, str]:
    """Returns an environment without a configuration file and without what a launcher around the tests has set."""
    foreign = (
        "ACCELERATE_",
        "OMP_",
        "KMP_",
        "GLOO_",
        "FSDP_",
        "TORCHELASTIC_",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "MASTER_",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "HF_HOME": str(home), "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return clean_environment(tmp_path / "hf")


@pytest.fixture
def accelerate(tmp_path: Path, environment: dict[str, str]) -> Run:
    """Runs `accelerate` with words, in a folder of its own."""

    def run(*words: str, command: list[str] | None = None, **variables: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*(command or COMMAND), *words],
            cwd=tmp_path,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `accelerate` and leaves it running; what is left of it after the test is ended."""
    started: list[subprocess.Popen[str]] = []

    def run(*words: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [*COMMAND, *words],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    """Writes a script into the folder the command runs in."""

    def write(text: str, name: str = "script.py") -> str:
        (tmp_path / name).write_text(text)
        return name

    return write


def left_over(folder: Path) -> list[str]:
    """Processes that still run in `folder`: the launcher's, its ranks' and what these started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {process.cmdline()}")
        except psutil.Error:  # it has just ended, or belongs to somebody else
            continue
    return found
