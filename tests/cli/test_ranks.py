"""`accelerate launch` of several processes, and what happens when one of them, or the launcher, fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import SAY, Run, left_over

Write = Callable[[str], str]
Start = Callable[..., subprocess.Popen[str]]
TWO = ("launch", "--cpu", "--num_processes", "2")
# Ranks without torch: a launch then costs what the launcher itself costs.
RANK = SAY + "import sys, time\nrank = int(os.environ['RANK'])\n"
WAIT = "say('rank', rank, 'is up')\ntime.sleep(600)\n"


def listening(pid: int) -> set[str]:
    """Addresses that a process listens on, from /proc/net/tcp and tcp6."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:  # the one that lists the folder
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                found.add(words[1].partition(":")[0])
    return found


def test_two_gloo_ranks_on_the_loopback(accelerate: Run, script: Write) -> None:
    name = script(
        SAY + "import json, sys, torch\n"
        "from accelerate import PartialState\n"
        "from accelerate.utils import gather\n"
        "from tests.cli.test_ranks import listening\n"
        "state = PartialState()\n"
        "addresses = listening(os.getpid()) | listening(os.getppid())\n"
        "ranks = gather(torch.tensor([state.process_index])).tolist()\n"
        "environment = {name: value for name, value in os.environ.items() if name in sys.argv[-1]}\n"
        "say(json.dumps([sys.argv[1:], ranks, str(state.distributed_type), sorted(addresses), environment]))\n"
    )
    names = "MASTER_ADDR ACCELERATE_USE_CPU LOCAL_WORLD_SIZE WORLD_SIZE"
    words = ["--num_processes", "3", "$$", "${local_rank}", names]
    root = str(Path(__file__).resolve().parents[2])
    done = accelerate(*TWO, "--main_process_port", "0", name, *words, PYTHONPATH=root)
    assert done.returncode == 0, done.stderr
    assert "using port" in done.stderr
    for line in done.stdout.splitlines():
        argv, ranks, kind, addresses, environment = json.loads(line)
        assert (argv, ranks, kind) == (words, [0, 1], "DistributedType.MULTI_CPU")
        assert addresses == ["0100007F"]  # 127.0.0.1, nothing else
        assert environment["MASTER_ADDR"] == "127.0.0.1" and environment["ACCELERATE_USE_CPU"] == "True"
        assert environment["LOCAL_WORLD_SIZE"] == environment["WORLD_SIZE"] == "2"
    assert len(done.stdout.splitlines()) == 2


def test_a_file_starts_ranks_and_a_busy_port_is_replaced(accelerate: Run, script: Write, tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        (tmp_path / "c.yaml").write_text(
            f"distributed_type: MULTI_CPU\nnum_processes: 3\nuse_cpu: true\nmain_process_port: {port}\n"
        )
        done = accelerate("launch", "--config_file", "c.yaml", script(RANK + "say(os.environ['MASTER_PORT'])"))
    assert done.returncode == 0, done.stderr
    chosen = set(done.stdout.split())
    assert len(done.stdout.split()) == 3 and len(chosen) == 1 and chosen != {str(port)}
    assert done.stderr == f"accelerate launch: port {port} is taken, using port {chosen.pop()}\n"


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.splitlines()[-1]


def test_a_rank_that_raises(accelerate: Run, script: Write, tmp_path: Path) -> None:
    name = script(
        "import torch\n"
        "from accelerate import PartialState\n"
        "from accelerate.utils import gather\n"
        "state = PartialState()\n"
        "gather(torch.ones(1))\n"
        "if state.process_index == 1:\n"
        "    raise ValueError('its own words')\n"
        "gather(torch.ones(1))\n"
    )
    done = accelerate(*TWO, name)
    assert done.returncode == 1
    assert "accelerate launch: rank 1 (pid " in last_line(done)
    assert last_line(done).endswith("exited with code 1: ValueError: its own words")
    assert "torch.distributed.elastic" not in done.stderr and left_over(tmp_path) == []


def test_a_rank_that_never_joins(accelerate: Run, script: Write, tmp_path: Path) -> None:
    name = script(
        RANK + "if rank == 1:\n    time.sleep(600)\n"
        "from datetime import timedelta\n"
        "from accelerate import PartialState\n"
        "PartialState(timeout=timedelta(seconds=2))\n"
    )
    done = accelerate(*TWO, name)
    assert done.returncode == 1 and left_over(tmp_path) == []
    assert "rank 0 (pid " in last_line(done) and "waited 2 s for rank 1 to join" in last_line(done)


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("sys.exit(3)", 3, "exited with code 3"),
        ("os.kill(os.getpid(), 9)", 128 + 9, "was killed by SIGKILL"),
    ],
)
def test_a_rank_that_leaves_takes_all_with_it(
    end: str, code: int, words: str, accelerate: Run, script: Write, tmp_path: Path
) -> None:
    child = "import subprocess\nsubprocess.Popen(['sleep', '601'])\n"
    done = accelerate(*TWO, script(f"{RANK}{child}if rank == 1:\n    time.sleep(0.2)\n    {end}\n{WAIT}"))
    assert done.returncode == code
    assert "rank 1 (pid " in last_line(done) and words in last_line(done)
    assert left_over(tmp_path) == []


