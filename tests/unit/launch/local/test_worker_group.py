"""The worker group of one launch, as far as no process is started."""

from __future__ import annotations

import logging

from accelerate.launch.local.worker_group import _quiet_torch_logs


def test_logs_are_suppressed_during_the_launch_only() -> None:
    logger = logging.getLogger("tests.quiet")
    with _quiet_torch_logs(quiet=True):
        assert not logger.isEnabledFor(logging.CRITICAL)
    assert logger.isEnabledFor(logging.CRITICAL)
