"""Which rank the launcher's last line names, and what it quotes: real ranks, most without torch."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND, SAY, Run, clean_environment, left_over

Write = Callable[..., str]
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


# Launches of which most of the time is waiting, by name.
WAITING = {
    "stops in a group": (
        "import datetime, os, signal, torch\nfrom accelerate import Accelerator, InitProcessGroupKwargs\n"
        "accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=10))])\n"
        "accelerator.gather(torch.ones(1))\n"
        "if accelerator.process_index == 1:\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "accelerator.gather(torch.ones(1))\n"
    ),
}
WAITING |= {
    name: f"{RANK}if rank == 1:\n    begun.touch()\n    {behavior}\nwait_for_rank_1()\ntime.sleep(0.2)\n{TIMED_OUT}"
    for name, behavior in (("stops", "os.kill(os.getpid(), signal.SIGSTOP)"), ("hangs", "time.sleep(600)"))
}
WAITING["leaves early"] = (
    f"{RANK}if rank == 1:\n    begun.touch()\n    sys.exit(0)\nwait_for_rank_1()\ntime.sleep(1)\n{LOST}"
)
# Its connections are closed, and what it does as it ends takes longer than the launcher waits.
WAITING["fails and takes long to end"] = (
    f"{RANK}import atexit\nif rank == 1:\n    atexit.register(time.sleep, 60)\n    atexit.register(begun.touch)\n"
    f"    raise ValueError('its own words')\nwait_for_rank_1()\n{LOST}"
)
WAITING["ends on SIGTERM"] = (
    f"{RANK}if rank == 1:\n    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n    begun.touch()\n"
    f"    time.sleep(600)\nwait_for_rank_1()\n{LOST}"
)


@pytest.fixture(scope="module")
def waited(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """Runs the launches that wait, side by side, and returns how each ended; none leaves a process behind."""

    def launch(name: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("waiting")
        (folder / "script.py").write_text(WAITING[name])
        environment = clean_environment(folder / "hf")
        command = [*COMMAND, *TWO, "script.py"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
        assert left_over(folder) == []
        return done

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(WAITING, pool.map(launch, WAITING), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [("stops", "is stopped (SIGSTOP)"), ("hangs", "did not take part: it was still running")],
)
def test_a_rank_that_hangs_is_named_and_not_the_one_that_timed_out(
    name: str, words: str, waited: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    done = waited[name]
    assert done.returncode == 1
    symptom = r"rank 0 \(pid \d+\) exited with code 1: RuntimeError: .* Timed out waiting 2000ms for recv"
    assert re.search(rf"rank 1 \(pid \d+\) {re.escape(words)}; {symptom}", last_line(done)), last_line(done)


@pytest.mark.slow
def test_a_stopped_rank_of_a_gloo_group_is_named(waited: dict[str, subprocess.CompletedProcess[str]]) -> None:
    done = waited["stops in a group"]
    assert done.returncode == 1
    assert re.search(r"rank 1 \(pid \d+\) is stopped \(SIGSTOP\); rank 0 \(pid \d+\) exited", last_line(done))


@pytest.mark.slow
def test_a_rank_that_leaves_early_is_named(waited: dict[str, subprocess.CompletedProcess[str]]) -> None:
    done = waited["leaves early"]
    assert done.returncode == 1
    symptom = r"rank 0 \(pid \d+\) exited with code 1: RuntimeError: .* Connection closed by peer"
    assert re.search(rf"rank 1 \(pid \d+\) left early with code 0; {symptom}", last_line(done)), last_line(done)


@pytest.mark.slow
def test_a_rank_that_failed_and_was_ended_before_it_was_gone(
    waited: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    done = waited["fails and takes long to end"]
    assert done.returncode == 1 and "SIGTERM" not in last_line(done), last_line(done)
    assert re.search(r"rank 1 \(pid \d+\) failed: ValueError: its own words", last_line(done)), last_line(done)


@pytest.mark.slow
def test_a_rank_that_ends_on_the_launchers_sigterm_is_not_to_blame(
    waited: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    done = waited["ends on SIGTERM"]
    assert done.returncode == 1 and "code 7" not in last_line(done), last_line(done)
    assert re.search(r"rank 0 \(pid \d+\) exited with code 1: RuntimeError", last_line(done)), last_line(done)


@pytest.mark.parametrize("text", ["", '{"mess', "[]", '{"message": {}}'])
def test_an_error_file_that_is_not_whole(text: str, accelerate: Run, script: Write) -> None:
    write = f"open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write({text!r})"
    done = accelerate(*TWO, script(f"{RANK}if rank == 1:\n    {write}\n    sys.exit(3)\ntime.sleep(600)\n"))
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert re.fullmatch(r"accelerate launch: rank 1 \(pid \d+\) exited with code 3", last_line(done))


def started(launcher: subprocess.Popen[str]) -> None:
    assert launcher.stdout is not None
    for _ in range(2):
        assert launcher.stdout.readline() == "up\n"


def test_interrupts(start: Start, script: Write, tmp_path: Path) -> None:
    # One launch ends well after an interrupt, and is not called too early; the other gets two, and heeds no SIGTERM.
    ignore = "import os, signal, time\nfor s in {}: signal.signal(s, signal.SIG_IGN)\nos.write(1, b'up\\n')\n"
    well = start(*TWO, script(ignore.format([2]) + "time.sleep(4)\n", "well.py"))
    twice = start(*TWO, script(ignore.format([2, 15]) + "time.sleep(600)\n", "twice.py"))
    started(well)
    started(twice)
    for launcher in (well, twice):
        launcher.send_signal(signal.SIGINT)
    time.sleep(1.5)
    twice.send_signal(signal.SIGINT)
    _, errors = twice.communicate(timeout=15)  # on its own, one interrupt leaves them 30 seconds
    assert twice.returncode == 128 + signal.SIGINT
    assert errors.splitlines()[-1] == "accelerate launch: interrupted"
    _, errors = well.communicate(timeout=60)
    assert well.returncode == 0
    assert errors.splitlines()[-1] == "accelerate launch: all ranks ended with code 0 after SIGINT"
    assert left_over(tmp_path) == []
