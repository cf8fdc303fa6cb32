"""Which device a rank takes, and what NCCL is told about cards that only claim to talk to each other."""

from __future__ import annotations

import pytest

from accelerate.runtime import devices, world
from accelerate.runtime.place import Placement
from accelerate.settings import env
from accelerate.settings.enums import DistributedType
from tests.helpers.slurm import task


class TestDevices:
    """Which device is a rank's own; what a GPU would have to be asked for is said by a row of the table here."""

    @pytest.mark.parametrize(
        ("variables", "count", "index"),
        [
            (task(3, [4]), 1, 0),  # srun --gpus-per-task=1 shows each task one
            (task(3, [4]), 4, 3),
            ({**task(3, [4]), "TORCHELASTIC_RUN_ID": "1"}, 1, 3),  # too many processes for this GPU: refused later on
            ({}, 1, 3),
        ],
    )
    def test_a_scheduler_may_show_each_process_one(
        self, variables: dict[str, str], count: int, index: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Some(devices.DeviceKind):
            def count(self) -> int:
                return count

        for name in task(0, [1]):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        kind = Some("cuda", DistributedType.MULTI_GPU, ("nccl",))
        assert world._device_index(kind, Placement(3, 4, 3, 4, "whoever")) == index

    def test_nccl_is_kept_from_cards_that_only_claim_to_talk_directly(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(world.machine, "check_cuda_p2p_ib_support", lambda: False)
        monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
        monkeypatch.delenv("NCCL_IB_DISABLE", raising=False)
        world._avoid_broken_peer_access()
        assert (env.get("NCCL_P2P_DISABLE"), env.get("NCCL_IB_DISABLE")) == ("0", "1")
        assert "set NCCL_IB_DISABLE=1" in caplog.text
