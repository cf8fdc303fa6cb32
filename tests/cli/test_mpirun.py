"""Training under a real mpirun: started by `accelerate launch`, around it, and around python."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND, Run
from tests.helpers.hosts import Host, missing, two_hosts

Write = Callable[[str], str]
pytestmark = pytest.mark.slow

# As root, and with more processes than cores: both must be allowed to Open MPI by its own variables.
ALLOWED = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}
# Each rank has data and first weights of its own; after three steps all must hold the same weights, and not the first ones.
TRAIN = """
import json, os, sys, torch
from accelerate import Accelerator
from accelerate.utils import gather_object
accelerator = Accelerator(cpu=True)
torch.manual_seed(accelerator.process_index)
model, before = torch.nn.Linear(3, 1), None
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
before = model.module.weight.tolist()
for _ in range(3):
    optimizer.zero_grad()
    accelerator.backward(model(torch.randn(4, 3)).square().mean())
    optimizer.step()
seen = gather_object([model.module.weight.tolist()])
names = ("MASTER_ADDR", "MASTER_PORT", "CCL_WORKER_COUNT", "GLOO_SOCKET_IFNAME")
told = {name: os.environ.get(name) for name in names}
place = [accelerator.process_index, accelerator.num_processes, accelerator.local_process_index]
equal = all(weight == seen[0] for weight in seen) and seen[0] != before and len(seen) == place[1]
os.write(1, (json.dumps([place, str(accelerator.distributed_type), equal, told, sys.argv[1:]]) + "\\n").encode())
"""


@pytest.fixture(autouse=True)
def mpirun() -> str:
    path = shutil.which("mpirun")
    if path is None:
        pytest.skip("mpirun is not installed (apt install openmpi-bin)")
    if "Open MPI" not in subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout:
        pytest.skip("mpirun is not Open MPI's, whose hostfile and variables this file has")
    return path


def trained(done: subprocess.CompletedProcess[str], ranks: int) -> list[tuple[dict[str, str], list[str]]]:
    """What each rank was told, and its arguments, after all have trained to the same weights."""
    assert done.returncode == 0, done.stderr
    said = sorted(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert [place for place, *_ in said] == [[rank, ranks, rank] for rank in range(ranks)], done.stdout + done.stderr
    assert all(kind == "DistributedType.MULTI_CPU" and equal for _, kind, equal, *_ in said)
    return [(told, words) for *_, told, words in said]


def test_accelerate_launch_with_a_config_file(accelerate: Run, script: Write, tmp_path: Path) -> None:
    ranks = 4
    (tmp_path / "hosts").write_text(f"localhost slots={ranks}\n")
    (tmp_path / "config.yaml").write_text(
        f"distributed_type: MULTI_CPU\nuse_cpu: true\nnum_machines: 1\nnum_processes: {ranks}\nmain_process_port: 0\n"
        f"mpirun_config:\n  mpirun_ccl: '2'\n  mpirun_hostfile: {tmp_path}/hosts\n"
    )
    words = ["$HOME", "two words", "`id`"]
    done = accelerate("launch", "--config_file", "config.yaml", script(TRAIN), *words, **ALLOWED)
    for told, argv in trained(done, ranks):
        assert argv == words
        assert told["MASTER_ADDR"] == "127.0.0.1" and told["CCL_WORKER_COUNT"] == "2"
        assert f"using port {told['MASTER_PORT']}" in done.stderr
        assert told["GLOO_SOCKET_IFNAME"] == "lo"


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_mpirun_accelerate_launch_starts_nothing_more(accelerate: Run, script: Write, tmp_path: Path) -> None:
    """Each of mpirun's processes is one rank, though the file speaks of mpirun and of four processes."""
    (tmp_path / "config.yaml").write_text(
        "distributed_type: MULTI_CPU\nuse_cpu: true\nnum_machines: 2\nmachine_rank: 1\nnum_processes: 4\n"
        "main_process_ip: 127.0.0.1\nmpirun_config:\n  mpirun_hostfile: hosts\n"
    )
    around = ["mpirun", "-n", "2", *COMMAND]
    variables = {**ALLOWED, "MASTER_PORT": free_port()}
    done = accelerate("launch", "--config_file", "config.yaml", script(TRAIN), command=around, **variables)
    for told, _ in trained(done, 2):
        assert told["MASTER_PORT"] == variables["MASTER_PORT"]
    assert done.stderr.count("num_processes 4 is not used: Open MPI has started 2 processes") == 1


