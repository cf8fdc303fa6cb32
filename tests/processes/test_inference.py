"""Pipelined inference on real ranks: outputs of the whole model, any number of rows, and each rank with its stage alone."""

from __future__ import annotations

import copy
import gc
import time
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from accelerate import PartialState, prepare_pippy
from accelerate.inference import even_split_points


class Net(nn.Module):
    """Needs its second input, and what its first part made, in its last part; hands a value straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 12)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.head = nn.Linear(12, 16, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("shift", torch.arange(12.0))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, scale: float = 1.0) -> dict[str, Any]:
        embedded = self.words(ids) + self.shift
        x = embedded.transpose(0, 1)  # not contiguous where it is cut
        for block in self.blocks:
            x = x + torch.relu(block(x))
        x = x.transpose(0, 1) * mask[..., None] * scale
        return {"scores": self.head(x), "embedded": embedded, "length": 5, "none": None}


def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(16, (rows, 5), generator=generator), torch.rand(rows, 5, generator=generator) > 0.3


def made() -> Net:
    torch.manual_seed(0)
    return Net()


def _runs(options: dict[str, Any], by_name: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    model, whole = made(), made().eval()
    gone = [weakref.ref(parameter) for parameter in model.parameters()]
    ids, mask = batch(6)
    example = {"example_kwargs": {"mask": mask, "ids": ids}} if by_name else {"example_args": (ids, mask)}
    same = prepare_pippy(model, **example, **options)
    assert same is model
    gc.collect()
    held = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    alive = sum(parameter.numel() for ref in gone if (parameter := ref()) is not None and not parameter.is_meta)
    found = []
    for rows in (6, 1, 7, 13):
        ids, mask = batch(rows)
        if state.process_index:  # what the others are given does not count
            ids = torch.zeros_like(ids)
        output = model(mask=mask, ids=ids) if by_name else model(ids, mask)
        found.append(output)
        if output is None:
            continue
        expected = whole(*batch(rows))
        assert output.keys() == expected.keys() and output["length"] == 5 and output["none"] is None
        for key in ("scores", "embedded"):
            torch.testing.assert_close(output[key], expected[key])
    return {"held": held, "alive": alive, "points": model.hf_split_points, "output": [o is not None for o in found]}


CASES: dict[str, tuple[int, dict[str, Any], bool]] = {
    "two stages": (2, {}, False),
    "by name, in one part": (2, {"num_chunks": 1, "split_points": ["blocks.1"]}, True),
    "three stages, gathered": (
        3,
        {"num_chunks": 4, "gather_output": True, "split_points": ["blocks.2", "head"]},
        False,
    ),
    "one process": (1, {}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_whole_model(name: str, run_ranks: Any) -> None:
    size, options, by_name = CASES[name]
    results = run_ranks(size, _runs, options, by_name, timeout=200)
    for rank, result in enumerate(results):
        wanted = rank == size - 1 or options.get("gather_output", False)
        assert result["output"] == [wanted] * 4
    if size == 1:
        assert results[0]["points"] == []
        return
    names = {parameter for parameter, _ in made().named_parameters()}
    held = [set(result["held"]) for result in results]
    assert set().union(*held) == names
    assert held[0] & held[-1] <= {"words.weight"}  # tied, so both the first stage and the last need it
    assert all(found < names for found in held)
    for result in results:  # the rest is not merely hidden
        own = sum(value.numel() for key, value in made().named_parameters() if key in result["held"])
        assert result["alive"] <= own


class Pair(nn.Sequential):
    pass


def test_even_split_points() -> None:
    stack = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    assert even_split_points(stack, 2) == ["3"]
    assert even_split_points(stack, 3) == ["2", "4"]
    nested = nn.Sequential(nn.Linear(8, 8), Pair(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8))
    assert even_split_points(nested, 2) == ["1.1"]
    assert even_split_points(nested, 2, ["Pair"]) in (["1"], ["2"])
    with pytest.raises(ValueError, match="cannot be divided into 4 stages"):
        even_split_points(nn.Sequential(nn.Linear(8, 8)), 4)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x)) if x.sum() > 0 else x


class Loss(Branches):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x)).mean()


class Unused(Branches):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x)


def _refusals() -> list[str]:
    torch.set_num_threads(1)
    PartialState(cpu=True)
    x = torch.ones(4, 5)
    stack = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    attempts: list[tuple[nn.Module, dict[str, Any]]] = [
        (stack, {}),
        (stack, {"example_args": (x, torch.ones(3, 5))}),
        (stack, {"example_args": (x,), "split_points": ["0", "1"]}),
        (stack, {"example_args": (x,), "split_points": ["head"]}),
        (stack, {"example_args": (x,), "split_points": "even"}),
        (stack, {"example_args": (x,), "num_chunks": 0}),
        (Branches(), {"example_args": (x,)}),
        (Loss(), {"example_args": (x,)}),
        (Unused(), {"example_args": (x,)}),
    ]
    said = []
    for model, options in attempts:
        with pytest.raises(ValueError) as caught:
            prepare_pippy(model, **options)
        said.append(str(caught.value))
        assert not any(parameter.is_meta for parameter in model.parameters())
    model = prepare_pippy(stack, example_args=(x,))
    for wrong in ((torch.ones(4, 6),), (x.double(),), (x, x), (torch.ones(0, 5),)):
        with pytest.raises(ValueError) as caught:
            model(*wrong)
        said.append(str(caught.value))
    assert (model(x) is None) == (not PartialState().is_last_process)  # and it still runs
    return said


def test_refusals_are_everybodys(run_ranks: Any) -> None:
    first, second = run_ranks(2, _refusals, timeout=200)
    assert first == second
    parts = [
        "have no tensors",
        "[3, 4] rows",
        "there are 2 processes: pass 1",
        "no such module",
        "'even'",
        "num_chunks=0",
        "cannot be traced as one graph",
        "one row for each row of input",
        "two, which runs no operation",
        "expected float32['rows', 5], and got float32['rows', 6]",
        "got float64['rows', 5]",
        "expected float32['rows', 5], and got float32['rows', 5], float32['rows', 5]",
        "at least one",
    ]
    assert len(first) == len(parts)
    for text, part in zip(first, parts, strict=True):
        assert part in text


class Looked(nn.Module):
    """Fails in its middle on ids that there are no words for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.words, self.last = nn.Linear(3, 4), nn.Embedding(5, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x) + self.words(ids))


