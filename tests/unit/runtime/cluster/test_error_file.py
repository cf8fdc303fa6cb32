"""The exception that ends a process in the file that the launcher reads; each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(program: str, file: Path, **variables: str) -> str:
    """Runs the program as a rank, and returns its stderr."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "LOCAL_"))}
    environment |= {"TORCHELASTIC_ERROR_FILE": str(file), **variables}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment)
    return done.stderr


def message(file: Path) -> str:
    return str(json.loads(file.read_text())["message"]["message"])


def test_the_error_is_there_for_torch_to_read_and_nothing_else(tmp_path: Path) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    file = tmp_path / "error.json"
    stderr = run("import accelerate\nraise ValueError('its own words')", file)
    assert "ValueError: its own words" in stderr and os.listdir(tmp_path) == ["error.json"]
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    assert failure.message["message"] == "ValueError: its own words" and failure.timestamp > 0  # type: ignore[index]
    assert "line 2, in <module>" in failure.message["extraInfo"]["py_callstack"]  # type: ignore[index]


@pytest.mark.parametrize(
    "child",
    [
        "subprocess.run([sys.executable, '-c', 'import accelerate; raise ValueError(1)'])",
        "os.waitpid(pid, 0) if (pid := os.fork()) else (_ for _ in ()).throw(ValueError(1))",
    ],
)
def test_what_a_rank_starts_is_not_the_rank(child: str, tmp_path: Path) -> None:
    stderr = run(f"import accelerate, os, subprocess, sys\n{child}", tmp_path / "error.json")
    assert "ValueError: 1" in stderr and os.listdir(tmp_path) == []


def test_a_hook_that_replaces_ours_is_chained_and_so_are_others(tmp_path: Path) -> None:
    program = (
        "import sys\nsys.excepthook = lambda *_: sys.stderr.write('first ')\nimport accelerate\n"
        "{replace}from accelerate.runtime.cluster.error_file import record_errors\nrecord_errors()\nraise ValueError(2)\n"
    )
    assert (
        run(program.format(replace=""), tmp_path / "a.json") == "first "
        and message(tmp_path / "a.json") == "ValueError: 2"
    )
    replace = "sys.excepthook = lambda *_: sys.stderr.write('second ')\n"
    assert run(program.format(replace=replace), tmp_path / "b.json") == "second "
    assert message(tmp_path / "b.json") == "ValueError: 2"


def test_an_interrupt_is_shown_by_one_rank_and_recorded_by_none(tmp_path: Path) -> None:
    program = "import accelerate\nraise KeyboardInterrupt"
    assert "KeyboardInterrupt" in run(program, tmp_path / "e", LOCAL_RANK="0")
    assert run(program, tmp_path / "e", LOCAL_RANK="1") == "" and os.listdir(tmp_path) == []


def test_a_folder_that_is_gone_leaves_the_error_as_it_was(tmp_path: Path) -> None:
    stderr = run("import accelerate\nraise ValueError(3)", tmp_path / "gone" / "e")
    assert stderr.endswith("ValueError: 3\n") and "FileNotFoundError" not in stderr


def test_torch_is_not_imported(tmp_path: Path) -> None:
    program = "import accelerate, sys\nsys.stderr.write(str('torch' in sys.modules))"
    assert run(program, tmp_path / "e") == "False"
