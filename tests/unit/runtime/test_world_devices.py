"""Which device a rank takes, and what NCCL is told about cards that only claim to talk to each other."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from accelerate import PartialState
from accelerate.runtime import devices, world
from accelerate.runtime.cluster.cluster_env import RankInfo
from accelerate.settings import env
from accelerate.settings.enums import DistributedType
from tests.helpers.simulated_devices import simulated_cuda
from tests.helpers.slurm import task


class TestDevices:
    """Which device is a rank's own; what a GPU would have to be asked for is said by a row of the table here."""

    @pytest.mark.parametrize(
        ("variables", "count", "index"),
        [
            (task(3, [4]), 1, 0),  # srun --gpus-per-task=1 shows each task one
            (task(3, [4]), 4, 3),
            ({**task(3, [4]), "TORCHELASTIC_RUN_ID": "1"}, 1, 3),  # too many processes for this GPU: refused later on
            ({}, 1, 0),  # Ray, MIG: torchrun's variables, set by somebody else
            ({"TORCHELASTIC_RUN_ID": "1", "CUDA_VISIBLE_DEVICES": "3"}, 1, 0),  # a script sets it for each rank
            ({"TORCHELASTIC_RUN_ID": "1", "HIP_VISIBLE_DEVICES": "3"}, 1, 0),
            ({"TORCHELASTIC_RUN_ID": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4, 3),
        ],
    )
    def test_each_process_may_see_one_of_its_own(
        self, variables: dict[str, str], count: int, index: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Some(devices.DeviceKind):
            def count(self) -> int:
                return count

        for name in (*task(0, [1]), "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        kind = Some("cuda", DistributedType.MULTI_GPU, ("nccl",), "CUDA_VISIBLE_DEVICES")
        assert world._device_index(kind, RankInfo(3, 4, 3, 4, "whoever")) == index
        if count == 4:  # the same on the second of two machines
            assert world._device_index(kind, RankInfo(7, 8, 3, 4, "whoever")) == index

    def test_nccl_is_kept_from_cards_that_only_claim_to_talk_directly(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(world.system_info, "check_cuda_p2p_ib_support", lambda: False)
        monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
        monkeypatch.delenv("NCCL_IB_DISABLE", raising=False)
        world._disable_unsupported_p2p()
        assert (env.get("NCCL_P2P_DISABLE"), env.get("NCCL_IB_DISABLE")) == ("0", "1")
        assert "set NCCL_IB_DISABLE=1" in caplog.text


@pytest.fixture
def group_of_16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A process group that somebody else initialized, of which this process is the rank `request.param`."""
    for name in (*task(0, [1]), "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=16)
    yield request.param
    dist.destroy_process_group()


class TestGroupOfSomebodyElse:
    """A group without LOCAL_RANK, over two machines with 8 devices each."""

    @pytest.mark.parametrize("group_of_16", [0, 5, 8, 13], indirect=True)
    def test_rank_modulo_devices(self, group_of_16: int) -> None:
        with simulated_cuda(8) as machine:
            assert PartialState().device == torch.device("cuda", group_of_16 % 8)
            assert machine.current == group_of_16 % 8

    @pytest.mark.parametrize("group_of_16", [9], indirect=True)
    def test_the_device_that_was_selected(self, group_of_16: int) -> None:
        with simulated_cuda(8):
            torch.cuda.set_device(6)
            state = PartialState()
            assert state.device == torch.device("cuda", 6)
            torch.cuda.set_device(2)
            state.set_device()  # anew, as on joining: not the one selected since
            assert (state.device, torch.cuda.current_device()) == (torch.device("cuda", 6), 6)

    @pytest.mark.parametrize("group_of_16", [9], indirect=True)
    def test_the_device_that_the_group_is_bound_to(self, group_of_16: int) -> None:
        with simulated_cuda(8):
            assert dist.group.WORLD is not None
            dist.group.WORLD.bound_device_id = torch.device("cuda", 4)
            assert PartialState().device == torch.device("cuda", 4)

    @pytest.mark.parametrize("group_of_16", [9], indirect=True)
    def test_one_visible(self, group_of_16: int) -> None:
        with simulated_cuda(1):
            assert PartialState().device == torch.device("cuda", 0)


def test_ranks_of_torchrun_that_see_one_device_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray starts them: the variables of torchrun and one device for each rank. The group is left out."""
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        world,
        "_init_process_group",
        lambda *args: dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4),
    )
    with simulated_cuda(1):
        try:
            state = PartialState()
            assert (state.local_process_index, state.device) == (3, torch.device("cuda", 0))
        finally:
            dist.destroy_process_group()


def test_more_ranks_than_devices_of_one_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "none",
    }
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with simulated_cuda(1), pytest.raises(RuntimeError, match=r"this process sees 1 cuda device\(s\)"):
        PartialState()


def test_a_lone_process_has_an_xpu_with_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    selected: list[torch.device] = []
    xpu = types.SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, current_device=lambda: 1, set_device=selected.append
    )
    monkeypatch.setattr(torch, "xpu", xpu)
    state = PartialState()
    state.set_device()
    assert state.device == state.default_device == torch.device("xpu", 1)
    assert selected == [torch.device("xpu", 1)] * 2
