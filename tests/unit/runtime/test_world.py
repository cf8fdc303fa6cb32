"""Which communication library a run gets: on Amazon SageMaker one that its images bring along; one a kind of device."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from accelerate.runtime.devices import DEVICES
from accelerate.runtime.world import _backend_for


@pytest.fixture
def on_sagemaker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data-parallel job whose packages lie in the folder."""
    monkeypatch.setenv("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "DATA_PARALLEL")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("smdistributed")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_its_own_where_the_image_has_it(on_sagemaker: Path) -> None:
    folder = on_sagemaker / "smdistributed" / "dataparallel" / "torch"
    folder.mkdir(parents=True)
    (folder / "torch_smddp.py").write_text("imported = True\n")
    assert _backend_for(DEVICES["cuda"], None) == "smddp"
    assert sys.modules["smdistributed.dataparallel.torch.torch_smddp"].imported
    assert _backend_for(DEVICES["cuda"], "nccl") == "nccl"
    assert _backend_for(DEVICES["cpu"], None) == "gloo"


def test_the_tables_where_it_has_not(on_sagemaker: Path) -> None:
    assert _backend_for(DEVICES["cuda"], None) in DEVICES["cuda"].backends


@pytest.mark.parametrize(
    ("kind", "wanted", "cpu_tensors", "backend"),
    [
        ("cuda", None, False, "nccl"),
        ("cuda", None, True, "cuda:nccl,cpu:gloo"),
        ("xpu", None, True, "xpu:xccl,cpu:gloo"),
        ("npu", None, True, "npu:hccl,cpu:gloo"),
        ("hpu", None, True, "hpu:hccl,cpu:gloo"),
        ("cpu", None, True, "gloo"),
        ("cuda", "nccl", True, "nccl"),  # the user's word
        ("cuda", "gloo", True, "gloo"),
        ("cuda", "cpu:gloo,cuda:nccl", False, "cpu:gloo,cuda:nccl"),
        ("cpu", "cuda:nccl,cpu:gloo", False, "gloo"),  # a script for GPUs, tried on a CPU
        ("cpu", "cuda:nccl", False, "gloo"),
        ("xpu", "cuda:nccl,cpu:gloo", False, "xpu:xccl,cpu:gloo"),
    ],
)
def test_backends_by_device(kind: str, wanted: str | None, cpu_tensors: bool, backend: str) -> None:
    assert _backend_for(DEVICES[kind], wanted, cpu_tensors) == backend
