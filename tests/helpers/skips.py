"""Turns skips into failures where an installation is meant to bring what a test needs; CI says what, in .ci/run."""

from __future__ import annotations

import os

import pytest

VARIABLE = "MUST_NOT_SKIP"
"""Words, separated by commas: a test whose reason to skip contains one of them fails."""


def fail_if_unexpected(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Makes a report of a skip that of a failure if its reason contains a word of `VARIABLE`."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    words = [word for word in os.environ.get(VARIABLE, "").split(",") if word and word in reason]
    if words:
        report.outcome = "failed"
        report.longrepr = f"{VARIABLE} has {words[0]!r}, and this was skipped: {reason}"
