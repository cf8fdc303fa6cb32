"""The options of torch's agent, through real launches on one machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from accelerate.commands import accelerate_cli
from tests.cli.conftest import SAY, Run, left_over

Write = Callable[..., str]
Start = Callable[..., subprocess.Popen[str]]
TWO = ("launch", "--cpu", "--num_processes", "2")
RANK = "import os, sys, time\nrank = int(os.environ['RANK'])\n"


def lines_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What was said on stderr, but for a line that another program's use of the usual port leads to."""
    return [line for line in done.stderr.splitlines() if "29500 is taken" not in line]


def test_both_streams_go_to_the_screen_and_to_files(accelerate: Run, script: Write, tmp_path: Path) -> None:
    name = script(f"{SAY}{RANK}say('out', rank, os.environ['ROLE_NAME'])\nos.write(2, b'err %d\\n' % rank)\n")
    done = accelerate(*TWO, "--tee", "3", "--log_dir", "logs", "--role", "teacher", "--monitor_interval", "0.5", name)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[teacher{rank}]:out {rank} teacher" for rank in (0, 1)]
    assert sorted(line for line in done.stderr.splitlines() if "]:" in line) == [
        f"[teacher{rank}]:err {rank}" for rank in (0, 1)
    ]
    files = {path.relative_to(tmp_path / "logs"): path.read_text() for path in (tmp_path / "logs").rglob("*.log")}
    assert {(path.parts[2], path.name): text for path, text in files.items()} == {
        (rank, f"{stream}.log"): text
        for rank in "01"
        for stream, text in (("stdout", f"out {rank} teacher\n"), ("stderr", f"err {rank}\n"))
    }


def test_debug_shows_the_agents_own_account_and_quiet_nothing(accelerate: Run, script: Write) -> None:
    name = script(f"{RANK}sys.exit(3 if rank else 0)\n")
    told = accelerate(*TWO, "--debug", name)
    assert told.returncode == 3 and "torch/distributed/elastic" in told.stderr
    plain = accelerate(*TWO, name)
    (line,) = lines_of(plain)
    assert re.fullmatch(r"accelerate launch: rank 1 \(pid \d+\) exited with code 3", line)
    quiet = accelerate(*TWO, "-q", name)
    assert (quiet.returncode, quiet.stderr) == (3, "")


@pytest.mark.slow
def test_a_script_that_has_saved_on_request_is_not_started_again(
    accelerate: Run, script: Write, tmp_path: Path
) -> None:
    # Rank 0 is still saving when rank 1 has left.
    name = script(f"{RANK}time.sleep(0 if rank else 1.5)\nos.write(1, b'saved %d\\n' % rank)\nsys.exit(75)\n")
    done = accelerate(*TWO, "--max_restarts", "2", name)
    assert done.returncode == 75
    assert sorted(done.stdout.splitlines()) == ["saved 0", "saved 1"]
    assert "exited with code 75 (it was stopped and has saved: start it again)" in done.stderr
    assert len(lines_of(done)) == 1 and left_over(tmp_path) == []


def test_a_single_process_is_started_again_too(accelerate: Run, script: Write) -> None:
    name = script(
        "import os, signal, sys\n"
        "if int(os.environ['TORCHELASTIC_RESTART_COUNT']) < 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from accelerate import PartialState\n"
        "print('there', PartialState().num_processes)\n"
    )
    done = accelerate(
        "launch", "--cpu", "--num_processes", "1", "--max_restarts", "2", "--monitor_interval", "0.1", name
    )
    assert (done.returncode, done.stdout) == (0, "there 1\n"), done.stderr
    assert done.stderr.count("a rank failed; starting all ranks again") == 2


SAVED = {"SIGTERM": "stopped by SIGTERM; all ranks have", "SIGUSR1": "it was stopped"}


@pytest.mark.slow
def test_a_signal_to_the_launcher_leaves_ranks_the_time_to_save(start: Start, script: Write, tmp_path: Path) -> None:
    # Longer than ranks get when another has failed; and each signal comes twice. The launches wait side by side.
    launchers = {}
    for number in SAVED:
        name = script(
            f"{RANK}import signal\nhandler = lambda *_: asked.append(1)\nasked = []\n"
            f"signal.signal(signal.{number}, handler)\n"
            "os.write(1, b'ready\\n')\nwhile not asked: time.sleep(0.05)\n"
            "time.sleep(7)\nos.write(1, b'saved\\n')\nsys.exit(75)\n",
            f"{number}.py",
        )
        launchers[number] = start(*TWO, "--main_process_port", "0", "--max_restarts", "2", name)
    for launcher in launchers.values():
        assert launcher.stdout is not None
        assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    for _ in range(2):
        for number, launcher in launchers.items():
            launcher.send_signal(getattr(signal, number))
        time.sleep(0.5)
    for number, launcher in launchers.items():
        out, errors = launcher.communicate(timeout=60)
        assert (launcher.returncode, out.splitlines()) == (75, ["saved"] * 2), errors
        assert SAVED[number] in errors.splitlines()[-1] and "again" in errors
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tee", "9"], "torch.distributed.run refuses an option: 9 does not match"),
        (["--log_dir", "/proc/nosuch"], "--log_dir /proc/nosuch cannot be made"),
        (
            ["--rdzv_conf", "soon"],
            "torch.distributed.run refuses an option: The rendezvous configuration option 'soon'",
        ),
        (["--num_machines", "2", "--main_process_ip", "::1", "--rdzv_backend", "nosuch"], "--rdzv_backend nosuch: "),
        (
            ["--num_machines", "2", "--main_process_ip", "::1", "--rdzv_conf", "timeout=x"],
            "expected a number, found 'x'.",
        ),
    ],
)
def test_what_the_agent_cannot_use_is_one_line_and_code_2(
    words: list[str], message: str, script: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    os.chdir(tmp_path)
    # In this process: it is stopped before it starts any, and each launcher would import torch.
    code = accelerate_cli.main([*TWO, *words, script("print('started')")])
    out, errors = capfd.readouterr()
    assert (code, out) == (2, ""), errors
    assert message in errors and len(errors.splitlines()) == 1
