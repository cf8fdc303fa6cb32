"""Trackers on several ranks: who logs, and what the others get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process

RunRanks = Callable[..., list[Any]]


class Undecorated(GeneralTracker):
    """A tracker whose methods have no decorator, wanted on the main process only."""

    name = "undecorated"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    @property
    def tracker(self) -> list[str]:
        return self.calls

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append("configuration")

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls.append("log")

    def finish(self) -> None:
        self.calls.append("finish")


class Everywhere(Undecorated):
    """A tracker that wants every process."""

    name = "everywhere"
    main_process_only = False


class OnlyThere(Undecorated):
    """A tracker that has its run on the main process only."""

    name = "only there"

    @on_main_process
    def __init__(self) -> None:
        super().__init__()


def logged() -> tuple[list[str], list[str], str, str, bool]:
    trackers = [Undecorated(), Everywhere(), OnlyThere()]
    accelerator = Accelerator(cpu=True, log_with=trackers)
    accelerator.init_trackers("project", config={"lr": 1})
    accelerator.log({"loss": 1.0})
    kinds = [type(accelerator.get_tracker("only there", unwrap=unwrap)).__name__ for unwrap in (False, True)]
    blank = accelerator.get_tracker("undecorated").tracker is None
    accelerator._finish_trackers()
    return trackers[0].calls, trackers[1].calls, *kinds, blank


def test_trackers_log_where_they_are_wanted(run_ranks: RunRanks) -> None:
    everything = ["start", "configuration", "log", "finish"]
    main, other = run_ranks(2, logged)
    assert main == (everything, everything, "OnlyThere", "list", False)
    assert other == ([], everything, "GeneralTracker", "GeneralTracker", True)
