"""`accelerate launch` inside of SLURM: as srun starts it on two nodes, for each task, and from a batch script."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND, Run
from tests.helpers.slurm import job, task

Write = Callable[[str], str]
# torch is imported for the meeting only: a launch of one process then costs what Python needs to start.
PLACE = """
import json, os, sys
if "--meet" in sys.argv:
    from accelerate import PartialState
    from accelerate.utils import gather_object
    state = PartialState(cpu=True)
    seen = gather_object([state.process_index])
    place = [state.process_index, state.num_processes, state.local_process_index, seen]
else:
    place = None
names = ("MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "GROUP_RANK")
os.write(1, (json.dumps([place, {name: os.environ.get(name) for name in names}]) + "\\n").encode())
"""


@pytest.fixture
def srun(tmp_path: Path, environment: dict[str, str]) -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """Starts a command once for each task of a step, as srun does, and waits for all."""

    def run(tasks_per_node: list[int], nodelist: str, *words: str) -> list[subprocess.CompletedProcess[str]]:
        started = []
        for rank in range(sum(tasks_per_node)):
            # A job's number of its own keeps the ports of tests apart that run at the same time.
            variables = {**environment, **task(rank, tasks_per_node, nodelist), "SLURM_JOB_ID": str(os.getpid())}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen([*COMMAND, *words], cwd=tmp_path, env=variables, **pipes))
        done = []
        for process in started:
            try:
                out, err = process.communicate(timeout=120)
            finally:
                process.kill()
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
        return done

    return run


def said(done: list[subprocess.CompletedProcess[str]]) -> list[list]:
    for one in done:
        assert one.returncode == 0, one.stderr
    return sorted(json.loads(line) for one in done for line in one.stdout.splitlines())


@pytest.mark.slow
def test_one_task_per_node_starts_the_processes_of_its_node(srun: Callable[..., list], script: Write) -> None:
    done = srun([1, 1], "localhost,elsewhere", "launch", "--cpu", "--num_processes", "4", script(PLACE), "--meet")
    found = said(done)
    assert [place[:3] for place, _ in found] == [[0, 4, 0], [1, 4, 1], [2, 4, 0], [3, 4, 1]]
    assert all(place[3] == [0, 1, 2, 3] for place, _ in found)
    assert [told["GROUP_RANK"] for _, told in found] == ["0", "0", "1", "1"]


@pytest.mark.slow
def test_one_task_per_process_starts_nothing_more(srun: Callable[..., list], script: Write, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 8\n")
    done = srun([2], "localhost", "launch", "--config_file", "config.yaml", script(PLACE), "--meet")
    assert [place for place, _ in said(done)] == [[0, 2, 0, [0, 1]], [1, 2, 1, [0, 1]]]
    warned = [one.stderr.count("num_processes 8 is not used: SLURM has started 2 processes") for one in done]
    assert warned == [1, 0]


def test_a_batch_script_runs_alone_and_does_not_wait_for_its_other_nodes(accelerate: Run, script: Write) -> None:
    done = accelerate("launch", "--cpu", script(PLACE), **job(nodes=2))
    assert said([done]) == [
        [None, {"MASTER_ADDR": None, "MASTER_PORT": None, "LOCAL_WORLD_SIZE": None, "GROUP_RANK": None}]
    ]
    assert "this SLURM job has 2 nodes, and this launch uses one: `srun --ntasks-per-node=1 accelerate" in done.stderr


def test_a_list_of_nodes_that_cannot_be_read_is_an_error_of_one_line(accelerate: Run, script: Write) -> None:
    done = accelerate("launch", "--cpu", script(PLACE), **task(0, [1, 1], "node[1-"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "cannot read the list of SLURM nodes 'node[1-'" in done.stderr
