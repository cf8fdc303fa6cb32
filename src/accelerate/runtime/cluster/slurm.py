"""SLURM's variables: the step of this process, host lists, and a port for rank 0. Imports no torch.

``srun`` starts steps. A batch script that runs Python without ``srun`` has no step, and is a single process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ...settings import env

# Below Linux's ephemeral ports (32768 and up).
_FIRST_PORT, _PORTS = 10000, 20000


class SlurmStep(NamedTuple):
    """A job step, from the variables of one of its tasks.

    Attributes:
        tasks: Number of tasks.
        nodes: Number of nodes.
        node: Index of this task's node.
        nodelist: The nodes, in SLURM's notation.
        port: A port for rank 0.
    """

    tasks: int
    nodes: int
    node: int
    nodelist: str
    port: int

    @property
    def one_task_per_node(self) -> bool:
        """Whether there are several nodes with one task each, which may start processes itself."""
        return self.tasks == self.nodes > 1


def current_step() -> SlurmStep | None:
    """Returns the step of this process; None outside a step, and in a step with a single task.

    Raises:
        ValueError: if a variable is not a number.
    """
    tasks = env.integer("SLURM_STEP_NUM_TASKS", 1)
    if tasks <= 1:
        return None
    nodes = env.integer(("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"), 1)
    return SlurmStep(tasks, nodes, env.integer("SLURM_NODEID", 0), nodelist(), port())


def batch_job_node_count() -> int:
    """Returns the job's number of nodes in a process that its batch script runs without ``srun``; 1 elsewhere."""
    in_a_step = env.get("SLURM_STEP_NUM_TASKS") is not None
    return 1 if in_a_step else env.integer(("SLURM_JOB_NUM_NODES", "SLURM_NNODES"), 1)


def nodelist() -> str:
    """Returns the nodes of the step, else of the job, in SLURM's notation; "" outside SLURM."""
    return env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""


def port() -> int:
    """Returns a port derived from job and step, the same for all tasks of a step.

    Raises:
        ValueError: if a variable is not a number.
    """
    job, number = env.integer(("SLURM_JOB_ID", "SLURM_JOBID"), 0), env.integer(("SLURM_STEP_ID", "SLURM_STEPID"), 0)
    return _FIRST_PORT + (31 * job + number) % _PORTS


def first_host(text: str) -> str:
    """Returns the first host of a list: ``node03`` of ``node[03-05,9],gpu1``.

    Raises:
        ValueError: if it is not a host list.
    """
    return next(hosts(text))


def hosts(text: str) -> Iterator[str]:
    """Yields the hosts of a list in SLURM's notation.

    Raises:
        ValueError: if it is not a host list.

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
    """Expands ``01-03,07`` to 01, 02, 03, 07, padded to the digits of a range's first number."""
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise _parse_error(text)
        for number in range(int(first), int(last or first) + 1):
            yield f"{number:0{len(first)}}"


def _split_patterns(patterns: str, text: str) -> Iterator[str]:
    """Splits at commas outside brackets."""
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