def _fails(gather: bool) -> list[str]:
    torch.set_num_threads(1)
    PartialState(cpu=True)
    torch.manual_seed(0)
    model = Looked()
    whole = copy.deepcopy(model)
    x, ids = torch.rand(4, 3), torch.tensor([0, 1, 2, 3])
    model = prepare_pippy(
        model, example_args=(x, ids), split_points=["words", "last"], num_chunks=2, gather_output=gather
    )
    said = []
    for given in (ids, ids + 3, ids + 3, ids, torch.cat([ids, ids + 9]), ids):
        given_x = x.repeat(len(given) // 4, 1)
        try:
            output = model(given_x, given)
        except RuntimeError as error:
            said.append(str(error))
        else:
            fits = output is None or torch.allclose(output, whole(given_x, given))
            said.append("nothing" if output is None else "right" if fits else "wrong")
    return said


@pytest.mark.parametrize("gather", [False, True])
def test_a_stage_that_fails_leaves_nobody_waiting(gather: bool, run_ranks: Any) -> None:
    first, failed, last = run_ranks(3, _fails, gather, timeout=60)
    text = "stage 1 of the pipeline failed: IndexError: index out of range in self"
    bad = [False, True, True, False, True, False]
    assert last == [text if one else "right" for one in bad]
    assert failed == [text if one else "right" if gather else "nothing" for one in bad]
    assert first == (last if gather else ["nothing"] * 6)


def _leaves_early() -> bool:
    """The first process is through, and gone, while the second computes."""
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    x = torch.ones(4, 5)
    stack = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    expected = stack(x)
    model = prepare_pippy(stack, example_args=(x,))
    if state.process_index:
        stage = model.forward.stage.module
        stage.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    output = model(x)
    state.destroy_process_group()
    return output is None or bool(torch.allclose(output, expected))


def test_a_process_that_is_through_may_leave(run_ranks: Any) -> None:
    assert run_ranks(2, _leaves_early, timeout=60) == [True, True]
