"""The logger on one process: levels, records that point at the caller, and what it says before there is a run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest

from accelerate.logging import MultiProcessAdapter, get_logger
from accelerate.state import PartialState

NAME = "tests.of.logging"


@pytest.fixture(autouse=True)
def fresh_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger(NAME)
    yield logger
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()
    logger.propagate = True


@pytest.fixture
def state() -> PartialState:
    return PartialState(cpu=True)


def test_a_message_before_the_run_is_known() -> None:
    logger = get_logger(NAME)
    with pytest.raises(RuntimeError, match=r"create PartialState\(\) or Accelerator\(\) before the first message"):
        logger.info("early")


def line_here() -> int:
    return sys._getframe(1).f_lineno


def test_records_point_at_the_line_that_logs(state: PartialState, caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger(NAME, log_level="DEBUG")

    def helper() -> None:
        logger.info("for the caller", stacklevel=2)

    # fmt: off
    lines = [line_here() + i for i in range(1, 7)]
    logger.info("a")
    logger.log(logging.DEBUG, "b")
    logger.warning_once("c %s", "x")
    logger.error("d", main_process_only=False, in_order=True)
    helper()
    logger.critical("%s and %s", 1, 2, main_process_only=False)
    # fmt: on
    assert [record.lineno for record in caplog.records] == lines
    assert {record.pathname for record in caplog.records} == {__file__}
    expected = ["a", "b", "c x", "d", "for the caller", "1 and 2"]
    assert [record.getMessage() for record in caplog.records] == expected


def test_exceptions_point_there_too(state: PartialState, caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger(NAME)
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("it failed")
    assert caplog.records[0].funcName == "test_exceptions_point_there_too"
    assert caplog.records[0].exc_info is not None


def test_once(state: PartialState, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        get_logger(NAME).warning_once("the same %s", 1, extra={"unhashable": []})
    get_logger(NAME).warning_once("the same %s", 2)
    get_logger(f"{NAME}.other").warning_once("the same %s", 1)
    assert [record.getMessage() for record in caplog.records] == ["the same 1", "the same 2", "the same 1"]


def test_extra_of_the_call_is_kept(state: PartialState, caplog: pytest.LogCaptureFixture) -> None:
    MultiProcessAdapter(logging.getLogger(NAME), {"run": 7}).warning("w", extra={"step": 3})
    assert (caplog.records[0].run, caplog.records[0].step) == (7, 3)  # type: ignore[attr-defined]
    assert caplog.records[0].getMessage() == "w"


def test_the_level(state: PartialState, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = get_logger(NAME, log_level="info")
    logger.debug("quiet")
    logger.info("heard")
    assert [record.getMessage() for record in caplog.records] == ["heard"]
    assert logging.root.level == logging.WARNING  # only the logger that was asked for
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "ERROR")
    assert get_logger(NAME).logger.level == logging.ERROR
    assert get_logger(NAME, "DEBUG").logger.level == logging.DEBUG
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "loud")
    with pytest.raises(ValueError, match="ACCELERATE_LOG_LEVEL='loud' is not a logging level: choose from CRITICAL"):
        get_logger(NAME)
    monkeypatch.delenv("ACCELERATE_LOG_LEVEL")
    assert get_logger(NAME).logger.level == logging.DEBUG  # stays as it is


def test_a_level_that_was_asked_for_is_seen_without_handlers(
    state: PartialState, capsys: pytest.CaptureFixture[str], fresh_logger: logging.Logger
) -> None:
    fresh_logger.propagate = False  # pytest's own handlers are at the root
    logger = get_logger(NAME, log_level="DEBUG")
    get_logger(NAME, log_level="DEBUG").debug("to stderr")
    assert capsys.readouterr().err == "to stderr\n"
    fresh_logger.addHandler(logging.NullHandler())
    logger.debug("to the handler")
    assert capsys.readouterr().err == ""
