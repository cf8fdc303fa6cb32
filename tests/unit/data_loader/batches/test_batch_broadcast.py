"""Messages from rank 0 to another rank in the same process."""

from __future__ import annotations

import enum
from collections import OrderedDict, UserDict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerate.data_loader.batches.batch_broadcast import (
    BatchBroadcaster,
    CannotDispatchError,
    DispatchedStep,
    ReadingRankError,
)
from accelerate.data_loader.batches.batch_sharding import StepSizes
from accelerate.runtime.collective_backend import Collectives

Pair = namedtuple("Pair", ["left", "right"])


class Encoding(UserDict):
    """A mapping class of one's own, like transformers' BatchEncoding."""


class Line(Collectives):
    """Two ranks in one process: what rank 0 broadcasts waits for rank 1, whose buffer must have the same size."""

    def __init__(self, rank: int, sent: deque[torch.Tensor]) -> None:
        super().__init__(torch.device("cpu"), rank, 2)
        self.sent = sent
        self.sizes: list[int] = []

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        if self.rank == src:
            self.sent.append(tensor.clone())
            self.sizes.append(tensor.numel())
        else:
            tensor.copy_(self.sent.popleft())
        return tensor


class Ends:
    """Both ends of a line."""

    def __init__(self, staged: bool = False, apart: bool = False) -> None:
        sent: deque[torch.Tensor] = deque()
        self.line = Line(0, sent)
        said: deque[torch.Tensor] = deque()
        self.host_line = Line(0, said)
        self.sender = BatchBroadcaster(self.line, staged=staged, host_collectives=self.host_line if apart else None)
        self.receiver = BatchBroadcaster(
            Line(1, sent), staged=staged, host_collectives=Line(1, said) if apart else None
        )

    def carry(
        self, parts: list[Any], rows: int | None = None, step_sizes: StepSizes | None = None, last: bool = False
    ) -> DispatchedStep:
        self.sender.send(self.sender.pack(parts, rows, step_sizes, last))
        step = self.receiver.receive(1)
        assert step is not None
        assert not self.line.sent and not self.host_line.sent
        return step


