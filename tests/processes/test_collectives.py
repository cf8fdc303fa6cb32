"""Collectives on real gloo ranks: the observed behaviors, every dtype, ragged sizes, and debug mode's errors."""

from __future__ import annotations

import warnings
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch

from accelerate import PartialState
from accelerate.runtime import world
from accelerate.runtime.collectives import (
    CannotPadNestedTensorWarning,
    DistributedOperationException,
    broadcast,
    broadcast_object_list,
    copy_tensor_to_devices,
    gather,
    gather_object,
    gather_tensor_shape,
    pad_across_processes,
    pad_input_tensors,
    reduce,
)
from accelerate.state import AcceleratorState
from tests.helpers.behaviors import encode, outputs, per_rank

RunRanks = Callable[..., list[Any]]

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
]

Pair = namedtuple("Pair", ["first", "second"])


def raised(function: Callable[[], Any]) -> BaseException:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


# Observed behaviors ------------------------------------------------------------------------------------------------


def observed_here() -> dict[str, Any]:
    """What each call of the data file gives on this rank, spelled as there."""
    here = world.join(cpu=True)
    rank = here.rank
    t = torch.full((rank + 1, rank + 2), float(rank))
    by_name = {
        "gather": [
            gather(torch.tensor([rank])),
            gather({"a": torch.tensor([[rank]]), "b": (torch.tensor(rank),)}),
        ],
        "gather_object": gather_object([rank, "x"]),
        "broadcast": [
            broadcast({"a": torch.tensor([rank])}, from_process=1),
            broadcast_object_list([rank, "a"], from_process=1),
        ],
        "pad_across_processes": [
            pad_across_processes(t, dim=0),
            pad_across_processes(t, dim=1, pad_index=-100),
            pad_across_processes(t, dim=0, pad_first=True),
            pad_across_processes(t, dim=5),
            pad_across_processes({"a": t[:1, : rank + 1]}, dim=1, pad_index=9),
        ],
        "reduce.accelerator_default": [
            reduce(torch.tensor([rank + 1.0]), "sum"),
            reduce({"a": torch.tensor([rank + 1.0])}, "mean"),
        ],
        "copy_tensor_to_devices": copy_tensor_to_devices(torch.tensor([7.0]) if rank == 0 else None),
        # Decided difference on three ranks: 5 is padded to 6, which divides by 3, and not to 7.
        "pad_input_tensors": pad_input_tensors(torch.arange(5), 5, here.size) if here.size == 2 else None,
    }
    return {name: encode(value) for name, value in by_name.items() if value is not None}


@pytest.mark.parametrize("size", [2, 3])
def test_observed_behaviors(run_ranks: RunRanks, size: int) -> None:
    ranks = run_ranks(size, observed_here)
    two_only = {"pad_input_tensors"}
    three_only = {"reduce.accelerator_default", "copy_tensor_to_devices"}
    for name in ranks[0]:
        if (name in two_only and size != 2) or (name in three_only and size != 3):
            continue
        expected = per_rank(outputs(name, P=size)[0], size)
        for rank in range(size):
            assert ranks[rank][name] == expected[rank], (name, rank)


# Tensors of all kinds -----------------------------------------------------------------------------------------------


def every_dtype() -> None:
    here = world.join(cpu=True)
    for dtype in DTYPES:
        mine = torch.tensor([[here.rank, 1]]).to(dtype)
        everyone = gather(mine)
        assert everyone.dtype == dtype
        assert everyone.float().real.tolist() == [
            [rank, 1.0] if dtype != torch.bool else [rank > 0, 1.0] for rank in range(here.size)
        ]
        for shape in ((), (1,), (2, 1)):
            received = broadcast(torch.full(shape, here.rank + 1).to(dtype), from_process=1)
            assert received.dtype == dtype
            assert received.shape == shape
            assert bool((received.float().real == (1 if dtype == torch.bool else 2)).all())
        if dtype == torch.float8_e4m3fn:
            continue  # torch does not add these
        total = reduce(mine, "sum")
        assert total.dtype == (torch.int64 if dtype == torch.bool else dtype)
        last = sum(range(here.size)) if dtype != torch.bool else here.size - 1
        assert total.to(torch.complex64).real.tolist() == [[last, here.size]]
        mean = reduce(mine, "mean", scale=2.0)
        assert mean.is_floating_point() or mean.is_complex()
        assert mean.to(torch.complex64).real[0, 1].item() == 2.0


