"""DeepSpeed's own launcher: its command line for each way to reach other machines, and what is refused beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from accelerate.launch import host
from accelerate.launch.engines import deepspeed
from accelerate.launch.host import HostInfo, resolve_settings
from accelerate.launch.parse import parse
from accelerate.launch.plan import build_plan, plan
from accelerate.runtime.cluster.slurm import SlurmStep
from accelerate.settings.enums import DEEPSPEED_MULTINODE_LAUNCHERS
from accelerate.settings.option import SettingsError

BASE = "--use_deepspeed --num_processes 4 --num_machines 2 --main_process_ip 10.0.0.1 --main_process_port 29600"
HOSTS = f"{BASE} --deepspeed_hostfile H --deepspeed_multinode_launcher"
MEET = "--master_addr 10.0.0.1 --master_port 29600"


@pytest.fixture(autouse=True)
def no_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("flags", "command"),
    [
        (f"{BASE} --deepspeed_hostfile H", f"--launcher pdsh --num_gpus 2 {MEET} s.py a"),
        (f"{HOSTS} pdsh --deepspeed_exclusion_filter w0", f"--launcher pdsh --exclude w0 {MEET} s.py a"),
        (f"{HOSTS} pdsh --deepspeed_inclusion_filter w1:0,1", f"--launcher pdsh --include w1:0,1 {MEET} s.py a"),
        (f"{HOSTS} slurm", f"--launcher slurm --num_gpus 2 {MEET} s.py a"),
        (f"{HOSTS} nossh --machine_rank 1", f"--no_ssh --node_rank 1 --num_gpus 2 {MEET} s.py a"),
        # these three refuse --num_gpus: the hostfile's slots say how many
        (f"{HOSTS} openmpi -m", f"--launcher openmpi {MEET} --module s.py a"),
        (f"{HOSTS} mvapich --no_python", f"--launcher mvapich {MEET} --no_python s.py a"),
        (f"{HOSTS} mpich", f"--launcher mpich {MEET} s.py a"),
    ],
)
def test_commands(flags: str, command: str) -> None:
    made = plan([*flags.split(), "s.py", "a"])
    assert (made.launcher, " ".join(made.command)) == ("deepspeed", f"deepspeed --hostfile H --no_local_rank {command}")


def test_every_launcher_has_a_row_and_standard_goes_through_torch() -> None:
    assert set(deepspeed.LAUNCHERS) == set(DEEPSPEED_MULTINODE_LAUNCHERS) - {"standard"}
    made = plan([*BASE.split(), "--deepspeed_multinode_launcher", "standard", "--machine_rank", "1", "s.py"])
    assert made.launcher == "torch"
    assert "--nnodes 2 --nproc_per_node 2 --node_rank 1" in " ".join(made.command)
    assert plan(["--use_deepspeed", "--num_processes", "2", "s.py"]).launcher == "torch"


def test_processes_that_an_mpi_or_slurm_starts_learn_where_they_meet() -> None:
    assert plan([*HOSTS.split(), "openmpi", "s.py"]).environment["MASTER_ADDR"] == "10.0.0.1"
    assert plan([*HOSTS.split(), "mvapich", "s.py"]).environment["MASTER_PORT"] == "29600"
    assert plan([*HOSTS.split(), "slurm", "s.py"]).environment["MASTER_PORT"] == "29600"
    assert "MASTER_ADDR" not in plan([*HOSTS.split(), "pdsh", "s.py"]).environment


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (BASE, "2 machines through DeepSpeed's launcher pdsh need a file of hosts: give --deepspeed_hostfile"),
        (f"{HOSTS} openmpi --deepspeed_inclusion_filter w1", "openmpi uses every host of the hostfile, so 'w1'"),
        (f"{HOSTS} pdsh --deepspeed_inclusion_filter a --deepspeed_exclusion_filter b", "give one of them"),
        (f"{HOSTS} pdsh --machine_rank 1", "pdsh starts the processes of all machines"),
        (f"{HOSTS} slurm -m", "slurm runs Python files only"),
        (
            "--use_deepspeed --num_processes 4 --num_machines 2 --deepspeed_hostfile H --deepspeed_multinode_launcher nossh",
            "nossh needs the address of machine 0",
        ),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(flags: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        plan([*flags.split(), "s.py"])


@pytest.mark.parametrize("word", ['{"a": 1}', "$HOME", "a;b", "`id`", "a\nb", "*"])
def test_arguments_that_a_shell_elsewhere_would_read_are_refused_not_mangled(word: str) -> None:
    with pytest.raises(SettingsError, match="a shell on each machine"):
        plan([*HOSTS.split(), "pdsh", "s.py", word])
    assert plan([*HOSTS.split(), "nossh", "s.py", word]).command[-1] == word
    assert plan([*HOSTS.split(), "pdsh", "s.py", "two words", "--a=b", "x,y/z"]).command[-1] == "x,y/z"


def test_under_srun_each_node_has_a_launcher_of_its_own() -> None:
    facts = HostInfo("cuda", 2, 8, "lo", "/here", ("PY",), slurm_step=SlurmStep(2, 2, 1, "n[1-2]", 12345))
    asked = parse(["--use_deepspeed", "--deepspeed_hostfile", "H", "s.py"])
    made = build_plan(resolve_settings(asked, facts))
    assert made.launcher == "torch" and "--node_rank 1" in " ".join(made.command)
    assert host.host_warnings(asked, facts) == []


def test_what_is_looked_at_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts, bin = tmp_path / "hosts", tmp_path / "bin"
    bin.mkdir()
    monkeypatch.setenv("PATH", str(bin))

    def look(launcher: str, root: bool = False) -> None:
        words = [*BASE.split(), "--deepspeed_hostfile", str(hosts), "--deepspeed_multinode_launcher", launcher, "s.py"]
        deepspeed.check_host(parse(words), root, {})

    def refused(message: str, launcher: str = "pdsh", root: bool = False) -> None:
        with pytest.raises(SettingsError, match=message):
            look(launcher, root)

    refused("hosts does not exist")
    hosts.write_text("# nobody\n")
    refused("names no host")
    hosts.write_text("w0 slots=2\nw1\n")
    refused("expected HOST slots=N, found 'w1'")
    hosts.write_text("w0 slots=2\nw1  slots=2 # the other\n")
    refused("needs pdsh, which is not installed: pdsh .apt install pdsh.")
    look("nossh")
    for name in ("pdsh", "ompi_info"):
        (bin / name).write_text("#!/bin/sh\n")
        (bin / name).chmod(0o755)
    look("pdsh", root=True)
    refused("refuses to run as root", "openmpi", root=True)


def test_a_persons_own_variables_for_other_machines_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (home / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n\n")
    (here / ".deepspeed_env").write_text("A=1")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    added = {"ACCELERATE_MIXED_PRECISION": "bf16", "EMPTY": "", "B": "x=y", "PYTHONPATH": "/two words"}
    expected = "NCCL_DEBUG=INFO\nA=1\nACCELERATE_MIXED_PRECISION=bf16\nEMPTY=\nB=x=y\n"
    assert deepspeed.environment_file(added, {}) == expected
    (here / "mine").write_text("C=2\n")
    assert deepspeed.environment_file({}, {"DS_ENV_FILE": str(here / "mine")}) == "C=2\n"
    with pytest.raises(SettingsError, match="cannot hand FILE='/two words' to other machines"):
        deepspeed.environment_file({"FILE": "/two words"}, {})
