"""The machine: places, ports, kernel, NUMA nodes (from a copy of the kernel's tree, and for real)."""

from __future__ import annotations

import logging
import os
import platform
import socket
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerate.runtime import world
from accelerate.runtime.system import system_info
from accelerate.settings import env


class TestPlaces:
    def test_alone(self):
        assert system_info.get_cpu_distributed_information() == system_info.CPUInformation(0, 1, 0, 1)

    @pytest.mark.parametrize(
        "names",
        [
            ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
            ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
            tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
            tuple(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
        ],
    )
    def test_of_each_launcher(self, names):
        with env.patch_environment(**dict(zip(names, (5, 8, 1, 4), strict=True))):
            assert system_info.get_cpu_distributed_information() == system_info.CPUInformation(5, 8, 1, 4)

    def test_the_default_device(self):
        with env.patch_environment(ACCELERATE_TORCH_DEVICE="cpu"):
            assert system_info.get_current_device_type() == ("cpu", "MULTI_CPU")
        with env.patch_environment(ACCELERATE_TORCH_DEVICE="cuda:1"):
            assert system_info.get_current_device_type() == ("cuda", "MULTI_GPU")


class TestPorts:
    def test_a_port_that_answers(self):
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            listener.listen()
            port = listener.getsockname()[1]
            assert system_info.is_port_in_use(port) and system_info.is_port_in_use(str(port))
        assert not system_info.is_port_in_use(port)

    def test_a_free_port(self):
        with socket.socket() as listener:
            listener.bind(("localhost", system_info.get_free_port()))


class TestKernel:
    @pytest.mark.parametrize(
        ("release", "warns"), [("5.4.0-150-generic", True), ("4.18.0", True), ("5.5.0", False), ("6.1.2-cloud", False)]
    )
    def test_old_kernels_are_named(self, release, warns, monkeypatch, caplog):
        monkeypatch.setattr(platform, "system", lambda: "Linux")
        monkeypatch.setattr(platform, "release", lambda: release)
        with caplog.at_level(logging.WARNING):
            system_info.check_os_kernel()
        assert (release in caplog.text) is warns


class TestCuda:
    @pytest.mark.parametrize(
        ("names", "driver", "supported"),
        [
            (["NVIDIA GeForce RTX 4090"] * 2, "535.104.05", False),
            (["NVIDIA GeForce RTX 4090"] * 2, "550.40.06", False),
            (["NVIDIA GeForce RTX 4090"] * 2, "550.40.07", True),
            (["NVIDIA GeForce RTX 4090"] * 2, "550.54", True),
            (["NVIDIA GeForce RTX 4090"] * 2, None, True),
            (["NVIDIA GeForce RTX 4090"], "535.104.05", True),
            (["NVIDIA RTX 4000 Ada"] * 2, "535.104.05", False),
            (["NVIDIA H100"] * 8, "535.104.05", True),
            ([], None, True),
        ],
    )
    def test_cards_that_only_claim_to_talk_directly(self, names, driver, supported, monkeypatch):
        monkeypatch.setattr(system_info, "get_gpu_info", lambda: (names, len(names)))
        monkeypatch.setattr(system_info, "get_driver_version", lambda: driver)
        assert system_info.check_cuda_p2p_ib_support() is supported

    def test_without_a_gpu(self):
        if system_info.availability.is_cuda_available():
            pytest.skip("there is a GPU here")
        assert system_info.get_gpu_info() == ([], 0)
        assert system_info.check_cuda_fp8_capability() is False


class TestRanges:
    @given(st.sets(st.integers(0, 300)))
    def test_there_and_back(self, numbers):
        assert system_info._parse_cpulist(system_info._format_cpulist(numbers)) == numbers

    def test_as_the_kernel_writes_them(self):
        assert system_info._parse_cpulist("0-2,8\n") == {0, 1, 2, 8}
        assert system_info._format_cpulist({8, 0, 2, 1}) == "0-2,8"
        assert system_info._parse_cpulist("\n") == set()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds processes to processors")
class TestNuma:
    @pytest.fixture
    def allowed(self):
        before = os.sched_getaffinity(0)
        system_info.set_numa_affinity.cache_clear()
        yield before
        os.sched_setaffinity(0, before)
        system_info.set_numa_affinity.cache_clear()

    @pytest.fixture
    def nodes(self, tmp_path, monkeypatch, allowed):
        """A machine with two nodes: one has the processors of this machine, the other none that exist here."""

        def write(*lists):
            for number, processors in enumerate(lists):
                folder = tmp_path / "devices/system/node" / f"node{number}"
                folder.mkdir(parents=True)
                (folder / "cpulist").write_text(processors + "\n")
            monkeypatch.setattr(system_info, "_SYSFS", tmp_path)

        return write

    def test_here(self, allowed):
        system_info.set_numa_affinity(0)
        assert os.sched_getaffinity(0) <= allowed

    def test_processes_are_spread_over_the_nodes(self, nodes, allowed):
        processors = sorted(allowed)
        if len(processors) < 2:
            pytest.skip("needs two processors")
        nodes(str(processors[0]), str(processors[1]))
        with env.patch_environment(LOCAL_WORLD_SIZE=4):
            assert [system_info._node_for(index)[0] for index in range(4)] == [0, 0, 1, 1]
            system_info.set_numa_affinity(3)
        assert os.sched_getaffinity(0) == {processors[1]}

    def test_the_node_of_a_gpu_is_that_of_its_pci_address(self, nodes, allowed, tmp_path, monkeypatch):
        processors = system_info._format_cpulist(allowed)
        nodes("900-901", processors)
        device = tmp_path / "bus/pci/devices/0001:4b:00.0"
        device.mkdir(parents=True)
        properties = types.SimpleNamespace(pci_domain_id=1, pci_bus_id=0x4B, pci_device_id=0)
        # The one thing that needs a GPU: what torch says of it.
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        for written, node in (("1", 1), ("-1", None)):
            (device / "numa_node").write_text(written + "\n")
            assert system_info._node_of_gpu(3, tmp_path) == node
        (device / "numa_node").write_text("1\n")
        monkeypatch.setattr(system_info.availability, "is_cuda_available", lambda: True)
        system_info.set_numa_affinity(0)
        assert os.sched_getaffinity(0) == allowed

    def test_nodes_that_are_not_free_to_us_are_passed_over(self, nodes, allowed):
        nodes("900-901", system_info._format_cpulist(allowed), "")
        with env.patch_environment(LOCAL_WORLD_SIZE=2):
            assert system_info._node_for(0) == (1, allowed) and system_info._node_for(1) == (1, allowed)

    def test_no_nodes_at_all(self, tmp_path, monkeypatch, allowed):
        monkeypatch.setattr(system_info, "_SYSFS", tmp_path)
        system_info.set_numa_affinity(0)
        assert os.sched_getaffinity(0) == allowed

    def test_a_process_that_joins_is_bound_if_the_launcher_was_told_so(self, nodes, allowed):
        processors = sorted(allowed)
        nodes(str(processors[-1]), "900")
        world.join(cpu=True)
        assert os.sched_getaffinity(0) == allowed
        for _ in range(2):  # leaving and joining again does not bind again
            world.leave()
            with env.patch_environment(ACCELERATE_CPU_AFFINITY="1"):
                world.join(cpu=True)
        assert os.sched_getaffinity(0) == {processors[-1]}
        assert system_info.set_numa_affinity.cache_info().misses == 1

    def test_it_is_done_once_and_said_once(self, allowed, caplog):
        with caplog.at_level(logging.INFO):
            system_info.set_numa_affinity(0, verbose=True)
            system_info.set_numa_affinity(0, verbose=True)
        assert caplog.text.count("process 0 runs on NUMA node") == 1
        with env.patch_environment(ACCELERATE_DEBUG_MODE="1"), caplog.at_level(logging.INFO):
            system_info.override_numa_affinity(0)
        assert caplog.text.count("process 0 runs on NUMA node") == 2
