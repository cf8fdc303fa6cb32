"""A run on one machine opens no port to others, however it is started and whatever the machine's own name stands for."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND
from tests.helpers import hosts
from tests.helpers.hosts import Host

MISSING = hosts.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=f"no host of its own: {MISSING}")]
# Joins a group, says so, and stays in it.
RANK = (
    "import os, time, torch\n"
    "from accelerate import Accelerator\n"
    "def main():\n"
    "    accelerator = Accelerator()\n"
    "    total = accelerator.reduce(torch.ones(1)).item()\n"
    "    os.write(1, f'up {total:g}\\n'.encode())\n"
    "    time.sleep(600)\n"
)
STARTS = {
    "one process": ([*COMMAND, "launch", "--cpu", "rank.py"], 1),
    "two ranks": ([*COMMAND, "launch", "--cpu", "--num_processes", "2", "rank.py"], 2),
    "notebook_launcher": ([sys.executable, "notebook.py"], 2),
    "debug_launcher": ([sys.executable, "debug.py"], 2),
    "torchrun": (
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--master_addr",
            "127.0.0.1",
            "--nproc_per_node",
            "2",
            "rank.py",
        ],
        2,
    ),
}


@pytest.fixture(scope="module")
def listening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, set[str]]]:
    """What `ss -ltn` shows on a host of its own while each of the launches is up."""
    folder = tmp_path_factory.mktemp("ports")
    (folder / "rank.py").write_text(RANK + "main()\n")
    (folder / "notebook.py").write_text(
        f"{RANK}from accelerate import notebook_launcher\nnotebook_launcher(main, num_processes=2)\n"
    )
    (folder / "debug.py").write_text(f"{RANK}from accelerate import debug_launcher\ndebug_launcher(main)\n")
    foreign = ("ACCELERATE_", "OMP_", "GLOO_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    host = Host(f"acc{os.getpid()}p", "10.77.0.1")
    try:
        host.ip("link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
        host.ip("addr", "add", "10.77.0.1/24", "dev", "veth0")
        host.ip("link", "set", "veth0", "up")
        host.ip("link", "set", "veth1", "up")
        host.call_itself("10.77.0.1")  # left alone, gloo listens on that
        yield {name: shown(host, words, count, folder, kept) for name, (words, count) in STARTS.items()}
    finally:
        host.remove()


def shown(host: Host, words: list[str], count: int, folder: Path, kept: dict[str, str]) -> set[str]:
    variables = {**kept, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    started = host.start(*words, cwd=folder, env=variables)
    assert started.stdout is not None
    try:
        for _ in range(count):
            while not (line := started.stdout.readline()).startswith("up "):
                assert line, started.communicate()  # it has ended
            assert line == f"up {count}\n"
        return {address.rpartition(":")[0] for address in host.listeners()}
    finally:
        for pid in host.processes():
            os.kill(pid, signal.SIGKILL)
        started.communicate()
        while host.processes():
            time.sleep(0.05)


@pytest.mark.parametrize("name", [name for name in STARTS if name != "torchrun"])
def test_nobody_else_can_connect(name: str, listening: dict[str, set[str]]) -> None:
    assert listening[name] == ({"127.0.0.1"} if STARTS[name][1] > 1 else set())


def test_the_look_sees_what_is_open(listening: dict[str, set[str]]) -> None:
    # torchrun listens everywhere, and its ranks at an address that depends on the release: the tests above can fail.
    assert "*" in listening["torchrun"]