def same(one: Any, other: Any) -> bool:
    """Whether two batches are the same to the last bit and type."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, (dict, UserDict)):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
tensors = st.builds(
    lambda shape, dtype: torch.arange(int(np.prod(shape))).reshape(shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    dtypes,
)
plain = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(), st.binary()
)
keys = st.one_of(st.text(max_size=3), st.integers(-5, 5))
batches = st.recursive(
    st.one_of(tensors, plain, tensors.map(lambda tensor: tensor.numpy() if tensor.dtype != torch.bfloat16 else tensor)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
        st.dictionaries(keys, inner, max_size=3).map(Encoding),
        st.tuples(inner, inner).map(lambda both: Pair(*both)),
    ),
    max_leaves=8,
)


@given(steps=st.lists(st.tuples(batches, batches), min_size=1, max_size=5), staged=st.booleans(), apart=st.booleans())
def test_batches_arrive_unchanged(steps: list[tuple[Any, Any]], staged: bool, apart: bool) -> None:
    ends = Ends(staged, apart)
    for parts in steps:
        assert same(ends.carry(list(parts)).batch, parts[1])


def test_step_sizes_and_end_arrive() -> None:
    ends = Ends()
    step_sizes = StepSizes((2, 1), 3)
    assert ends.carry([1, 2], 3, step_sizes, True) == DispatchedStep(2, 3, step_sizes, True)
    assert ends.carry([1, 2]) == DispatchedStep(2, None, None, False)
    ends.sender.send_end()
    assert ends.receiver.receive(1) is None


def test_steps_of_one_spec_are_one_message_each() -> None:
    ends = Ends()
    batch = {"x": torch.ones(64, 64), "y": torch.ones(64)}
    for _ in range(3):
        ends.carry([batch, batch])
    first, second, third, fourth = ends.line.sizes
    assert first == 64, "the first announces a size"
    assert second == third == fourth
    payload = 2 * (64 * 64 * 4 + 64 * 4)
    assert payload < third < payload + 512


def test_a_changed_spec_needs_no_second_message_if_it_fits() -> None:
    ends = Ends()
    ends.carry([torch.ones(100)] * 2)
    before = len(ends.line.sizes)
    assert ends.carry([torch.ones(10, 5)] * 2).batch.shape == (10, 5)
    assert ends.carry([{"a": torch.ones(3)}, "text"]).batch == "text"
    assert len(ends.line.sizes) == before + 2


def test_the_buffer_shrinks_after_an_outlier() -> None:
    ends = Ends()
    ends.carry([torch.ones(100_000)] * 2)
    for _ in range(40):
        assert torch.equal(ends.carry([torch.ones(10)] * 2).batch, torch.ones(10))
    assert max(ends.line.sizes) > 800_000
    assert ends.line.sizes[-1] < 10_000


def test_received_tensors_do_not_share_memory_with_the_next() -> None:
    ends = Ends()
    first = ends.carry([torch.zeros(4), torch.zeros(4)]).batch
    ends.carry([torch.ones(4), torch.ones(4)])
    assert torch.equal(first, torch.zeros(4))


def test_headers_are_broadcast_on_the_host() -> None:
    ends = Ends(staged=True, apart=True)
    for _ in range(3):
        assert torch.equal(ends.carry([torch.zeros(32), torch.ones(32)], 2).batch, torch.ones(32))
    assert ends.line.sizes == [2 * 32 * 4] * 3
    assert ends.host_line.sizes[-1] == 64, "a step of a known layout is one header"
    ends.sender.send_error(OSError("disk on fire"))
    with pytest.raises(ReadingRankError, match="disk on fire"):
        ends.receiver.receive(1)
    ends.sender.send_end()
    assert ends.receiver.receive(1) is None and not ends.line.sent


def test_special_values() -> None:
    ends = Ends()
    nan, infinite, scalar, text = ends.carry([0, [float("nan"), float("inf"), np.float32(1.5), np.str_("a")]]).batch
    assert nan != nan
    assert infinite == float("inf")
    assert isinstance(scalar, np.float32)
    assert scalar == 1.5
    assert text == "a"
    turned = torch.arange(6).reshape(2, 3).t()
    assert torch.equal(ends.carry([0, turned]).batch, turned)
    assert torch.equal(ends.carry([0, torch.nn.Parameter(torch.ones(2))]).batch, torch.ones(2))


class Color(enum.Enum):
    RED = 1


class Demanding(UserDict):
    def __init__(self, first: Any, second: Any) -> None:
        super().__init__({"first": first, "second": second})


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"x": {1, 2}}, r"batch\['x'\] is a builtins.set"),
        ([torch.ones(1), object()], r"batch\[1\] is a builtins.object"),
        (Color.RED, "Color"),
        (torch.ones(2, 2).to_sparse(), "layout torch.sparse_coo"),
        (np.array(["a", "b"]), "numpy array of dtype <U1"),
        (2**70, "more than 64 bits"),
        ([1, 2**70], "more than 64 bits"),
        ({("a", 1): 2}, "keys are not strings or numbers"),
        (Demanding(1, 2), "cannot be built from its items"),
        (namedtuple("Local", ["x"])(torch.ones(1)), "cannot be built"),
    ],
)
def test_unsupported_objects_are_rejected_before_sending(value: Any, found: str) -> None:
    ends = Ends()
    with pytest.raises(CannotDispatchError, match=found) as caught:
        ends.sender.pack([value, value], None, None, False)
    assert "dispatch_batches=False" in str(caught.value)
    assert not ends.line.sent


def test_an_error_arrives_with_its_text() -> None:
    ends = Ends()
    ends.carry([torch.ones(2)] * 2)
    try:
        raise OSError("disk on fire")
    except OSError as error:
        ends.sender.send_error(error)
    with pytest.raises(ReadingRankError, match=r"(?s)OSError: disk on fire.*test_batch_broadcast.py"):
        ends.receiver.receive(1)
    assert ends.carry([1, 2]).batch == 2, "the line stays usable"


def test_only_containers_are_looked_up_by_name() -> None:
    from accelerate.data_loader.batches.batch_broadcast import find_class

    assert find_class("collections:OrderedDict") is OrderedDict
    for name in ("subprocess:Popen", "os:system", "builtins:list"):
        with pytest.raises(LookupError):
            find_class(name)
