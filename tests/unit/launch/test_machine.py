"""What the machine adds to the settings, and how it is found."""

from __future__ import annotations

import os

import pytest

from accelerate.launch import machine
from accelerate.launch.machine import Machine, resolve
from accelerate.settings.launcher import LaunchSettings

HERE = Machine(device="cpu", devices=0, cores=8, loopback="lo", directory="/here", python=("PY", "-u"))
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
        (LaunchSettings(num_processes=16), HERE._replace(mpi_size=16), 1, 8),
        (LaunchSettings(multi_gpu=True), GPUS._replace(devices=0), 1, 8),
    ],
)
def test_processes_and_threads(settings: LaunchSettings, facts: Machine, processes: int, threads: int) -> None:
    resolved = resolve(settings, facts)
    assert (resolved.processes, resolved.threads) == (processes, threads)


def test_facts_arrive_in_the_settings() -> None:
    resolved = resolve(LaunchSettings(), GPUS)
    assert (resolved.device, resolved.loopback, resolved.directory) == ("cuda", "lo", "/here")
    assert resolved.python == ("PY", "-u")


def test_a_devices_kind_from_the_file_outlives_a_machine_without_any() -> None:
    asked = LaunchSettings(multi_gpu=True, device="xpu", num_processes=2)
    assert resolve(asked, HERE).device == "xpu"
    assert resolve(LaunchSettings(num_processes=2), HERE).on_cpu


def test_devices_are_counted_only_if_nobody_said_how_many_processes() -> None:
    assert machine.look(LaunchSettings(num_processes=2)).devices == 0
    assert machine.look(LaunchSettings(cpu=True)).device == "cpu"


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)


def test_a_named_device_is_the_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "xpu:1")
    assert machine.look(LaunchSettings(num_processes=1)).device == "xpu"


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
    assert machine.interpreter_options(command.split()) == options
