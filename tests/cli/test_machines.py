"""`accelerate launch` on two machines, which are network namespaces here: they train; and what is said when they cannot.

Launches that wait for something run side by side; each has a port of its own, and each test looks at one of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.cli.conftest import COMMAND
from tests.helpers import hosts
from tests.helpers.hosts import Host

MISSING = hosts.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=f"no two hosts: {MISSING}")]
_PORTS = count(29600)
SAY = "import os, sys, time\ndef say(*words):\n    os.write(1, (' '.join(map(str, words)) + '\\n').encode())\n"
RANK = SAY + "rank = os.environ['RANK']\nsay('rank', rank, 'is up')\n"
SCRIPTS = {
    "wait.py": RANK + "if sys.argv[1:] == [rank]:\n    time.sleep(0.5)\n    sys.exit(3)\ntime.sleep(600)\n",
    "train.py": SAY + "import json, socket, torch\n"
    "from accelerate import Accelerator\n"
    "def main():\n"
    "    accelerator = Accelerator()\n"
    "    torch.manual_seed(accelerator.process_index)\n"
    "    model = torch.nn.Linear(4, 1)\n"
    "    x, y = torch.arange(64.0).reshape(16, 4) / 64, torch.arange(16.0).reshape(16, 1) / 16\n"
    "    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)\n"
    "    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
    "    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)\n"
    "    for x, y in loader:\n"
    "        accelerator.backward(torch.nn.functional.mse_loss(model(x), y))\n"
    "        optimizer.step()\n"
    "        optimizer.zero_grad()\n"
    "    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()\n"
    "    ranks = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()\n"
    "    where = [socket.gethostname(), accelerator.process_index, accelerator.local_process_index]\n"
    "    say(json.dumps([where, ranks, weights, os.environ['GLOO_SOCKET_IFNAME']]))\n"
    "main()\n",
    "lose.py": SAY + "import torch\n"
    "from accelerate import Accelerator\n"
    "accelerator = Accelerator()\n"
    "for step in range(10000):\n"
    "    accelerator.reduce(torch.ones(1))\n"
    "    if step == 3:\n"
    "        say('rank', accelerator.process_index, 'is up')\n"
    "    time.sleep(0.02)\n",
    "again.py": SAY + "attempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
    "if attempt == 0:\n"
    "    if os.environ['RANK'] == '1':\n"
    "        time.sleep(1)\n"
    "        sys.exit(5)\n"
    "    time.sleep(600)\n"  # in no collective: the launchers must tell each other
    "import torch\n"
    "from accelerate import Accelerator\n"
    "accelerator = Accelerator()\n"
    "say(attempt, accelerator.gather(torch.tensor([accelerator.process_index])).tolist())\n",
}


class Done(NamedTuple):
    """How a launcher ended."""

    code: int
    out: str
    errors: str

    @property
    def last(self) -> str:
        return self.errors.splitlines()[-1] if self.errors else ""


class Lab(NamedTuple):
    """Two hosts, and how commands run on them."""

    hosts: tuple[Host, Host]
    folder: Path
    environment: Mapping[str, str]

    def launch(self, host: int, *words: str) -> subprocess.Popen[str]:
        words = ("launch", "--cpu", *words)
        return self.hosts[host].start(*COMMAND, *words, cwd=self.folder, env=self.environment)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("machines")
    for name, text in SCRIPTS.items():
        (folder / name).write_text(text)
    foreign = ("ACCELERATE_", "OMP_", "GLOO_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    machines = hosts.two_hosts()
    try:
        yield Lab(machines, folder, {**kept, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"})
    finally:
        for machine in machines:
            machine.remove()


class Pair(NamedTuple):
    """Two launchers, one on each host.

    Attributes:
        words: For both; a port is added unless they hold one.
        first: More for machine 0; None leaves it out.
        second: More for machine 1; None leaves it out.
        script: What they launch, and its arguments.
        act: Called with both launchers once both ranks are up.
    """

    words: tuple[str, ...] = ()
    first: tuple[str, ...] | None = ("--machine_rank", "0")
    second: tuple[str, ...] | None = ("--machine_rank", "1")
    script: tuple[str, ...] = ("wait.py",)
    act: Callable[[subprocess.Popen[str], subprocess.Popen[str]], None] | None = None

    def run(self, lab: Lab) -> list[Done]:
        common = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "10.77.0.1"]
        if "--main_process_port" not in self.words:
            common += ["--main_process_port", str(next(_PORTS))]
        started = [
            lab.launch(host, *common, *self.words, *more, *self.script)
            for host, more in enumerate((self.first, self.second))
            if more is not None
        ]
        if self.act is not None:
            for launcher in started:
                assert launcher.stdout is not None
                line = launcher.stdout.readline()
                assert "is up" in line, launcher.communicate()
            self.act(*started)
        streams = [launcher.communicate(timeout=150) for launcher in started]
        return [Done(one.returncode, *texts) for one, texts in zip(started, streams, strict=True)]


def run_all(lab: Lab, pairs: Mapping[str, Pair]) -> dict[str, list[Done]]:
    with ThreadPoolExecutor(len(pairs)) as pool:
        return dict(zip(pairs, pool.map(lambda pair: pair.run(lab), pairs.values()), strict=True))


# They train ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("each", "backend", "how"),
    [(1, "static", "flags"), (2, "static", "file"), (2, "c10d", "flags"), (1, "c10d", "file")],
)
def test_two_machines_train(each: int, backend: str, how: str, lab: Lab) -> None:
    port = next(_PORTS)
    options: dict[str, Any] = {
        "num_machines": 2,
        "num_processes": 2 * each,
        "main_process_ip": "first",  # a name, as a person would give
        "main_process_port": port,
        "rdzv_backend": backend,
    }
    started = []
    for rank in (0, 1):
        mine = {**options, "machine_rank": rank}
        if how == "flags":
            words = [word for name, value in mine.items() for word in (f"--{name}", str(value))]
        else:
            file = lab.folder / f"{backend}{each}{rank}.yaml"
            file.write_text(yaml.safe_dump({"distributed_type": "MULTI_CPU", "use_cpu": True, **mine}))
            words = ["--config_file", str(file)]
        started.append(lab.launch(rank, *words, "train.py"))
    lines = []
    for launcher, host in zip(started, lab.hosts, strict=True):
        out, errors = launcher.communicate(timeout=150)
        assert launcher.returncode == 0, errors
        assert "accelerate launch: " not in errors and "Traceback" not in errors
        found = [json.loads(line) for line in out.splitlines()]
        assert sorted(where[2] for where, *_ in found) == list(range(each))
        assert {where[0] for where, *_ in found} == {host.name}
        lines += found
    assert sorted(where[1] for where, *_ in lines) == list(range(2 * each))
    assert all(ranks == list(range(2 * each)) and interface == "veth0" for _, ranks, _, interface in lines)
    assert all(weights == lines[0][2] for _, _, weights, _ in lines) and len(lines[0][2]) == 5
    if backend == "static":
        assert [where[:2] for where, *_ in sorted(lines)] == sorted(
            [lab.hosts[rank // each].name, rank] for rank in range(2 * each)
        )


def test_the_meeting_listens_on_the_main_address_only(lab: Lab) -> None:
    port = next(_PORTS)
    words = (
        "--num_machines",
        "2",
        "--num_processes",
        "2",
        "--main_process_ip",
        "first",
        "--main_process_port",
        str(port),
    )
    launcher = lab.launch(0, *words, "wait.py")
    deadline = time.monotonic() + 60
    while not (found := lab.hosts[0].listeners()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found == [f"10.77.0.1:{port}"]
    launcher.send_signal(signal.SIGINT)
    _, errors = launcher.communicate(timeout=60)
    assert (launcher.returncode, errors.splitlines()[-1]) == (130, "accelerate launch: interrupted")


# They do not meet ------------------------------------------------------------------------------------------------------

SOON = ("--rdzv_conf", "timeout=3")
NOT_MET: dict[str, Pair] = {
    "machine 1 never comes": Pair(SOON, second=None),
    "machine 0 never comes": Pair(SOON, first=None),
    "a wrong port": Pair(SOON, second=("--machine_rank", "1", "--main_process_port", "28999")),
    "a firewall": Pair((*SOON, "--main_process_port", "28998")),
    "rank 0 twice": Pair(second=("--machine_rank", "0")),
    "another number of processes": Pair(second=("--machine_rank", "1", "--num_processes", "4")),
    "another number of machines": Pair(second=("--machine_rank", "1", "--num_machines", "3", "--num_processes", "3")),
    "another rendezvous": Pair(second=("--machine_rank", "1", "--rdzv_backend", "c10d")),
    "a port that is taken": Pair((*SOON, "--main_process_port", "28997")),
    "no way": Pair(("--main_process_ip", "10.99.0.1")),
    "no such name": Pair(("--main_process_ip", "nosuch.example")),
    "words for a number": Pair(("--rdzv_conf", "timeout=soon"), second=None),
    "no key and value": Pair(("--rdzv_conf", "soon"), second=None),
    "c10d alone": Pair(("--rdzv_backend", "c10d", "--rdzv_conf", "join_timeout=3"), first=(), second=None),
}
WAITED = (
    "accelerate launch: machine 0 ({0}) waited 3 s at 10.77.0.1:{port}: of 2 machines, machine 1 has not come. Look at"
)
TRIED = "accelerate launch: machine 1 ({1}) tried for 3 s to reach machine 0 at 10.77.0.1:{port}: "
# What each machine says in the end, and its exit code.
SAID: dict[str, list[tuple[int, str]]] = {
    "machine 1 never comes": [(1, WAITED)],
    "machine 0 never comes": [(1, TRIED + "connection refused: nothing listens on that port. Is machine 0 running")],
    "a wrong port": [(1, WAITED), (1, TRIED.replace("{port}", "28999") + "connection refused: nothing listens")],
    "a firewall": [(1, WAITED), (1, TRIED + "timeout: the machine is off, or a firewall drops")],
    "rank 0 twice": [
        (1, "two machines host the rendezvous at 10.77.0.1:{port}: machine 0 ({0}), which owns the address"),
        (2, "and machine 0 ({1}). Each machine needs a --machine_rank of its own."),
    ],
    "another number of processes": [
        (1, "machine 1 ({1}) has --num_processes 4, but machine 0 ({0}) has --num_processes 2: it must be the same"),
        (2, "machine 1 ({1}) has --num_processes 4, but machine 0 ({0}) has --num_processes 2: it must be the same"),
    ],
    "another number of machines": [
        (1, "machine 1 ({1}) has --num_machines 3, but machine 0 ({0}) has --num_machines 2: it must be the same"),
        (2, "machine 1 ({1}) has --num_machines 3, but machine 0 ({0}) has --num_machines 2: it must be the same"),
    ],
    "another rendezvous": [
        (1, "--rdzv_backend c10d, but machine 0 ({0}) has --rdzv_backend static"),
        (2, "the same on all"),
    ],
    "a port that is taken": [
        (2, "machine 0 ({0}) cannot listen on 10.77.0.1:28997: another program has taken the port. Choose another"),
        (1, TRIED + "something other than `accelerate launch` answers on that port. "),
    ],
    "no way": [
        (2, "machine 0 ({0}): no route to 10.99.0.1 (Network is unreachable). See --main_process_ip"),
        (2, "machine 1 ({1}): no route to 10.99.0.1 (Network is unreachable). See --main_process_ip"),
    ],
    "no such name": [(2, "cannot look up the main address: host name 'nosuch.example' cannot be resolved")] * 2,
    "words for a number": [(2, "--rdzv_conf timeout: expected a number, found 'soon'.")],
    "no key and value": [(2, "--rdzv_conf: expected key=value,key=value, found 'soon'.")],
    "c10d alone": [(1, "this machine ({0}) waited 3 s at 10.77.0.1:{port}: of 2 machines, only {0} came.")],
}


@pytest.fixture(scope="module")
def not_met(lab: Lab) -> dict[str, list[Done]]:
    lab.hosts[0].block(28998)
    holds = "import socket, time\ns = socket.socket()\ns.bind(('10.77.0.1', 28997))\ns.listen()\nprint(1, flush=True)\n"
    other = lab.hosts[0].start(sys.executable, "-c", f"{holds}time.sleep(600)", cwd=lab.folder, env=lab.environment)
    assert other.stdout is not None and other.stdout.readline()
    done = run_all(lab, NOT_MET)
    other.kill()
    other.communicate()
    return done


@pytest.mark.parametrize("name", NOT_MET)
def test_machines_that_do_not_meet(name: str, not_met: dict[str, list[Done]], lab: Lab) -> None:
    for done, (code, words) in zip(not_met[name], SAID[name], strict=True):
        assert done.code == code, done.errors
        before, _, after = words.format(*(host.name for host in lab.hosts), port="{port}").partition("{port}")
        assert before in done.last and after in done.last, done.errors
        assert "Traceback" not in done.errors and "is up" not in done.out
    assert lab.hosts[0].processes() + lab.hosts[1].processes() == []


def test_a_rank_that_was_given_twice(lab: Lab) -> None:
    common = (
        "--num_machines",
        "3",
        "--num_processes",
        "3",
        "--main_process_ip",
        "first",
        "--main_process_port",
        "28996",
    )
    started = [
        lab.launch(host, *common, "--machine_rank", rank, "wait.py") for host, rank in ((0, "0"), (1, "1"), (0, "1"))
    ]
    for launcher in started:
        _, errors = launcher.communicate(timeout=120)
        assert launcher.returncode in (1, 2), errors  # 2 where it was noticed
        assert "accelerate launch: --machine_rank 1 was given twice, on acc" in errors.splitlines()[-1]
        assert "each of the 3 machines needs a rank of its own, from 0" in errors and "Traceback" not in errors


# They part -------------------------------------------------------------------------------------------------------------


def kill_first(first: subprocess.Popen[str], _: subprocess.Popen[str]) -> None:
    first.kill()


def kill_second(_: subprocess.Popen[str], second: subprocess.Popen[str]) -> None:
    second.kill()


def interrupt_first(first: subprocess.Popen[str], _: subprocess.Popen[str]) -> None:
    first.send_signal(signal.SIGINT)


ALIVE = ("--rdzv_conf", "keep_alive_interval=1,keep_alive_max_attempt=3")
PARTED: dict[str, Pair] = {
    "launcher 1 is killed": Pair(ALIVE, act=kill_second),
    "launcher 0 is killed": Pair(act=kill_first),
    "launcher 0 is interrupted": Pair(act=interrupt_first),
    "a rank of machine 1 fails": Pair(script=("wait.py", "1")),
    "a rank of machine 0 fails, c10d": Pair(("--rdzv_backend", "c10d"), script=("wait.py", "0")),
}
GONE = "is gone: {}. Its launcher was killed, it stopped, or the network failed"


@pytest.fixture(scope="module")
def parted(lab: Lab) -> dict[str, list[Done]]:
    return run_all(lab, PARTED)


def test_a_machine_that_is_gone(parted: dict[str, list[Done]], lab: Lab) -> None:
    left, killed = parted["launcher 1 is killed"]
    assert (left.code, killed.code) == (1, -signal.SIGKILL)
    assert left.last == f"accelerate launch: machine 1 ({lab.hosts[1].name}) {GONE.format('no heartbeat for 3 s')}"
    killed, left = parted["launcher 0 is killed"]
    assert (left.code, killed.code) == (1, -signal.SIGKILL)
    lost = GONE.format("the connection to it is lost")
    assert left.last == f"accelerate launch: machine 0 ({lab.hosts[0].name}) {lost}"


def test_an_interrupt_ends_both(parted: dict[str, list[Done]], lab: Lab) -> None:
    here, there = parted["launcher 0 is interrupted"]
    assert (here.code, there.code) == (130, 130)
    assert here.last == "accelerate launch: interrupted"
    assert there.last == f"accelerate launch: machine 0 ({lab.hosts[0].name}): interrupted"


@pytest.mark.parametrize(("name", "at"), [("a rank of machine 1 fails", 1), ("a rank of machine 0 fails, c10d", 0)])
def test_a_rank_that_fails_is_named_on_both(name: str, at: int, parted: dict[str, list[Done]], lab: Lab) -> None:
    there, other = parted[name][at], parted[name][1 - at]
    assert (there.code, other.code) == (3, 3), there.errors + other.errors
    assert there.last.startswith(f"accelerate launch: rank {at} (pid ") and there.last.endswith("exited with code 3")
    said = there.last.removeprefix("accelerate launch: ")
    assert other.last == f"accelerate launch: machine {at} ({lab.hosts[at].name}): {said}"


def test_nobody_is_left(parted: dict[str, list[Done]], lab: Lab) -> None:
    assert parted and lab.hosts[0].processes() + lab.hosts[1].processes() == []
    assert not any("Traceback" in done.errors for name in PARTED if "interrupted" not in name for done in parted[name])


# They go on ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training(lab: Lab) -> dict[str, list[Done]]:
    again = {
        backend: Pair(("--max_restarts", "1", "--rdzv_backend", backend), script=("again.py",))
        for backend in ("static", "c10d")
    }
    return run_all(lab, {**again, "killed": Pair(script=("lose.py",), act=kill_second)})


@pytest.mark.parametrize("backend", ["static", "c10d"])
def test_ranks_start_again_on_both(backend: str, training: dict[str, list[Done]]) -> None:
    for done in training[backend]:
        assert (done.code, done.out) == (0, "1 [0, 1]\n"), done.errors
        assert "starting all ranks again (0 more restarts)" in done.errors


def test_ranks_that_lose_a_machine(training: dict[str, list[Done]], lab: Lab) -> None:
    left, _ = training["killed"]
    assert left.code == 1 and "Traceback" in left.errors  # the rank's own
    assert left.last.startswith(f"accelerate launch: machine 1 ({lab.hosts[1].name}) is gone: no heartbeat")
    assert lab.hosts[0].processes() + lab.hosts[1].processes() == []
