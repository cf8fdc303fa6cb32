"""`examples/resumable.py`, killed, asked to stop and started again, ends as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cli.conftest import left_over

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'accelerate[examples]'")
pytest.importorskip("torchdata.stateful_dataloader")
pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "resumable.py"
LAUNCH = ("-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2")
ARGUMENTS = (str(EXAMPLE), "--epochs", "5", "--save_every", "10", "--project_dir", "the run")
PATIENCE = 120.0


class Runs:
    """Runs of the example in one folder, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.project = folder / "the run"
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *options: str, launch: tuple[str, ...] = LAUNCH) -> subprocess.Popen[str]:
        self.started.append(
            subprocess.Popen(
                [sys.executable, *launch, *options, *ARGUMENTS],
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "ACCELERATE_USE_CPU": "true"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return self.started[-1]

    def to_the_end(self, *options: str, launch: tuple[str, ...] = LAUNCH) -> tuple[list[str], str]:
        """What a run that is left alone prints, and its errors."""
        process = self.start(*options, launch=launch)
        printed, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors[-4000:]
        return printed.splitlines(), errors

    def newest(self) -> int:
        folders = self.project.glob("checkpoints/checkpoint_*")
        return max((int(name) for f in folders if (name := f.name.removeprefix("checkpoint_")).isdigit()), default=-1)

    def wait_for(self, number: int, process: subprocess.Popen[str]) -> None:
        """Waits until a run has saved so many checkpoints."""
        self._wait(lambda: self.newest() >= number, process)

    def _wait(self, reached: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
        end = time.monotonic() + PATIENCE
        while not reached():
            assert process is None or process.poll() is None, process.communicate()
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.005)

    def kill(self, process: subprocess.Popen[str]) -> None:
        """Kills all of a run at once; whatever it was doing, it does not end it."""
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
        assert process.returncode == -signal.SIGKILL
        self._wait(lambda: not left_over(self.folder))

    def model(self) -> bytes:
        return (self.project / "model" / "model.safetensors").read_bytes()


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    made = Runs(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], bytes]:
    """What a run prints that nobody disturbs, and the weights it ends with."""
    alone = Runs(tmp_path_factory.mktemp("unbroken"))
    printed, _ = alone.to_the_end()
    return printed, alone.model()


def ends_like(printed: list[str], unbroken: list[str]) -> bool:
    """Whether a resumed run prints the rest of what an unbroken one prints."""
    assert printed[0].startswith("going on from checkpoint_")
    return len(printed) > 2 and printed[1:] == unbroken[-len(printed[1:]) :]


def test_killed_then_asked_to_stop_it_ends_the_same(runs: Runs, unbroken: tuple[list[str], bytes]) -> None:
    first = runs.start()
    runs.wait_for(1, first)
    runs.kill(first)

    second = runs.start()
    runs.wait_for(runs.newest() + 1, second)
    second.send_signal(signal.SIGTERM)  # to the launcher
    printed, errors = second.communicate(timeout=PATIENCE)
    assert second.returncode == 75, errors
    assert errors.splitlines()[-1] == "accelerate launch: stopped by SIGTERM; all ranks have saved: start it again"
    assert printed.splitlines()[-1].startswith("stopped on request at step ")
    stopped_at = printed.split()[-1]
    assert left_over(runs.folder) == []

    shutil.copytree(runs.project, runs.folder / "copy")
    last, _ = runs.to_the_end()
    assert last[0].endswith(f"step {stopped_at}"), last
    assert ends_like(last, unbroken[0]) and runs.model() == unbroken[1]

    # The same checkpoint on one process: other dropout, the same samples at each step.
    shutil.rmtree(runs.project)
    (runs.folder / "copy").rename(runs.project)
    alone, _ = runs.to_the_end(launch=())
    assert alone[0] == last[0] and len(alone) == len(last)
    assert float(alone[-1].split()[1]) > 80


def test_a_worker_that_is_killed_has_all_start_again(runs: Runs, unbroken: tuple[list[str], bytes]) -> None:
    process = runs.start("--max_restarts", "3", "--monitor_interval", "0.2")
    runs.wait_for(1, process)
    ranks = [
        child
        for child in psutil.Process(process.pid).children()
        if str(EXAMPLE) in child.cmdline() and "launch" not in child.cmdline()
    ]
    assert len(ranks) == 2
    ranks[1].kill()
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors[-4000:]
    assert "a rank failed; starting all ranks again (2 more restarts)" in errors
    (again,) = [place for place, line in enumerate(printed.splitlines()) if line.startswith("going on from")]
    assert ends_like(printed.splitlines()[again:], unbroken[0]) and runs.model() == unbroken[1]
