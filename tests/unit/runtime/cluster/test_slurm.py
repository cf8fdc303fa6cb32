"""SLURM's lists of nodes, steps and ports."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerate.runtime.cluster import slurm
from accelerate.settings import env
from tests.helpers.slurm import job, task

NAMES = st.text("abcz-_.", min_size=1, max_size=5)


@pytest.fixture(autouse=True)
def outside():
    env.publish(dict.fromkeys([*task(0, [1, 1])]))


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("n[3-5]", ["n3", "n4", "n5"]),
        ("n[03,7],m1", ["n03", "n7", "m1"]),
        ("n[1-2]-ib", ["n1-ib", "n2-ib"]),
        ("node[01-03,07],gpu5", ["node01", "node02", "node03", "node07", "gpu5"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("10.0.0.1", ["10.0.0.1"]),
    ],
)
def test_lists_of_nodes(text, hosts):
    assert list(slurm.hosts(text)) == hosts
    assert slurm.first_host(text) == hosts[0]


@pytest.mark.parametrize(
    "text", ["", "n[", "n[]", "n]", "n[1-", "n[1-]", "n[3-1]", "n[a]", "a,,b", "n[[1]]", "n[-1]", "a,"]
)
def test_what_is_no_list_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"cannot read .* expected something like node\[01-03,07\],gpu5"):
        list(slurm.hosts(text))


def written(ranges: list[tuple[int, int]], width: int) -> tuple[str, list[str]]:
    """Ranges as SLURM writes them, and the numbers in them."""
    texts = [f"{first:0{width}}-{first + more:0{width}}" if more else f"{first:0{width}}" for first, more in ranges]
    return ",".join(texts), [f"{n:0{width}}" for first, more in ranges for n in range(first, first + more + 1)]


@given(
    st.lists(
        st.tuples(
            NAMES,
            st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 12)), max_size=3),
            st.integers(1, 4),
            st.one_of(st.just(""), NAMES),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_list_is_read_back(parts):
    texts, expected = [], []
    for name, ranges, width, ending in parts:
        numbers, each = written(ranges, width)
        texts.append(f"{name}[{numbers}]{ending}" if ranges else name + ending)
        expected += [name + number + ending for number in each] if ranges else [name + ending]
    assert list(slurm.hosts(",".join(texts))) == expected


@given(st.text("ab[],-019", max_size=12))
def test_any_text_is_read_or_refused(text):
    try:
        hosts = list(slurm.hosts(text))
    except ValueError as error:
        assert repr(text) in str(error)
    else:
        assert all(hosts) and not set("".join(hosts)) & set("[],")


def test_a_long_list_is_read_as_far_as_it_is_asked_for():
    assert slurm.first_host("n[0-99999999999]") == "n0"


def test_a_step_and_who_is_none():
    assert slurm.current_step() is None
    env.publish(job(nodes=2))  # a batch script that runs python itself
    assert slurm.current_step() is None and slurm.batch_job_node_count() == 2
    env.publish(task(0, [1]))  # srun --pty, or an interactive shell
    assert slurm.current_step() is None and slurm.batch_job_node_count() == 1
    env.publish(task(1, [1, 1]))
    step = slurm.current_step()
    assert step == slurm.SlurmStep(2, 2, 1, "node[01-02]", slurm.port()) and step.one_task_per_node
    env.publish(task(3, [2, 2]))
    step = slurm.current_step()
    assert step is not None and (step.tasks, step.nodes, step.node) == (4, 2, 1) and not step.one_task_per_node


def test_ports_are_those_of_the_step():
    seen = set()
    for number in range(200):
        env.publish({"SLURM_JOB_ID": 123456 + number, "SLURM_STEP_ID": 0})
        seen.add(slurm.port())
    assert len(seen) == 200 and all(10000 <= port < 32768 for port in seen)
    before = slurm.port()
    env.publish({"SLURM_STEP_ID": 1})
    assert slurm.port() != before
