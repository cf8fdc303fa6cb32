"""Trackers: what one must have, who runs its methods, which are chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from accelerate import Accelerator
from accelerate.runtime import world
from accelerate.state import PartialState
from accelerate.tracking import (
    GeneralTracker,
    filter_trackers,
    get_available_trackers,
    on_main_process,
    register_tracker_class,
    registry,
    start_trackers,
)
from accelerate.utils import LoggerType


class Tracker(GeneralTracker):
    name = "mine"
    requires_logging_directory = False

    @on_main_process
    def __init__(self, run_name="run", **kwargs):
        super().__init__()
        self.run_name, self.kwargs, self.calls = run_name, kwargs, []

    @property
    def tracker(self):
        return self.calls

    @on_main_process
    def start(self):
        self.calls.append("start")

    @on_main_process
    def store_init_configuration(self, values):
        self.calls.append(("config", values))

    @on_main_process
    def log(self, values, step=None, **kwargs):
        self.calls.append(("log", values, step, kwargs))
        return "logged"

    @on_main_process
    def finish(self):
        self.calls.append("finish")


class FileTracker(Tracker):
    name = "file"
    requires_logging_directory = True

    def __init__(self, run_name, logging_dir, **kwargs):
        super().__init__(run_name, **kwargs)
        self.logging_dir = logging_dir


@pytest.fixture
def registered():
    register_tracker_class(Tracker)
    register_tracker_class(FileTracker)
    yield
    registry._registered.clear()


class TestGeneralTracker:
    def test_what_a_subclass_lacks_is_listed(self):
        class Nothing(GeneralTracker):
            pass

        with pytest.raises(
            NotImplementedError, match="Nothing lacks `name` .*; `requires_logging_directory` .*; `tracker`"
        ):
            Nothing()

        class Half(GeneralTracker):
            name = "half"
            requires_logging_directory = False

        with pytest.raises(NotImplementedError) as error:
            Half()
        assert str(error.value) == (
            "the tracker class Half lacks `tracker` (a property that returns the library's own run or writer)."
        )

    def test_attributes_of_the_instance_count(self):
        class Late(GeneralTracker):
            def __init__(self):
                self.name, self.requires_logging_directory, self.tracker = "late", False, object()
                super().__init__()

        Late()

    def test_a_constructor_that_does_not_call_ours(self):
        class Silent(GeneralTracker):
            name = "silent"

            def __init__(self):
                pass

        with pytest.raises(NotImplementedError, match="Silent lacks `requires_logging_directory` .*`tracker`"):
            filter_trackers(Silent())

    def test_a_blank_one_does_nothing(self):
        blank = GeneralTracker(_blank=True)
        assert blank.tracker is None
        for result in (blank.start(), blank.store_init_configuration({}), blank.log({}, step=1), blank.finish()):
            assert result is None


class TestOnMainProcess:
    def test_the_main_process_runs_it(self):
        tracker = Tracker("a")
        assert tracker.log({"x": 1}, 2, color="red") == "logged"
        assert tracker.calls == [("log", {"x": 1}, 2, {"color": "red"})]
        assert Tracker.log.__name__ == "log"

    def test_the_others_do_not(self):
        PartialState().process_index = 1
        tracker = Tracker("a")
        assert vars(tracker) == {} and tracker.log({"x": 1}) is None

    def test_a_tracker_for_every_process(self):
        class Everywhere(Tracker):
            main_process_only = False

        PartialState().process_index = 1
        assert Everywhere().log({"x": 1}) == "logged"


class TestFilterTrackers:
    def test_none(self):
        assert filter_trackers(None) == filter_trackers([]) == filter_trackers("all") == []

    def test_instances_each_once(self):
        first, second = Tracker(), Tracker()
        assert filter_trackers(first) == [first]
        assert filter_trackers([first, "all", second, first]) == [first, second]

    def test_all_are_those_that_can_be_used(self, registered):
        assert get_available_trackers() == ["mine", "file"]
        assert filter_trackers("all") == ["mine"]
        assert filter_trackers(LoggerType.ALL, "logs") == ["mine", "file"]
        assert filter_trackers(["mine", "all"], "logs") == ["mine", "file"]

    def test_one_that_needs_a_folder(self, registered):
        assert filter_trackers("file", "logs") == ["file"]
        with pytest.raises(ValueError, match=r"'file' needs a folder to write to: pass Accelerator\(project_dir=...\)"):
            filter_trackers("file")

    @pytest.mark.parametrize("name", [kind for kind in LoggerType if kind is not LoggerType.ALL])
    def test_built_in_ones_are_not_here_yet(self, name):
        for spelling in (name, name.value):
            with pytest.raises(
                ValueError, match=f"no built-in tracker '{name.value}' yet. Pass an instance of your own"
            ):
                filter_trackers(spelling)

    def test_an_unknown_name(self, registered):
        with pytest.raises(ValueError, match="no tracker is called 'nobody'; available: mine, file"):
            filter_trackers("nobody")

    def test_things_that_are_no_trackers(self):
        with pytest.raises(TypeError, match=r"log_with has 3: expected the name of a tracker"):
            filter_trackers([3])
        with pytest.raises(TypeError, match=r"the class Tracker: pass an instance, Tracker\(...\)"):
            filter_trackers(Tracker)


class TestStartTrackers:
    def test_instances_are_used_as_they_are(self):
        tracker = Tracker()
        assert start_trackers([tracker], "project", config={"lr": 1}) == [tracker]
        assert tracker.calls == ["start", ("config", {"lr": 1})]

    def test_names_are_built(self, registered):
        mine, file = start_trackers(["mine", "file"], "project", "logs", None, {"mine": {"tags": ["a"]}})
        assert (type(mine), mine.run_name, mine.kwargs) == (Tracker, "project", {"tags": ["a"]})
        assert (type(file), file.run_name, file.logging_dir) == (FileTracker, "project", "logs")
        assert mine.calls == file.calls == ["start"]

    def test_a_class_without_a_name(self):
        class Nameless(GeneralTracker):
            pass

        with pytest.raises(TypeError, match="Nameless has no `name`"):
            register_tracker_class(Nameless)


def test_through_the_accelerator(registered, tmp_path):
    accelerator = Accelerator(cpu=True, log_with=["mine", "file"], project_dir=tmp_path)
    accelerator.init_trackers("project", config={"lr": 1})
    accelerator.log({"loss": 0.5}, step=1, log_kwargs={"file": {"unit": "nat"}})
    accelerator.end_training()
    assert accelerator.get_tracker("mine").calls == [
        "start",
        ("config", {"lr": 1}),
        ("log", {"loss": 0.5}, 1, {}),
        "finish",
    ]
    assert accelerator.get_tracker("file", unwrap=True)[2] == ("log", {"loss": 0.5}, 1, {"unit": "nat"})
    assert accelerator.get_tracker("file").logging_dir == tmp_path
    with pytest.raises(ValueError, match="no tracker 'other'; it has 'mine', 'file'"):
        accelerator.get_tracker("other")


def test_all_without_any_is_said(caplog):
    assert filter_trackers("all") == []
    assert "finds no tracker" in caplog.text


def test_a_typo_is_found_before_the_run_starts(registered, tmp_path):
    with pytest.raises(ValueError, match="no tracker is called 'flie'"):
        Accelerator(cpu=True, log_with="flie", project_dir=tmp_path)


@pytest.mark.parametrize(("rank", "started"), [(0, ["main", "each"]), (1, ["each"])])
def test_who_logs_on_several_processes(rank, started):
    seen = []

    class Noted(GeneralTracker):
        requires_logging_directory = False
        tracker = None

        def __init__(self, name, main_process_only):
            self.name, self.main_process_only = name, main_process_only
            super().__init__()

        def start(self):
            seen.append(self.name)

        def store_init_configuration(self, values): ...

        def log(self, values, step=None, **kwargs): ...

    world.set_current(replace(world.current(), rank=rank, local_rank=0))  # rank 1 is the first of its machine
    trackers = [Noted("main", True), Noted("each", False)]
    assert start_trackers(trackers, "project") == trackers
    assert seen == started