@pytest.mark.slow
def test_a_rank_that_will_not_end_is_killed(accelerate: Run, script: Write, tmp_path: Path) -> None:
    stubborn = "import signal\nif rank == 0:\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    done = accelerate(*TWO, script(f"{RANK}{stubborn}if rank == 1:\n    time.sleep(1)\n    sys.exit(4)\n{WAIT}"))
    assert done.returncode == 4 and "rank 1 (pid " in last_line(done) and left_over(tmp_path) == []


@pytest.mark.slow
def test_ranks_start_again(accelerate: Run, script: Write) -> None:
    name = script(
        SAY + "import sys\n"
        "attempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "if attempt < 2 and os.environ['RANK'] == '1':\n"
        "    sys.exit(5)\n"
        "import torch\n"
        "from accelerate import PartialState\n"
        "from accelerate.utils import gather\n"
        "say(attempt, gather(torch.ones(1) * PartialState().process_index).tolist())\n"
    )
    done = accelerate(*TWO, "--max_restarts", "2", name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["2 [0.0, 1.0]"] * 2
    assert done.stderr.count("a rank failed; starting all ranks again") == 2


@pytest.mark.parametrize(
    ("how", "code"),
    [
        pytest.param(signal.SIGKILL, -signal.SIGKILL, id="SIGKILL"),
        pytest.param(signal.SIGINT, 128 + signal.SIGINT, id="SIGINT"),
        pytest.param(signal.SIGTERM, 128 + signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_launcher_that_is_ended_leaves_nobody_behind(
    how: signal.Signals, code: int, start: Start, script: Write, tmp_path: Path
) -> None:
    child = "import subprocess\nsubprocess.Popen(['sleep', '602'])\n"
    launcher = start(*TWO, script(RANK + child + WAIT))
    assert launcher.stdout is not None
    for _ in range(2):
        assert "is up" in launcher.stdout.readline()
    launcher.send_signal(how)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == code
    if how != signal.SIGKILL:  # who kills the launcher ends it before it can say a word or wait
        assert left_over(tmp_path) == []
        assert errors.splitlines()[-1].startswith("accelerate launch: ")
        assert errors.count("Traceback") == (2 if how == signal.SIGINT else 0)  # one for each rank, none of ours
    deadline = time.monotonic() + 10
    while left_over(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_over(tmp_path) == []


def test_what_ranks_leave_running_on_purpose_lives(accelerate: Run, script: Write, tmp_path: Path) -> None:
    name = script(
        RANK
        + "import subprocess\nif rank == 0:\n    print(subprocess.Popen(['sleep', '603'], stdout=-3, stderr=-3).pid)\n"
    )
    done = accelerate(*TWO, name)
    assert done.returncode == 0, done.stderr
    os.kill(int(done.stdout), signal.SIGKILL)  # raises when it is gone already
