"""``python -m tests.gpu``: what it writes and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command on the CPU."""
    command = [sys.executable, "-m", "tests.gpu", "--cpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_writes_the_figures_of_each_part(tmp_path: Path) -> None:
    done = run("--only", "out_of_memory", "ends_at_once", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert list(written["parts"]) == ["out_of_memory", "ends_at_once"]
    assert written["parts"]["out_of_memory"]["figures"]["tried"] == [64, 32, 16, 8]
    assert "torch" in written["machine"]


def test_fails_with_the_part_that_fails(tmp_path: Path) -> None:
    driver = (
        "import sys; from tests.gpu import __main__ as main, parts\n"
        "broken = parts.Part(parts.ends_at_once, grouped=False, variables=(('ACCELERATE_MIXED_PRECISION', 'fp1'),))\n"
        "parts.PARTS['ends_at_once'] = broken\n"
        f"sys.argv = ['tests.gpu', '--cpu', '--only', 'ends_at_once', '--out', {str(tmp_path / 'gpu.json')!r}]\n"
        "sys.exit(main.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", driver], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    part = json.loads((tmp_path / "gpu.json").read_text())["parts"]["ends_at_once"]
    assert part["result"] == "failed"
    assert "fp1" in part["error"]


def test_names_the_parts_when_one_is_unknown(tmp_path: Path) -> None:
    done = run("--only", "offload", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 2
    assert "no part is called offload" in done.stderr
    assert "offload_exact" in done.stderr
    assert not (tmp_path / "gpu.json").exists()