def contiguity_scalars_and_gradients() -> None:
    here = world.join(cpu=True)
    size, rank = here.size, here.rank
    base = torch.arange(6.0).reshape(2, 3) + 10 * rank
    views = {
        "transposed": base.t(),
        "expanded": base[:, :1].expand(2, 4),
        "strided": base[:, ::2],
        "channels_last": base.reshape(1, 2, 3, 1).to(memory_format=torch.channels_last),
        "plain": base,
    }
    gathered, summed = gather(views), reduce(views, "sum")
    for name, view in views.items():
        assert gathered[name].is_contiguous(), name
        assert summed[name].is_contiguous(), name
        assert torch.equal(gathered[name][rank * len(view) : (rank + 1) * len(view)], view), name
        assert torch.equal(summed[name], gathered[name].reshape(size, *view.shape).sum(0)), name
        received = broadcast(view, from_process=size - 1)
        assert received.is_contiguous(), name
        assert torch.equal(received, gathered[name][-len(view) :]), name
    assert gather(torch.tensor(float(rank))).tolist() == list(range(size))
    assert gather([torch.empty(0, 3)])[0].shape == (0, 3)
    assert reduce(torch.tensor(rank), "sum").shape == ()
    weight = torch.nn.Parameter(torch.tensor([float(rank)]))
    for result in (gather(weight * 2), reduce(weight), gather(weight)):
        assert not result.requires_grad
    assert broadcast(weight, 1) is weight  # in place, where the memory allows it
    assert weight.tolist() == [1.0]
    kept = torch.tensor([float(rank)])
    reduce(kept, "sum")
    gather(kept)
    assert kept.tolist() == [float(rank)]
    assert reduce(kept, "none") is kept
    tree = (Pair(kept, [kept]), OrderedDict(a=UserDict(b=kept)))
    out = gather(tree)
    assert isinstance(out[0], Pair)
    assert isinstance(out[1], OrderedDict)
    assert isinstance(out[1]["a"], UserDict)
    assert out[1]["a"]["b"].tolist() == list(range(size))


