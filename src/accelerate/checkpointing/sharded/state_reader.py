"""Lazily read states of models and optimizers in a checkpoint: any part of a tensor can be read by itself.

Weights are keyed by FQN in every format. Optimizer states are keyed by FQN in sharded formats, and by number in the order
of the parameter groups otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..storage.formats import shared_tensor_names
from ..storage.schema import optimizer_state_error
from .compat import group_ties
from .dcp_reader import DCPReader
from .shard_layout import Chunk, narrow_to

MODEL = "model"
OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a checkpoint.

    Attributes:
        shape, dtype: Shape and dtype of the full tensor.
        copy_into: ``copy_into(offsets, target)`` copies the chunk at `offsets`, of the size of `target`, into it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    copy_into: Callable[[tuple[int, ...], torch.Tensor], None]

    def read(self) -> torch.Tensor:
        """Reads the full tensor into new memory."""
        result = torch.empty(self.shape, dtype=self.dtype)
        self.copy_into((0,) * len(self.shape), result)
        return result


def lazy_tensor(tensor: torch.Tensor) -> LazyTensor:
    """Wraps a tensor; if it is memory-mapped, only the chunks that are copied are read."""

    def copy_into(offsets: tuple[int, ...], target: torch.Tensor) -> None:
        target.copy_(narrow_to(tensor, Chunk(offsets, tuple(target.shape)), (0,) * tensor.dim()))

    return LazyTensor(tuple(tensor.shape), tensor.dtype, copy_into)


def _lazy_entry(reader: DCPReader, name: str) -> LazyTensor:
    entry = reader.entries[name]
    assert entry.dtype is not None
    return LazyTensor(entry.shape, entry.dtype, lambda offsets, target: reader.read_into(name, offsets, target))


def _read_entry(reader: DCPReader, name: str) -> Any:
    return reader.read_value(name) if reader.entries[name].dtype is None else _lazy_entry(reader, name)


# Weights ----------------------------------------------------------------------------------------------------------------


class LazyStateDict(dict[str, Any]):
    """The state of a model in a checkpoint: FQN -> `LazyTensor` or another value.

    Args:
        values: The state.
        tied: Groups of FQNs of one tensor.
    """

    def __init__(self, values: Mapping[str, Any], tied: Iterable[list[str]]) -> None:
        super().__init__(values)
        self.tied = group_ties(tied)


def wrap_weights(state: Any) -> LazyStateDict:
    """Wraps a model state that `torch.load` or safetensors returned.

    Raises:
        ValueError: if it is not a mapping.
    """
    if not isinstance(state, dict):
        raise ValueError(f"expected a mapping of names to tensors, found {type(state).__name__}")
    values = {name: lazy_tensor(value) if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    return LazyStateDict(values, shared_tensor_names(state))


def read_dcp_weights(folder: Path) -> LazyStateDict:
    """Reads the model state in a DCP folder.

    Raises:
        LoadError: naming missing and damaged files.
    """
    reader = DCPReader(folder)
    names = {entry.path[1:]: name for name, entry in reader.entries.items() if entry.path[0] == MODEL}
    if not names:
        raise ValueError("it has no model weights")
    groups: dict[Any, list[str]] = {}
    for path, name in names.items():
        groups.setdefault(reader.entries[name].chunks, []).append(".".join(path))
    values = {".".join(path): _read_entry(reader, name) for path, name in names.items()}
    return LazyStateDict(values, groups.values())


# Optimizers -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LazyOptimizerState:
    """The state of an optimizer in a checkpoint.

    Attributes:
        groups: Options of each parameter group.
        params: Parameters of each group: FQNs or numbers.
        state: Parameter -> key -> `LazyTensor` or another value.
    """

    groups: list[dict[str, Any]]
    params: list[list[Any]]
    state: dict[Any, dict[str, Any]]

    @property
    def is_named(self) -> bool:
        """True if parameters are identified by FQN."""
        return any(isinstance(param, str) for group in self.params for param in group)


def wrap_optimizer_state(state: Any) -> LazyOptimizerState:
    """Wraps an optimizer state that `torch.load` returned.

    Raises:
        ValueError: if it is not an optimizer state.
    """
    if text := optimizer_state_error(state):
        raise ValueError(text)
    values = {
        param: {
            key: lazy_tensor(value) if isinstance(value, torch.Tensor) else value for key, value in of_param.items()
        }
        for param, of_param in state["state"].items()
    }
    groups = [dict(group) for group in state["param_groups"]]
    return _apply_param_names(groups, [list(group.pop("params")) for group in groups], values)


def _apply_param_names(
    groups: list[dict[str, Any]], params: list[list[Any]], state: dict[Any, Any]
) -> LazyOptimizerState:
    """Replaces numbers by the ``param_names`` that torch records for optimizers built from named parameters."""
    names = [group.pop("param_names", None) for group in groups]
    numbers = [param for group in params for param in group]
    fqns = [name for found in names for name in found or ()]
    if len(fqns) != len(numbers) or any(isinstance(number, str) for number in numbers):
        return LazyOptimizerState(groups, params, state)
    called = dict(zip(numbers, fqns, strict=True))
    return LazyOptimizerState(groups, names, {called[number]: values for number, values in state.items()})


def read_dcp_optimizer(folder: Path) -> LazyOptimizerState:
    """Reads the optimizer state in a DCP folder.

    Raises:
        LoadError: naming missing and damaged files.
    """
    reader = DCPReader(folder)
    groups: dict[int, dict[str, Any]] = {}
    state: dict[Any, dict[str, Any]] = {}
    for name, entry in reader.entries.items():
        match entry.path:
            case (kind, "param_groups", number, key) if kind == OPTIMIZER:
                value = _read_entry(reader, name)
                groups.setdefault(int(number), {})[key] = value.read() if isinstance(value, LazyTensor) else value
            case (kind, "state", param, key) if kind == OPTIMIZER:
                state.setdefault(param, {})[key] = _read_entry(reader, name)
            case _:
                raise ValueError(f"{'.'.join(entry.path)} is not part of an optimizer state")
    if not groups:
        raise ValueError("it has no optimizer state")
    ordered = [groups[number] for number in sorted(groups)]
    return _apply_param_names(ordered, [list(group.pop("params", [])) for group in ordered], state)
