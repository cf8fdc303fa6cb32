"""What pip is told about torch_xla, and what is said when pip cannot do it."""

from __future__ import annotations

import importlib.metadata

import pytest

from accelerate.runtime.system.xla_install import pip_arguments
from accelerate.utils import install_xla


def test_the_version_follows_torch() -> None:
    assert pip_arguments("2.9.0+cu128", upgrade=False) == ["install", "torch_xla[tpu]==2.9.*"]
    assert pip_arguments("2.9.0", upgrade=True) == ["install", "--upgrade", "torch", "torch_xla[tpu]"]


def test_a_version_that_is_not_there_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip itself runs, and finds nothing
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    version = ".".join(importlib.metadata.version("torch").split(".")[:2])
    with pytest.raises(RuntimeError, match=rf"pip install torch_xla\[tpu\]=={version}\.\* failed: ERROR: No matching"):
        install_xla()
