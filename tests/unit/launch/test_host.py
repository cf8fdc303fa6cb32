"""What the machine adds to the settings, and how it is found."""

from __future__ import annotations

import os

import pytest

from accelerate.launch import host
from accelerate.launch.host import HostInfo, host_warnings, resolve_settings
from accelerate.launch.plan import build_plan
from accelerate.runtime.cluster.cluster_env import RankInfo
from accelerate.runtime.cluster.slurm import SlurmStep
from accelerate.settings.launcher import LaunchSettings
from tests.helpers.slurm import job, task

HERE = HostInfo(device="cpu", devices=0, cores=8, interface="lo", directory="/here", python=("PY", "-u"))
GPUS = HERE._replace(device="cuda", devices=4)


@pytest.mark.parametrize(
    ("settings", "facts", "processes", "threads"),
    [
        (LaunchSettings(), HERE, 1, 8),
        (LaunchSettings(num_processes=2), HERE, 2, 4),
        (LaunchSettings(num_processes=16), HERE, 16, 1),
        (LaunchSettings(), GPUS, 4, 2),
        (LaunchSettings(num_machines=2), GPUS, 8, 2),
        (LaunchSettings(num_processes=2), GPUS, 2, 4),
        (LaunchSettings(cpu=True), HERE, 1, 8),
        (LaunchSettings(), HERE._replace(device="mps", devices=1), 1, 8),
        (LaunchSettings(num_processes=16), HERE._replace(rank_info=RankInfo(3, 16, 1, 2, "Open MPI")), 1, 8),
        (LaunchSettings(multi_gpu=True), GPUS._replace(devices=0), 1, 8),
    ],
)
def test_processes_and_threads(settings: LaunchSettings, facts: HostInfo, processes: int, threads: int) -> None:
    resolved = resolve_settings(settings, facts)
    assert (resolved.processes, resolved.threads) == (processes, threads)


def test_facts_arrive_in_the_settings() -> None:
    resolved = resolve_settings(LaunchSettings(), GPUS)
    assert (resolved.device, resolved.interface, resolved.directory) == ("cuda", "lo", "/here")
    assert resolved.python == ("PY", "-u")


def test_a_devices_kind_from_the_file_outlives_a_machine_without_any() -> None:
    asked = LaunchSettings(multi_gpu=True, device="xpu", num_processes=2)
    assert resolve_settings(asked, HERE).device == "xpu"
    assert resolve_settings(LaunchSettings(num_processes=2), HERE).on_cpu


def test_devices_are_counted_only_if_nobody_said_how_many_processes() -> None:
    assert host.detect_host(LaunchSettings(num_processes=2)).devices == 0
    assert host.detect_host(LaunchSettings(cpu=True)).device == "cpu"


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= host.cores() <= (os.cpu_count() or 1)


def test_a_named_device_is_the_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "xpu:1")
    assert host.detect_host(LaunchSettings(num_processes=1)).device == "xpu"


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("python script.py -u", []),
        ("python -m accelerate.commands.launch -u", []),
        ("python -u -m accelerate.commands.launch", ["-u"]),
        ("python -X dev -Wignore -um accelerate", ["-X", "dev", "-Wignore", "-u"]),
        (
            "python -W error -OO --check-hash-based-pycs always a.py",
            ["-W", "error", "-OO", "--check-hash-based-pycs", "always"],
        ),
        ("python -c pass -u", []),
        ("python -Ic pass", ["-I"]),
        ("python", []),
    ],
)
def test_the_interpreters_options(command: str, options: list[str]) -> None:
    assert host.interpreter_options(command.split()) == options