def test_mpirun_python(accelerate: Run, script: Write) -> None:
    around = ["mpirun", "-n", "2", "--bind-to", "none", sys.executable]
    trained(accelerate(script(TRAIN), command=around, **ALLOWED, MASTER_PORT=free_port()), 2)


def test_a_rank_that_fails_gives_the_launch_its_exit_code(accelerate: Run, script: Write, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    name = script(
        "import os, sys, time\nsys.exit(7) if os.environ['OMPI_COMM_WORLD_RANK'] == '1' else time.sleep(60)\n"
    )
    done = accelerate("launch", "--num_processes", "2", "--mpirun_hostfile", "hosts", name, **ALLOWED)
    assert done.returncode == 7, done.stderr


def test_root_is_told_what_open_mpi_wants_before_it_is_started(accelerate: Run, script: Write, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("this is not root")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    done = accelerate("launch", "--num_processes", "2", "--mpirun_hostfile", "hosts", script(TRAIN))
    assert done.returncode == 2 and done.stdout == ""
    assert "Open MPI refuses to run as root." in done.stderr and "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1" in done.stderr


AGENT = """#!/bin/sh
# What Open MPI takes for ssh: `agent HOST COMMAND`.
case "$1" in {first}) host={first_name} ;; *) host={second_name} ;; esac
shift
exec ip netns exec "$host" unshare --uts env -i PATH="$PATH" sh -c 'hostname "$0"; exec sh -c "$*"' "$host" "$@"
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two machines, and a file that names them. mpirun reaches the second through a command that stands for ssh."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    first, second = pair = two_hosts()
    names = {"first": first.address, "first_name": first.name, "second_name": second.name}
    (tmp_path / "agent").write_text(AGENT.format(**names))
    (tmp_path / "agent").chmod(0o755)
    (tmp_path / "hosts").write_text(f"{first.address} slots=2\n{second.address} slots=2\n")
    try:
        yield pair
    finally:
        for host in pair:
            host.remove()


@pytest.mark.parametrize("within", [False, True], ids=["accelerate-launch", "mpirun-python"])
def test_two_machines(
    hosts: tuple[Host, Host], script: Write, tmp_path: Path, environment: dict[str, str], within: bool
) -> None:
    """The other machine gets the launcher's variables, which nobody has set there, and both find rank 0."""
    name = script(TRAIN)
    own = ["launch", "--cpu", "--num_processes", "2", "--mpirun_hostfile", "hosts", "--mpirun_ccl", "3", name]
    around = ["mpirun", "--hostfile", "hosts", "-n", "2", "--npernode", "1", sys.executable, name]
    variables = {
        **environment,
        **ALLOWED,
        "OMPI_MCA_plm_rsh_agent": str(tmp_path / "agent"),
        "OMPI_MCA_btl": "tcp,self",
    }
    process = hosts[0].start(*(around if within else [*COMMAND, *own]), cwd=tmp_path, env=variables)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    said = sorted(json.loads(line) for line in out.splitlines() if line.startswith("["))
    assert [place for place, *_ in said] == [[0, 2, 0], [1, 2, 0]] and all(equal for _, _, equal, *_ in said)
    for *_, told, _ in said:
        assert told["MASTER_ADDR"] == hosts[0].address and told["GLOO_SOCKET_IFNAME"] == "veth0"
        assert told["CCL_WORKER_COUNT"] == (None if within else "3")
