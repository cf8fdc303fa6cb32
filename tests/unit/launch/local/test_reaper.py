"""What watches over ranks: when each has ended."""

from __future__ import annotations

import subprocess
import sys
import time

from accelerate.launch.local.reaper import ExitWatcher


def test_all_deaths_are_noted_once_the_thread_has_ended() -> None:
    seen = []

    def slowly(pid: int, status: int) -> None:
        time.sleep(0.3)  # as on a busy machine
        seen.append((pid, status))

    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    before = time.time_ns()
    deaths = ExitWatcher([process.pid], slowly)
    process.terminate()
    time.sleep(0.1)
    assert process.pid not in deaths.times
    deaths.join(30)
    assert before < deaths.times[process.pid] < time.time_ns()
    assert seen == [(process.pid, -15)]
    assert process.wait() == -15