class TestSlurm:
    STEP = SlurmStep(tasks=2, nodes=2, node=1, nodelist="n[1-2]", port=12345)
    ON_NODE = GPUS._replace(slurm_step=STEP)

    def test_a_task_per_node_is_a_machine_of_the_run(self) -> None:
        resolved = resolve_settings(LaunchSettings(), self.ON_NODE)
        assert (resolved.machines, resolved.machine_rank, resolved.processes, resolved.processes_here) == (2, 1, 8, 4)
        assert (resolved.main_process_ip, resolved.main_process_port) == ("n1", 12345)

    def test_what_is_given_wins(self) -> None:
        asked = LaunchSettings(machine_rank=0, main_process_ip="h", main_process_port=29600, num_processes=2)
        resolved = resolve_settings(asked, self.ON_NODE)
        assert (resolved.machines, resolved.machine_rank, resolved.processes) == (2, 0, 2)
        assert (resolved.main_process_ip, resolved.main_process_port) == ("h", 29600)
        assert host_warnings(asked, self.ON_NODE) == ["machine_rank 0 is taken as given; SLURM counts this node as 1"]

    def test_one_machine_is_one_machine(self) -> None:
        asked = LaunchSettings(num_machines=1)
        resolved = resolve_settings(asked, self.ON_NODE)
        assert (resolved.machines, resolved.processes, resolved.main_process_ip) == (1, 4, None)
        assert "this SLURM step has 2 nodes, but num_machines is 1" in host_warnings(asked, self.ON_NODE)[0]

    def test_mpirun_and_other_clouds_are_not_mixed_in(self) -> None:
        asked = LaunchSettings().replace(mpirun=LaunchSettings().mpirun.replace(hostfile="H"))
        assert resolve_settings(asked, self.ON_NODE).mpirun.hostfile is None
        assert "file for mpirun is not used" in host_warnings(asked, self.ON_NODE)[0]
        assert resolve_settings(LaunchSettings(tpu=True), self.ON_NODE).machines == 1

    @pytest.mark.parametrize(
        ("variables", "place", "step", "batch_nodes"),
        [
            ({}, None, None, 1),
            (job(nodes=4), None, None, 4),
            (task(0, [1]), None, None, 1),
            (task(1, [1, 1]), None, (2, 2, 1), 1),
            (task(3, [2, 2]), (3, 4, 1, 2), None, 1),
            (task(2, [4]), (2, 4, 2, 4), None, 1),
            # torchrun's variables of an outer run do not make this launch a rank of it
            ({"RANK": "1", "WORLD_SIZE": "2"}, None, None, 1),
        ],
    )
    def test_as_srun_and_sbatch_set_it(self, variables, place, step, batch_nodes, monkeypatch) -> None:  # type: ignore[no-untyped-def]
        for name in task(0, [1]):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        found = host.detect_host(LaunchSettings(cpu=True, num_processes=1))
        assert (None if found.rank_info is None else tuple(found.rank_info[:4])) == place
        assert (None if found.slurm_step is None else tuple(found.slurm_step[:3])) == step
        assert found.batch_nodes == batch_nodes


@pytest.mark.parametrize(
    ("visible", "hidden"),
    [(None, False), ("", True), (" ", True), ("-1", True), ("0", False), ("0,-1", False), ("GPU-8932f937", False)],
)
def test_a_list_of_visible_devices_may_hide_all(visible: str | None, hidden: bool) -> None:
    assert host._hides_all_devices(visible) is hidden


def test_cores_of_a_rank_that_shares_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in task(1, [2], "here").items():
        monkeypatch.setenv(name, value)
    everything = host.cores(bound=False)
    assert host.detect_host(LaunchSettings(cpu=True)).cores == max(1, min(host.cores(), everything // 2))


def test_peer_access_is_left_alone_or_switched_off() -> None:
    asked = LaunchSettings(script="s.py", num_processes=2)
    made = build_plan(resolve_settings(asked, GPUS._replace(peer_access=False)))
    assert made.environment["NCCL_P2P_DISABLE"] == made.environment["NCCL_IB_DISABLE"] == "1"
    assert made.merged_environment({"NCCL_P2P_DISABLE": "0"})["NCCL_P2P_DISABLE"] == "0"
    assert "NCCL_P2P_DISABLE" not in build_plan(resolve_settings(asked, GPUS)).environment
    assert "NCCL_P2P_DISABLE" not in build_plan(resolve_settings(asked.replace(num_processes=1), GPUS)).environment
    assert host._peer_access("cpu")
