"""A skip fails where the environment says that nothing it needs is missing (tests/helpers/skips.py)."""

from __future__ import annotations

import pytest

from tests.helpers import skips


@pytest.mark.parametrize(
    ("words", "reason", "outcome"),
    [
        ("", "needs peft", "skipped"),
        ("peft,datasets", "Skipped: could not import 'peft.tuners'", "failed"),
        ("peft,datasets", "no GPU here", "skipped"),
    ],
)
def test_listed_reasons_fail(words: str, reason: str, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(skips.VARIABLE, words)
    where = ("test_it.py", 3, reason)
    reports: list[pytest.TestReport | pytest.CollectReport] = [
        pytest.CollectReport("test_it.py", "skipped", where, []),
        pytest.TestReport("test_it.py::test", ("test_it.py", 3, "test"), {}, "skipped", where, "call"),
    ]
    for report in reports:
        skips.fail_if_unexpected(report)
        assert report.outcome == outcome
        assert report.longrepr == where if outcome == "skipped" else reason in str(report.longrepr)
