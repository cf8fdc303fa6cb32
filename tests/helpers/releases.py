"""Skips for tests of what only newer releases of torch can do: the one place that compares torch's version for tests."""

from __future__ import annotations

from typing import Any

import pytest

from accelerate.utils import is_torch_version


def needs_torch(version: str, what: str) -> pytest.MarkDecorator:
    """Returns the mark that skips a test on releases of torch before `version`, with `what` they lack as the reason."""
    return pytest.mark.skipif(is_torch_version("<", version), reason=f"{what} needs torch {version}")


FSDP2_ON_CPU = needs_torch("2.7", "fully_shard on the CPU")
"""torch 2.6 records events on streams of the CPU in `fully_shard`'s all-gather, and has none; strategies/fsdp2.py raises."""

TP_OF_TRANSFORMERS = needs_torch("2.7", "tensor parallelism of transformers 5")
"""It calls `distribute_tensor` with an argument that torch 2.6 does not have."""

FSDP_VERSIONS = (1, 2) if is_torch_version(">=", "2.7") else (1,)
"""The versions of FSDP that this release of torch runs on the CPU, for tests that go through them on their ranks."""


def fsdp(version: int, *values: Any) -> Any:
    """Returns a parameter set that starts with FSDP's version, and is skipped where torch does not run it on the CPU."""
    return pytest.param(version, *values, marks=FSDP2_ON_CPU if version == 2 else ())
