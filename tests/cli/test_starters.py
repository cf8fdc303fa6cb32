"""Programs of others that start the ranks and are not there: told before anything is started."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.helpers.programs import shebang

Write = Callable[[str], str]
NOTHING = "raise SystemExit('started')\n"


def test_without_mpirun_the_error_says_what_to_install(accelerate: Run, script: Write, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    words = ("--num_processes", "2", "--mpirun_hostfile", "hosts", script(NOTHING))
    done = accelerate("launch", *words, PATH=str(tmp_path))
    assert done.returncode == 2 and "started" not in done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and "apt install openmpi-bin" in done.stderr


def test_without_deepspeed_the_error_says_what_to_install(accelerate: Run, script: Write, tmp_path: Path) -> None:
    if find_spec("deepspeed") is not None:
        pytest.skip("deepspeed is installed")
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    words = ("--use_deepspeed", "--num_machines", "2", "--num_processes", "2", "--deepspeed_hostfile", "hosts")
    done = accelerate("launch", *words, script(NOTHING))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "DeepSpeed is not installed, and this version cannot train with it even where it is: leave" in done.stderr


STAND_IN = """import json, os, sys
told = open(os.environ["DS_ENV_FILE"]).read() if "DS_ENV_FILE" in os.environ else None
print(json.dumps([sys.argv[1:], told, os.environ["ACCELERATE_MIXED_PRECISION"]]))
sys.exit(3)
"""


@pytest.mark.parametrize("launcher", ["pdsh", "nossh"])
def test_deepspeed_is_handed_its_words_and_variables(
    accelerate: Run, script: Write, tmp_path: Path, launcher: str
) -> None:
    """With stand-ins for DeepSpeed and pdsh: what they are given, and that the launcher has become the first."""
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed/__init__.py").write_text("")
    (tmp_path / "bin").mkdir()
    for name in ("deepspeed", "pdsh"):
        (tmp_path / "bin" / name).write_text(shebang() + STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    (tmp_path / ".deepspeed_env").write_text("MINE=1\n")
    words = ["--use_deepspeed", "--num_machines", "2", "--num_processes", "2", "--deepspeed_hostfile", "hosts"]
    words += ["--deepspeed_multinode_launcher", launcher, "--main_process_ip", "10.0.0.1", "--mixed_precision", "bf16"]
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    home = {"HOME": str(tmp_path / "home")}
    done = accelerate("launch", *words, script(NOTHING), "a b", PATH=path, PYTHONPATH=str(tmp_path), **home)
    assert done.returncode == 3, done.stderr
    argv, told, precision = json.loads(done.stdout)
    assert argv[:3] == ["--hostfile", "hosts", "--no_local_rank"] and argv[-2:] == ["script.py", "a b"]
    assert precision == "bf16"
    if launcher == "nossh":  # every machine has a launcher of its own
        assert told is None
    else:
        lines = told.splitlines()
        assert lines[0] == "MINE=1" and {"ACCELERATE_USE_DEEPSPEED=true", "ACCELERATE_MIXED_PRECISION=bf16"} <= {*lines}
        assert "DS_ENV_FILE" in done.stderr
    assert (tmp_path / ".deepspeed_env").read_text() == "MINE=1\n"
