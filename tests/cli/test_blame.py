"""Which rank the launcher's last line names, and what it quotes: real ranks, most without torch."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import SAY, Run, left_over

Write = Callable[[str], str]
Start = Callable[..., subprocess.Popen[str]]
TWO = ("launch", "--cpu", "--num_processes", "2", "--main_process_port", "0", "--monitor_interval", "0.1")
# `import accelerate` costs a rank no torch; its error then reaches the launcher. Rank 1 has begun before rank 0 goes on.
RANK = SAY + (
    "import pathlib, signal, sys, time\nimport accelerate\nrank = int(os.environ['RANK'])\n"
    "begun = pathlib.Path('begun')\n"
    "def wait_for_rank_1():\n    while not begun.exists(): time.sleep(0.01)\n"
)
TIMED_OUT = (
    "raise RuntimeError('[unbound_buffer.cc:81] Timed out waiting 2000ms for recv operation to complete')\n"  # gloo's
)
LOST = "raise RuntimeError('[pair.cc:534] Connection closed by peer [127.0.0.1]:29500')\n"


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr or "torch/distributed/elastic" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


def test_an_error_before_the_accelerator_exists_is_quoted(accelerate: Run, script: Write) -> None:
    done = accelerate(*TWO, script(f"{RANK}if rank == 1:\n    raise ValueError('its own words')\ntime.sleep(600)\n"))
    assert done.returncode == 1 and last_line(done).endswith("exited with code 1: ValueError: its own words")


@pytest.mark.parametrize(
    ("behavior", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", "is stopped (SIGSTOP)"),
        ("time.sleep(600)", "did not take part: it was still running"),
    ],
)
def test_a_rank_that_hangs_is_named_and_not_the_one_that_timed_out(
    behavior: str, words: str, accelerate: Run, script: Write, tmp_path: Path
) -> None:
    name = script(
        f"{RANK}if rank == 1:\n    begun.touch()\n    {behavior}\nwait_for_rank_1()\ntime.sleep(0.2)\n{TIMED_OUT}"
    )
    done = accelerate(*TWO, name)
    assert done.returncode == 1 and left_over(tmp_path) == []
    symptom = r"rank 0 \(pid \d+\) exited with code 1: RuntimeError: .* Timed out waiting 2000ms for recv"
    assert re.search(rf"rank 1 \(pid \d+\) {re.escape(words)}; {symptom}", last_line(done)), last_line(done)


@pytest.mark.slow
def test_a_stopped_rank_of_a_gloo_group_is_named(accelerate: Run, script: Write, tmp_path: Path) -> None:
    name = script(
        "import datetime, os, signal, torch\nfrom accelerate import Accelerator, InitProcessGroupKwargs\n"
        "accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=10))])\n"
        "accelerator.gather(torch.ones(1))\n"
        "if accelerator.process_index == 1:\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "accelerator.gather(torch.ones(1))\n"
    )
    done = accelerate(*TWO, name)
    assert done.returncode == 1 and left_over(tmp_path) == []
    assert re.search(r"rank 1 \(pid \d+\) is stopped \(SIGSTOP\); rank 0 \(pid \d+\) exited", last_line(done))


def test_a_rank_that_leaves_early_is_named(accelerate: Run, script: Write) -> None:
    name = script(f"{RANK}if rank == 1:\n    begun.touch()\n    sys.exit(0)\nwait_for_rank_1()\ntime.sleep(1)\n{LOST}")
    done = accelerate(*TWO, name)
    assert done.returncode == 1
    symptom = r"rank 0 \(pid \d+\) exited with code 1: RuntimeError: .* Connection closed by peer"
    assert re.search(rf"rank 1 \(pid \d+\) left early with code 0; {symptom}", last_line(done)), last_line(done)


@pytest.mark.parametrize("text", ["", '{"mess', "[]", '{"message": {}}'])
def test_an_error_file_that_is_not_whole(text: str, accelerate: Run, script: Write) -> None:
    write = f"open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write({text!r})"
    done = accelerate(*TWO, script(f"{RANK}if rank == 1:\n    {write}\n    sys.exit(3)\ntime.sleep(600)\n"))
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert re.fullmatch(r"accelerate launch: rank 1 \(pid \d+\) exited with code 3", last_line(done))


@pytest.mark.slow
def test_a_rank_that_failed_and_was_ended_before_it_was_gone(accelerate: Run, script: Write) -> None:
    # Its connections are closed, and what it does as it ends takes longer than the launcher waits.
    name = script(
        f"{RANK}import atexit\nif rank == 1:\n    atexit.register(time.sleep, 60)\n    atexit.register(begun.touch)\n"
        f"    raise ValueError('its own words')\nwait_for_rank_1()\n{LOST}"
    )
    done = accelerate(*TWO, name)
    assert done.returncode == 1 and "SIGTERM" not in last_line(done), last_line(done)
    assert re.search(r"rank 1 \(pid \d+\) failed: ValueError: its own words", last_line(done)), last_line(done)


@pytest.mark.slow
def test_a_rank_that_ends_on_the_launchers_sigterm_is_not_to_blame(accelerate: Run, script: Write) -> None:
    name = script(
        f"{RANK}if rank == 1:\n    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n    begun.touch()\n"
        f"    time.sleep(600)\nwait_for_rank_1()\n{LOST}"
    )
    done = accelerate(*TWO, name)
    assert done.returncode == 1 and "code 7" not in last_line(done), last_line(done)
    assert re.search(r"rank 0 \(pid \d+\) exited with code 1: RuntimeError", last_line(done)), last_line(done)


def started(launcher: subprocess.Popen[str]) -> None:
    assert launcher.stdout is not None
    for _ in range(2):
        assert launcher.stdout.readline() == "up\n"


def test_ranks_that_ended_well_after_the_signal_are_not_called_too_early(start: Start, script: Write) -> None:
    ignore = "import os, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    launcher = start(*TWO, script(f"{ignore}os.write(1, b'up\\n')\ntime.sleep(4)\n"))
    started(launcher)
    launcher.send_signal(signal.SIGINT)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 0
    assert errors.splitlines()[-1] == "accelerate launch: all ranks ended with code 0 after SIGINT"


def test_a_second_interrupt_ends_the_ranks_at_once(start: Start, script: Write, tmp_path: Path) -> None:
    ignore = "import os, signal, time\nfor s in (2, 15): signal.signal(s, signal.SIG_IGN)\n"
    launcher = start(*TWO, script(f"{ignore}os.write(1, b'up\\n')\ntime.sleep(600)\n"))
    started(launcher)
    launcher.send_signal(signal.SIGINT)
    time.sleep(1.5)
    launcher.send_signal(signal.SIGINT)
    _, errors = launcher.communicate(timeout=15)  # on its own, one interrupt leaves them 30 seconds
    assert launcher.returncode == 128 + signal.SIGINT and left_over(tmp_path) == []
    assert errors.splitlines()[-1] == "accelerate launch: interrupted"
