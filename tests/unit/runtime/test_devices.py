"""The device table, and the form in which devices are compared."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from accelerate.runtime import devices
from accelerate.runtime.devices import require_device
from tests.helpers import streams


@pytest.fixture
def second_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four XPUs, of which torch has selected the second."""
    module = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 4, current_device=lambda: 1)
    monkeypatch.setattr(torch, "xpu", module)


@pytest.mark.usefixtures("second_of_four")
class TestWithIndex:
    """`with_index` returns what a tensor on the device reports."""

    @pytest.mark.parametrize("device", ["xpu", "xpu:1", torch.device("xpu"), torch.device("xpu", 1)])
    def test_spellings_of_one_device_are_equal(self, device: str | torch.device) -> None:
        assert devices.with_index(device) == torch.device("xpu", 1)

    @pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")])
    def test_the_cpu_has_no_index(self, device: str | torch.device) -> None:
        assert devices.with_index(device) == torch.ones(1, device=device).device

    @pytest.mark.parametrize("device", ["cuda", "meta", "hpu:3", "mps"])
    def test_a_device_that_is_not_here_stays_as_it_is(self, device: str) -> None:
        if torch.device(device).index is None and device != "meta" and devices.device_kind(device).is_available():
            pytest.skip(f"this machine has {device}")
        assert str(devices.with_index(device)) == device


def test_mps_has_index_0_as_its_tensors_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.with_index("mps") == torch.device("mps", 0)


@pytest.mark.parametrize(("count", "device"), [(0, 0), (0, "cuda"), (0, "cuda:1"), (2, 2), (2, torch.device("cuda:2"))])
def test_a_device_that_is_not_there_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, count: int, device: Any
) -> None:
    streams.install(monkeypatch, count)
    with pytest.raises(RuntimeError, match=f"sees {count or 'no'} .*'cpu'"):
        require_device(device)


def test_a_device_that_is_there_has_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    streams.install(monkeypatch, 2)
    assert [str(require_device(device)) for device in (1, "cuda", "cuda:1", "cpu", "meta")] == [
        "cuda:1",
        "cuda:0",
        "cuda:1",
        "cpu",
        "meta",
    ]
