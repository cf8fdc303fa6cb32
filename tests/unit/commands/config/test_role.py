"""The role for Amazon SageMaker without its SDK; tests/cli/test_sagemaker.py makes one."""

from __future__ import annotations

import sys

import pytest

from accelerate.commands.config.role import make_role
from accelerate.settings.option import SettingsError


def test_without_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(SettingsError, match=r'pip install "accelerate\[sagemaker\]"'):
        make_role({"region": "us-east-1"})
