"""Which communication library a run on Amazon SageMaker gets: one that its images bring along, and this machine lacks."""

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
