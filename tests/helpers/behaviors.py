"""Reads observed behaviors from tests/data and writes results the way they are written there."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from accelerate.runtime.tensors.pytree import TensorInformation

DATA = Path(__file__).resolve().parents[1] / "data"


@functools.cache
def _cases(file: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((DATA / file).read_text())
    return loaded


def outputs(name: str, file: str = "runtime_behaviors.json", **given: Any) -> list[Any]:
    """The observed outputs of the cases of that name whose input contains `given`, without their wrapping."""
    found = [
        _unwrapped(case["output"])
        for case in _cases(file)
        if case["name"] == name and given.items() <= case["input"].items()
    ]
    assert found, f"{file} has no case {name} with {given}"
    return found


def per_rank(observed: Any, size: int) -> list[Any]:
    """What each rank is to give: the list of a ``per_rank`` case, or one value for all."""
    if isinstance(observed, dict) and "all_ranks" in observed:
        return [observed["all_ranks"]] * size
    result: list[Any] = observed["per_rank"]
    return result


def _unwrapped(output: Any) -> Any:
    return output["tuple"] if isinstance(output, dict) and set(output) == {"tuple"} else output


def encode(value: Any) -> Any:
    """A result as the file spells it: tensors with their dtype, tuples as lists, exceptions by their class."""
    if isinstance(value, torch.Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, TensorInformation):
        return {"dataclass": "TensorInformation", "shape": list(value.shape), "dtype": str(value.dtype)}
    if isinstance(value, BaseException):
        return {"raises": type(value).__name__}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value
