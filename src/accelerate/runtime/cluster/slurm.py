"""SLURM's variables: the step that this process is a task of, the hosts in a list of SLURM's, a port for the main process.

Free of torch: the launcher reads this before it starts anything. A step is what ``srun`` starts; a batch script that runs
python itself has no step, and is a process on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ...settings import env

# Ports below those that Linux hands out by itself (32768 and up), so that nothing sits there by chance.
_FIRST_PORT, _PORTS = 10000, 20000


class SlurmStep(NamedTuple):
    """A step of a job, seen by one of its tasks.

    Attributes:
        tasks: How many tasks the step has.
        nodes: How many nodes they run on.
        node: The number of this task's node, from 0.
        nodelist: The nodes, as SLURM writes them.
        port: A port for the main process.
    """

    tasks: int
    nodes: int
    node: int
    nodelist: str
    port: int

    @property
    def one_task_per_node(self) -> bool:
        """Whether each node of several runs one task, which may start processes itself."""
        return self.tasks == self.nodes > 1


def current_step() -> SlurmStep | None:
    """The step that this process is a task of; None outside of steps, and in those of a single task.

    Raises:
        ValueError: when a variable holds no number, naming it.
    """
    tasks = env.integer("SLURM_STEP_NUM_TASKS", 1)
    if tasks <= 1:
        return None
    nodes = env.integer(("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"), 1)
    return SlurmStep(tasks, nodes, env.integer("SLURM_NODEID", 0), nodelist(), port())


def batch_job_node_count() -> int:
    """How many nodes a job has whose batch script runs this process itself, without ``srun``; 1 elsewhere."""
    in_a_step = env.get("SLURM_STEP_NUM_TASKS") is not None
    return 1 if in_a_step else env.integer(("SLURM_JOB_NUM_NODES", "SLURM_NNODES"), 1)


def nodelist() -> str:
    """The nodes of the step, else of the job, as SLURM writes them; "" outside of SLURM."""
    return env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""


def port() -> int:
    """A port that all tasks of a step derive alike, and tasks of other steps most likely do not.

    Raises:
        ValueError: when a variable holds no number, naming it.
    """
    job, number = env.integer(("SLURM_JOB_ID", "SLURM_JOBID"), 0), env.integer(("SLURM_STEP_ID", "SLURM_STEPID"), 0)
    return _FIRST_PORT + (31 * job + number) % _PORTS


def first_host(text: str) -> str:
    """The first host of a list: ``node[03-05,9],gpu1`` is ``node03``.

    Raises:
        ValueError: when it is not such a list.
    """
    return next(hosts(text))


def hosts(text: str) -> Iterator[str]:
    """The hosts of a list as SLURM writes them, in order.

    Raises:
        ValueError: when it is not such a list.

    Example:
        >>> list(hosts("node[01-03,07],gpu5"))
        ['node01', 'node02', 'node03', 'node07', 'gpu5']
    """
    for pattern in _split_patterns(text, text):
        if not pattern:
            raise _parse_error(text)
        yield from _expand(pattern, text)


def _expand(pattern: str, text: str) -> Iterator[str]:
    before, opened, rest = pattern.partition("[")
    if not opened:
        if "]" in pattern:
            raise _parse_error(text)
        yield pattern
        return
    numbers, closed, after = rest.partition("]")
    if not closed or not numbers:
        raise _parse_error(text)
    for number in _expand_ranges(numbers, text):
        for ending in _expand(after, text) if after else ("",):
            yield before + number + ending


def _expand_ranges(ranges: str, text: str) -> Iterator[str]:
    """``01-03,07`` -> 01, 02, 03, 07: as many digits as the first of a range has."""
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise _parse_error(text)
        for number in range(int(first), int(last or first) + 1):
            yield f"{number:0{len(first)}}"


def _split_patterns(patterns: str, text: str) -> Iterator[str]:
    """Splits at the commas that stand outside of brackets."""
    start, inside = 0, False
    for position, character in enumerate(patterns):
        if character in "[]":
            if inside == (character == "["):
                raise _parse_error(text)
            inside = not inside
        elif character == "," and not inside:
            yield patterns[start:position]
            start = position + 1
    if inside:
        raise _parse_error(text)
    yield patterns[start:]


def _parse_error(text: str) -> ValueError:
    return ValueError(f"cannot read the list of SLURM nodes {text!r}: expected something like node[01-03,07],gpu5.")
