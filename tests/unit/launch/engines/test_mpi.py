"""mpirun in four spellings, as values; and what is looked at before it is started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from accelerate.launch.engines import mpi
from accelerate.launch.host import HostInfo, host_warnings, resolve_settings
from accelerate.launch.parse import parse
from accelerate.launch.plan import build_plan, plan
from accelerate.runtime.cluster.cluster_env import RankInfo
from accelerate.settings.launcher import LaunchSettings
from accelerate.settings.option import SettingsError
from tests.helpers.programs import shebang

HERE = HostInfo(device="cpu", devices=0, cores=8, interface="lo", directory="/here", python=("PY",))
FOUR = (
    "--cpu",
    "--num_processes",
    "4",
    "--num_machines",
    "2",
    "--main_process_ip",
    "10.0.0.1",
    "--mpirun_hostfile",
    "H",
)


@pytest.fixture(autouse=True)
def no_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("kind", "one", "two"),
    [
        (
            "openmpi",
            "mpirun --hostfile H --npernode 2 -n 2 --bind-to socket PY s.py",
            "mpirun --hostfile H --npernode 2 -n 4 --bind-to socket -x A -x B PY s.py",
        ),
        (
            "mpich",
            "mpirun -f H -ppn 2 -n 2 -bind-to socket PY s.py",
            "mpirun -f H -ppn 2 -n 4 -bind-to socket -genvall PY s.py",
        ),
        (
            "intel",
            "mpirun -f H -ppn 2 -n 2 -genv I_MPI_PIN_DOMAIN socket PY s.py",
            "mpirun -f H -ppn 2 -n 4 -genv I_MPI_PIN_DOMAIN socket -genvall PY s.py",
        ),
        (
            "mvapich",
            "mpirun -f H -ppn 2 -n 2 -bind-to socket PY s.py",
            "mpirun -f H -ppn 2 -n 4 -bind-to socket -genvall PY s.py",
        ),
    ],
)
def test_four_spellings(kind: str, one: str, two: str) -> None:
    settings = parse(["--num_processes", "2", "--mpirun_hostfile", "H", "s.py"]).replace(mpi=kind, python=("PY",))
    assert " ".join(build_plan(settings).command) == one
    made = build_plan(parse([*FOUR, "s.py"]).replace(mpi=kind, python=("PY",)))
    exported = "".join(f" -x {name}" for name in made.environment)
    assert " ".join(made.command) == two.replace(" -x A -x B", exported)


def test_processes_learn_where_they_meet_and_how_many_threads_oneccl_has() -> None:
    made = plan([*FOUR, "--main_process_port", "29600", "--mpirun_ccl", "3", "s.py"]).environment
    expected = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29600", "CCL_WORKER_COUNT": "3"}
    assert {name: made[name] for name in expected} == expected
    alone = plan(
        ["--num_processes", "2", "--main_process_ip", "10.0.0.1", "--mpirun_hostfile", "H", "s.py"]
    ).environment
    assert (alone["MASTER_ADDR"], alone["MASTER_PORT"]) == ("127.0.0.1", "29500") and "CCL_WORKER_COUNT" not in alone
    with pytest.raises(SettingsError, match="mpirun_ccl: expected the number of oneCCL's threads, found 'many'"):
        plan([*FOUR, "--mpirun_ccl", "many", "s.py"])
    with pytest.raises(SettingsError, match="mpirun starts the processes of all machines: start it on one"):
        plan([*FOUR, "--machine_rank", "1", "s.py"])
    with pytest.raises(SettingsError, match="4 machines need the address of machine 0"):
        plan(["--num_processes", "4", "--num_machines", "4", "--mpirun_hostfile", "H", "s.py"])


def test_the_guides_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\ndowncast_bf16: 'no'\nipex_config:\n  ipex: true\n"
        "machine_rank: 0\nmain_process_ip: 36.112.23.24\nmain_process_port: 29500\nmain_training_function: main\n"
        "mixed_precision: bf16\nmpirun_config:\n  mpirun_ccl: '1'\n  mpirun_hostfile: /home/user/hostfile\nnum_machines: 4\n"
        "num_processes: 16\nrdzv_backend: static\nsame_network: true\ntpu_env: []\ntpu_use_cluster: false\n"
        "tpu_use_sudo: false\nuse_cpu: true\n"
    )
    asked = parse(["--config_file", str(path), "examples/nlp_example.py"])
    made = build_plan(resolve_settings(asked, HERE._replace(mpi="intel")))
    assert " ".join(made.command) == (
        "mpirun -f /home/user/hostfile -ppn 4 -n 16 -genv I_MPI_PIN_DOMAIN socket -genvall PY examples/nlp_example.py"
    )
    assert made.environment["MASTER_ADDR"] == "36.112.23.24" and made.environment["CCL_WORKER_COUNT"] == "1"
    # and under `mpirun -f hostfile -n 16 -ppn 4 accelerate launch`, with the same file on every machine
    place = mpi_place(rank=5)
    inside = build_plan(resolve_settings(asked, HERE._replace(rank_info=place)))
    assert (inside.launcher, inside.command) == ("python", ["PY", "examples/nlp_example.py"])
    assert (inside.environment["MASTER_ADDR"], inside.environment["MASTER_PORT"]) == ("36.112.23.24", "29500")


def mpi_place(rank: int = 0, size: int = 16, local_size: int = 4) -> RankInfo:
    return RankInfo(rank, size, rank % local_size, local_size, "Open MPI", address="")


def test_a_launch_inside_of_mpirun_starts_its_one_process_whatever_the_settings_say() -> None:
    asked = LaunchSettings(script="s.py", num_processes=4, num_machines=2, machine_rank=1, use_fsdp=True)
    asked = asked.replace(mpirun=asked.mpirun.replace(hostfile="H"))
    facts = HERE._replace(rank_info=mpi_place(rank=3))
    made = build_plan(resolve_settings(asked, facts))
    assert (made.launcher, made.command, made.processes, made.machines) == ("python", ["PY", "s.py"], 1, 1)
    assert "KMP_AFFINITY" not in build_plan(resolve_settings(asked.replace(cpu=True), facts)).environment
    assert "num_processes 4 is not used: Open MPI has started 16 processes" in host_warnings(asked, facts)[0]
    assert host_warnings(asked.replace(num_processes=16), facts) == []
    assert [resolve_settings(asked, facts._replace(rank_info=mpi_place(rank=rank))).quiet for rank in range(3)] == [
        False,
        True,
        True,
    ]


def test_machines_and_their_address_come_from_the_hostfile() -> None:
    asked = parse(["--num_processes", "4", "--mpirun_hostfile", "H", "s.py"])
    resolved = resolve_settings(asked, HERE._replace(hosts=("node0", "node1")))
    assert (resolved.machines, resolved.processes_here, resolved.main_process_ip) == (2, 2, "node0")
    given = resolve_settings(
        asked.replace(num_machines=1, main_process_ip="h"), HERE._replace(hosts=("node0", "node1"))
    )
    assert (given.machines, given.main_process_ip) == (1, "h")
    itself = resolve_settings(asked, HERE._replace(hosts=("localhost", "node1")))
    with pytest.raises(SettingsError, match="2 machines need the address of machine 0"):
        build_plan(itself)


def test_the_hosts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\nnode0 slots=4 # big\n\nnode1:8\nnode1:8\n10.0.0.1\nfd00::2\n")
    assert mpi.read_hostfile(str(path)) == ("node0", "node1", "10.0.0.1", "fd00::2")
    assert mpi.read_hostfile(str(tmp_path / "none")) == ()


def test_a_single_host_may_be_another_machine(tmp_path: Path) -> None:
    own = os.uname().nodename
    assert not mpi.any_remote(("localhost", "127.0.0.1", own))
    assert mpi.any_remote((own, "node7")) and mpi.any_remote(("10.0.0.9",))
    asked = parse(["--num_processes", "2", "--mpirun_hostfile", "H", "s.py"])
    assert "-x" in build_plan(resolve_settings(asked, HERE._replace(hosts=("node7",), elsewhere=True))).command
    assert "-x" not in build_plan(resolve_settings(asked, HERE._replace(hosts=("localhost",)))).command


def test_more_processes_than_cores_are_not_bound() -> None:
    asked = parse(["--num_processes", "9", "--mpirun_hostfile", "H", "s.py"])
    assert build_plan(resolve_settings(asked, HERE)).command[7:9] == ["--bind-to", "none"]
    assert "socket" in build_plan(resolve_settings(asked, HERE._replace(mpi="mpich"))).command


@pytest.mark.parametrize(
    ("says", "beside", "kind"),
    [
        ("mpirun (Open MPI) 4.1.4", "", "openmpi"),
        ("mpirun (OpenRTE) 3.0.0", "", "openmpi"),
        ("HYDRA build details:\n    Version: 4.0.2", "", "mpich"),
        ("HYDRA build details:\n    Version: 3.2", "mpirun_rsh", "mvapich"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.19.0", "", "intel"),
        ("who knows", "", "openmpi"),
        (None, "", "openmpi"),
    ],
)
def test_which_mpi_is_installed(
    says: str | None, beside: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mpirun", beside) if says is not None else ():
        if name:
            (tmp_path / name).write_text(f"{shebang()}print({says!r})\n")
            (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert mpi.detect_flavor() == kind


def test_what_is_looked_at_beforehand(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    settings = parse(["--num_processes", "2", "--mpirun_hostfile", str(hosts), "s.py"])

    def refused(message: str, root: bool = False, kind: str = "openmpi", **variables: str) -> None:
        with pytest.raises(SettingsError, match=message):
            mpi.check_host(settings.replace(mpi=kind), root, variables)

    refused("hosts does not exist.*HOST slots=N")
    hosts.write_text("# nobody\n")
    refused("names no host.*HOST:N", kind="mpich")
    hosts.write_text("node0 slots=4\n")
    refused("is written for Open MPI, but mpirun is Intel MPI's: write HOST:N", kind="intel")
    refused("Open MPI refuses to run as root.*OMPI_ALLOW_RUN_AS_ROOT=1 and", root=True)
    refused("Open MPI refuses to run as root", root=True, OMPI_ALLOW_RUN_AS_ROOT="1")
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    mpi.check_host(settings, True, allowed)
    mpi.check_host(settings, False, {})
    hosts.write_text(f"node0:4{os.linesep}")
    mpi.check_host(settings.replace(mpi="mpich"), True, {})