def sizes() -> None:
    here = world.join(cpu=True)
    size, rank = here.size, here.rank
    ragged = {"a": torch.full((2, rank), rank), "b": [torch.ones(rank, 5, dtype=torch.bool)], "scalar": torch.tensor(1)}
    padded = pad_across_processes(ragged, dim=-1, pad_index=7, pad_first=True)
    assert padded["a"].tolist() == [[7] * (size - 1 - rank) + [rank] * rank] * 2
    assert padded["b"][0] is ragged["b"][0]  # has the size already
    assert padded["scalar"] is ragged["scalar"]
    everyone = gather(pad_across_processes(torch.arange(rank + 1), pad_index=-1)).reshape(size, size)
    assert [row[row >= 0].tolist() for row in everyone] == [list(range(r + 1)) for r in range(size)]
    weight = torch.ones(rank + 1, requires_grad=True)
    pad_across_processes(weight, pad_index=3.5).sum().backward()
    assert weight.grad is not None  # padding keeps the gradient
    nested = torch.nested.as_nested_tensor([torch.ones(rank + 1), torch.ones(2)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CannotPadNestedTensorWarning)
        assert pad_across_processes(nested) is nested
    here_again = [w for w in caught if w.category is CannotPadNestedTensorWarning]
    assert [w.filename for w in here_again] == [__file__]


def wrong_arguments() -> None:
    here = world.join(cpu=True)
    for operation in (gather, broadcast, reduce, pad_across_processes):
        assert f"{operation.__name__} was given a str ('text') at ['a'][0]" in str(
            raised(lambda f=operation: f({"a": ["text"]}))
        )
    assert "from_process=5" in str(raised(lambda: broadcast(torch.ones(1), 5)))
    assert "expected 0 to" in str(raised(lambda: broadcast_object_list([1], -1)))
    assert isinstance(raised(lambda: broadcast_object_list((1, 2))), TypeError)  # type: ignore[arg-type]
    assert "gather_object([value])" in str(raised(lambda: gather_object(3)))
    assert gather_object((here.rank,)) == list(range(here.size))
    mismatch = raised(lambda: pad_across_processes(torch.ones([1] * (here.rank + 1))))
    assert isinstance(mismatch, DistributedOperationException)
    assert "- Process 1: [1, 1] float32" in str(mismatch)
    shape, code = gather_tensor_shape(torch.ones(2, 3).half() if here.rank == 1 else None)
    assert (shape.tolist(), code) == ([2, 3], 3)
    copied = copy_tensor_to_devices(torch.arange(6).reshape(2, 3).t() if here.rank == 1 else None)
    assert copied.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert "processes none passed one" in str(raised(lambda: copy_tensor_to_devices(None)))
    assert "processes [0, 1" in str(raised(lambda: copy_tensor_to_devices(torch.ones(1))))


def tensors_of_another_device() -> None:
    """The World's device decides where tensors travel; results come back to where the input was.

    A "meta" World stands in for an accelerator: moving to it is seen, and no value is needed.
    """
    here = world.join(cpu=True)
    comm = here.collectives
    traveled: list[torch.device] = []

    class PeerExitError(type(comm)):  # type: ignore[misc]
        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            traveled.append(tensor.device)
            return torch.empty(self.size * tensor.shape[0], device="meta")

    there = PeerExitError(torch.device("meta"))
    from accelerate.runtime import collectives

    error = raised(lambda: collectives._gather_one(torch.ones(2), there))
    assert traveled == [torch.device("meta")]
    assert isinstance(error, NotImplementedError)  # torch: nothing can be copied back out of meta


@pytest.mark.parametrize("size", [2, 3])
def test_tensors_of_all_kinds(run_ranks: RunRanks, size: int) -> None:
    for check in (every_dtype, contiguity_scalars_and_gradients, sizes, wrong_arguments):
        run_ranks(size, check)


def test_tensors_of_another_device(run_ranks: RunRanks) -> None:
    run_ranks(2, tensors_of_another_device)


# Debug mode ---------------------------------------------------------------------------------------------------------


def mismatches() -> dict[str, str]:
    here = world.join(cpu=True)
    assert here.debug
    rank = here.rank
    shaped, other = torch.ones(1, 5), torch.ones(1, 2, 5)
    mine = shaped if rank == 0 else other
    provoked: dict[str, Callable[[], Any]] = {
        "dimensions": lambda: broadcast(mine),
        "shape": lambda: gather({"a": torch.ones(rank + 1)}),
        "dtype": lambda: reduce(tensor=[torch.ones(1).double() if rank else torch.ones(1)]),
        "structure": lambda: gather([shaped] if rank else {"a": shaped}),
        "order": lambda: gather({"a": shaped, "b": shaped} if rank else {"b": shaped, "a": shaped}),
        "foreign": lambda: gather("text" if rank else shaped),
        "operation": lambda: gather(shaped) if rank else reduce(shaped),
        "pad": lambda: pad_across_processes({"x": mine}, dim=1),
        "list": lambda: broadcast_object_list([1] * (rank + 1)),
    }
    texts = {}
    for name, call in provoked.items():
        error = raised(call)
        assert isinstance(error, DistributedOperationException), (name, error)
        texts[name] = str(error)
    # And what fits still works, afterwards.
    assert gather(torch.tensor([rank])).tolist() == list(range(here.size))
    assert reduce(torch.tensor([1.0]), "sum").tolist() == [here.size]
    assert gather_object([rank]) == list(range(here.size))
    assert broadcast_object_list([rank], 1) == [1]
    assert pad_across_processes(torch.ones(rank + 1, rank + 2)).shape == (here.size, rank + 2)
    assert "gather was given a str" in str(raised(lambda: gather("text")))
    return texts


def debug_set_later() -> tuple[str, bool]:
    state = PartialState(cpu=True)
    state.debug = True
    error = raised(lambda: reduce(torch.ones(state.process_index + 1)))
    assert isinstance(error, DistributedOperationException), error
    AcceleratorState().debug = False
    return str(error), world.current().debug


def test_debug_mode_can_be_set_at_run_time(run_ranks: RunRanks) -> None:
    (first, off), (second, _) = run_ranks(2, debug_set_later)
    assert "[1]" in first and "[2]" in first and first == second
    assert not off


def extremes() -> list[Any]:
    rank = world.join(cpu=True).rank
    tree = {
        "i": torch.tensor([rank, -rank]),
        "b": torch.tensor([rank == 1, False]),
        "h": torch.tensor(rank + 0.5).half(),
    }
    most, least = reduce(tree, "max"), reduce(tree, "min", scale=2)
    assert [most[key].dtype for key in tree] == [torch.int64, torch.bool, torch.float16]
    return [*(most[key].tolist() for key in tree), *(least[key].tolist() for key in ("i", "h"))]


def test_reduce_takes_the_largest_and_the_smallest(run_ranks: RunRanks) -> None:
    assert run_ranks(3, extremes) == [[[2, 0], [True, False], 2.5, [0, -4], 1.0]] * 3


@pytest.mark.parametrize("size", [2, 3])
def test_debug_mode_names_a_mismatch_on_every_rank(run_ranks: RunRanks, size: int) -> None:
    ranks = run_ranks(size, mismatches, env={"ACCELERATE_DEBUG_MODE": "1"})
    assert all(texts == ranks[0] for texts in ranks)  # every rank says the same
    assert [{"raises": "DistributedOperationException"}] * size == per_rank(outputs("debug_mode", P=size)[0], size)
    texts = ranks[0]
    assert (
        "Operation: `accelerate.utils.operations.broadcast`\nInput shapes:\n  - Process 0: [1, 5] float32\n"
        in texts["dimensions"]
    )
    assert "  - Process 1: [1, 2, 5] float32" in texts["dimensions"]
    assert "same number of dimensions" in texts["dimensions"]
    assert f"  - Process {size - 1}: {{'a': [{size}] float32}}" in texts["shape"]
    assert "pad_across_processes(tensor, dim=...)" in texts["shape"]
    assert "float64" in texts["dtype"]
    assert "one dtype first" in texts["dtype"]
    assert "the same containers" in texts["structure"]
    assert "the same containers" in texts["order"]
    assert "Process 1: str" in texts["foreign"]
    assert (
        "process 0 `accelerate.utils.operations.reduce`, process 1 `accelerate.utils.operations.gather`"
        in texts["operation"]
    )
    assert "Padding needs tensors with the same number" in texts["pad"]
    assert "list of 2" in texts["list"]
