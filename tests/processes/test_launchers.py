"""`notebook_launcher` and `debug_launcher` in processes of their own: they fork, and a test process has threads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import left_over

CASES: dict[str, dict[str, Any]] = {
    case["name"]: case
    for case in json.loads((Path(__file__).resolve().parents[1] / "data" / "launch_behaviors.json").read_text())
}
# What a notebook's cell is: functions that nobody can import, in a process that has imported everything.
CELL = """
import json, os, signal, socket, sys, time
import torch
from accelerate import Accelerator, PartialState, debug_launcher, notebook_launcher
from accelerate.state import AcceleratorState
from accelerate.utils import gather, gather_object

def report(*words):
    state = AcceleratorState()
    torch.rand(600, 600) @ torch.rand(600, 600)
    ranks = gather(torch.tensor([state.process_index])).tolist()
    row = {"words": words, "ranks": ranks, "rank": state.process_index, "kind": str(state.distributed_type),
           "precision": state.mixed_precision, "forked": state.fork_launched, "env": dict(os.environ)}
    rows = gather_object([row])
    if state.is_main_process:
        print(json.dumps(rows), flush=True)

def attempt(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)
    else:
        print(json.dumps(["nothing", ""]), flush=True)
"""


@pytest.fixture
def cell(tmp_path: Path) -> Any:
    """Runs a cell and gives its lines; those that are JSON are read."""

    def run(text: str, **variables: str) -> list[Any]:
        foreign = ("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMP_", "TORCHELASTIC_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        done = subprocess.run(
            [sys.executable, "-c", CELL + textwrap.dedent(text)],
            cwd=tmp_path,
            env={**kept, "HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", **variables},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert left_over(tmp_path) == []
        return [json.loads(line) if line.startswith("[") else line for line in done.stdout.splitlines()]

    return run


def test_one_process_is_this_one(cell: Any) -> None:
    lines = cell(
        """
        def g(x):
            print("in", x, os.environ.get("RANK"), os.environ.get("WORLD_SIZE"), os.environ.get("MASTER_ADDR"))

        notebook_launcher(g, (1,), num_processes=1)
        notebook_launcher(report, num_processes=1, mixed_precision="bf16")
        print("ACCELERATE_MIXED_PRECISION" in os.environ)
        """
    )
    assert lines[:2] == CASES["notebook_launcher.single"]["output"]
    assert lines[3][0]["precision"] == "bf16" and not lines[3][0]["forked"]
    assert lines[4] == "False"


def test_two_ranks_from_a_notebook(cell: Any) -> None:
    launched, rows, *rest = cell(
        """
        torch.rand(600, 600) @ torch.rand(600, 600)  # the pool of threads that does not survive a fork
        notebook_launcher(report, ("a", 2), num_processes=2, mixed_precision="bf16", use_port="0")
        taken = socket.socket(); taken.bind(("127.0.0.1", 0)); taken.listen()
        notebook_launcher(report, num_processes=3, use_port=str(taken.getsockname()[1]))
        print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "RANK" in os.environ)
        """
    )
    assert launched == "Launching training on 2 CPUs."
    assert [row["rank"] for row in rows] == [0, 1]
    for row in rows:
        assert (row["words"], row["ranks"], row["kind"]) == (["a", 2], [0, 1], "DistributedType.MULTI_CPU")
        assert (row["precision"], row["forked"]) == ("bf16", True)
        observed = CASES["launchers.notebook2bf16"]["output"]["children"][str(row["rank"])]["env"]
        # Decided: the precision arrives under the name that is read.
        expected = {name: value for name, value in observed.items() if name not in ("MIXED_PRECISION", "MASTER_PORT")}
        assert {name: row["env"].get(name) for name in expected} == expected
        assert row["env"]["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert rest[0] == "Launching training on 3 CPUs."
    assert rest[1].startswith("Port ") and "is taken, using port" in rest[1]
    assert len(rest[2]) == 3 and rest[3] == "True False"


def test_ranks_through_torchs_agent(cell: Any) -> None:
    _, rows, handlers = cell(
        """
        options = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", rdzv_id="run", mixed_precision="bf16")
        notebook_launcher(report, ("c10d",), num_processes=2, **options)
        print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
        """
    )
    assert [(row["words"], row["ranks"], row["precision"], row["forked"]) for row in rows] == [
        (["c10d"], [0, 1], "bf16", True)
    ] * 2
    assert handlers == "True"


def test_ranks_for_a_test(cell: Any) -> None:
    rows, error, after = cell(
        """
        PartialState()  # what this process is, the ranks are not
        debug_launcher(report, ("x",))
        attempt(debug_launcher, report, num_processes=0)
        print(PartialState().num_processes)
        """
    )
    for row in rows:
        assert row["ranks"] == [0, 1] and row["kind"] == "DistributedType.MULTI_CPU" and row["forked"]
        observed = CASES["launchers.debug2"]["output"]["children"][str(row["rank"])]["env"]
        # Decided: each rank knows its own; they meet at a store instead of a file, on any free port.
        ours = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "ACCELERATE_DEBUG_RDV_FILE")
        expected = {name: value for name, value in observed.items() if name not in ours}
        assert {name: row["env"].get(name) for name in expected} == expected
        assert row["env"]["RANK"] == row["env"]["LOCAL_RANK"] == str(row["rank"])
    assert error[0] == "ValueError" and after == "1"


def test_one_rank_for_a_test_is_on_its_own(cell: Any) -> None:
    [[row]] = cell("debug_launcher(report, ('x',), num_processes=1)")
    assert row["kind"] == "DistributedType.NO" and row["ranks"] == [0] and row["forked"]
    assert "WORLD_SIZE" not in row["env"]


def test_the_first_rank_to_fail_is_the_one_named(cell: Any) -> None:
    raised, left, killed = cell(
        """
        def fail(how):
            rank = PartialState().process_index
            gather(torch.ones(1))
            if rank == 1:
                if how == "raise":
                    raise KeyError("its own words")
                if how == "exit":
                    os._exit(7)
                os.kill(os.getpid(), signal.SIGKILL)
            gather(torch.ones(1))

        for how in ("raise", "exit", "kill"):
            attempt(debug_launcher, fail, (how,))
        """
    )
    assert raised[0] == "ProcessRaisedException"
    assert "Process 1 terminated" in raised[1] and raised[1].rstrip().endswith("KeyError: 'its own words'")
    assert left == ["ProcessExitedException", "process 1 terminated with exit code 7"]
    assert killed == ["ProcessExitedException", "process 1 terminated with signal SIGKILL"]


def test_ranks_start_again_as_often_as_allowed(cell: Any) -> None:
    lines = cell(
        """
        def flaky(until):
            attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
            if attempt < until and os.environ["RANK"] == "1":
                raise OSError("not yet")
            rank = PartialState().process_index
            gather(torch.ones(1))
            if rank == 0:
                print("attempt", attempt, flush=True)

        notebook_launcher(flaky, (1,), num_processes=2, max_restarts=1, use_port="0")
        attempt(notebook_launcher, flaky, (5,), num_processes=2, max_restarts=1)
        """
    )
    assert lines[1:3] == ["A process failed; starting all again (1 more times).", "attempt 1"]
    assert lines[-1][0] == "ProcessRaisedException" and "not yet" in lines[-1][1]


def test_what_cannot_be_launched_is_said(cell: Any) -> None:
    errors = cell(
        """
        attempt(notebook_launcher, report)
        attempt(notebook_launcher, report, num_processes=-1)
        attempt(notebook_launcher, report, num_processes=2, mixed_precision="fp15")
        attempt(notebook_launcher, report, num_processes=2, use_port="any")
        Accelerator()
        attempt(notebook_launcher, report, num_processes=2)
        """
    )
    errors = [error for error in errors if isinstance(error, list)]
    assert [name for name, _ in errors] == ["ValueError"] * 5
    assert (
        CASES["launchers.notebook_none"]["output"]["raises"]
        == CASES["notebook_launcher.initialized"]["output"]["raises"]
    )
    for (_, text), words in zip(
        errors, ["num_processes", "num_processes=-1", "fp15", "use_port", "Accelerator"], strict=True
    ):
        assert words in text


def test_arguments_are_checked_before_anything_starts(cell: Any) -> None:
    errors = cell(
        """
        attempt(notebook_launcher, report, num_processes=1, num_nodes=2, node_rank=2)
        attempt(notebook_launcher, report, num_processes=1, num_nodes=0)
        attempt(notebook_launcher, None, num_processes=2)
        attempt(debug_launcher, report())
        attempt(debug_launcher, lambda first, second: None, (1,))
        attempt(notebook_launcher, report, num_processes=2, use_port=70000)
        attempt(notebook_launcher, report, num_processes=2, max_restarts=-1)
        """
    )
    wanted = ["node_rank=2, num_nodes=2", "num_nodes=0", "without calling it", "without calling it", "'second'"]
    wanted += ["use_port=70000", "max_restarts=-1"]
    errors = [error for error in errors if not isinstance(error[0], dict)]
    for (_, text), words in zip(errors, wanted, strict=True):
        assert words in text


def test_an_interrupted_notebook_leaves_nobody_behind(tmp_path: Path) -> None:
    text = textwrap.dedent(
        """
        def wait():
            print("up", flush=True)
            time.sleep(600)

        notebook_launcher(wait, num_processes=2, use_port="0")
        """
    )
    for how in (signal.SIGINT, signal.SIGKILL):
        said = tmp_path / how.name
        with said.open("w") as file:  # not a pipe: ranks would hold it open, and reading it would wait for them
            notebook = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-c", CELL + text],
                cwd=tmp_path,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            deadline = time.monotonic() + 120
            while said.read_text().count("up\n") < 2:
                if notebook.poll() is None and time.monotonic() > deadline:
                    notebook.send_signal(signal.SIGABRT)  # says where it stands
                    notebook.wait(timeout=10)
                assert notebook.poll() is None, said.read_text()
                time.sleep(0.05)
            notebook.send_signal(how)
            notebook.wait(timeout=60)
        finally:
            notebook.kill()
            notebook.wait(timeout=10)
        deadline = time.monotonic() + 10
        while left_over(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left_over(tmp_path) == []
