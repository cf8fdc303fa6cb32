"""A few points of `make crash`: saves of one and two ranks killed by SIGKILL at system calls."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("torchdata.stateful_dataloader")


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(("ranks", "points"), [(1, 8), (2, 5)])
def test_a_save_killed_at_system_calls_leaves_a_complete_checkpoint(ranks: int, points: int) -> None:
    how = ["--points", str(points), "--ranks", str(ranks)]
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.crash", *how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if "attach" in done.stderr and "not permitted" in done.stderr:
        pytest.skip("this machine does not let one process trace another")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["killed"] >= 4 and outcome["lost"] == 0
