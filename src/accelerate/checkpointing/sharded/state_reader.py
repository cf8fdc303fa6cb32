"""What a checkpoint holds of a model or an optimizer, whatever it was saved by: tensors to take any part of.

Weights have names everywhere. States of optimizers have the names of parameters where they were sharded, and numbers, in
the order of the parameter groups, where they were not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..model_files import shared_tensor_names
from ..storage.schema import no_optimizer
from .compat import ties
from .dcp_reader import StoredFolder
from .shard_layout import Box, part_of

MODEL = "model"
OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class Saved:
    """A tensor in a checkpoint.

    Attributes:
        shape, dtype: The tensor's.
        fill: ``fill(offsets, target)`` copies the part that begins at `offsets` and is as large as `target`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: Callable[[tuple[int, ...], torch.Tensor], None]

    def read(self) -> torch.Tensor:
        """The whole tensor, in memory of its own."""
        result = torch.empty(self.shape, dtype=self.dtype)
        self.fill((0,) * len(self.shape), result)
        return result


def of_tensor(tensor: torch.Tensor) -> Saved:
    """A tensor that was read whole (over a memory map: what is not asked for is not read)."""

    def fill(offsets: tuple[int, ...], target: torch.Tensor) -> None:
        target.copy_(part_of(tensor, Box(offsets, tuple(target.shape)), (0,) * tensor.dim()))

    return Saved(tuple(tensor.shape), tensor.dtype, fill)


def _of_folder(stored: StoredFolder, name: str) -> Saved:
    entry = stored.entries[name]
    assert entry.dtype is not None
    return Saved(entry.shape, entry.dtype, lambda offsets, target: stored.fill(name, offsets, target))


def _value(stored: StoredFolder, name: str) -> Any:
    return stored.value(name) if stored.entries[name].dtype is None else _of_folder(stored, name)


# Weights ----------------------------------------------------------------------------------------------------------------


class SavedWeights(Mapping[str, Any]):
    """The state of a model in a checkpoint: `Saved` tensors and other values, by name.

    Args:
        values: The state.
        tied: Groups of names that stand for one tensor.
    """

    def __init__(self, values: Mapping[str, Any], tied: Iterable[list[str]]) -> None:
        self._values = values
        self.tied = ties(tied)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def weights_in_file(state: Any) -> SavedWeights:
    """Those of a state that was read whole.

    Raises:
        ValueError: when it is none.
    """
    if not isinstance(state, dict):
        raise ValueError(f"expected a mapping of names to tensors, found {type(state).__name__}")
    values = {name: of_tensor(value) if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    return SavedWeights(values, shared_tensor_names(state))


def weights_in_folder(folder: Path) -> SavedWeights:
    """Those in a folder of shards.

    Raises:
        LoadError: naming the files that are missing or damaged.
    """
    stored = StoredFolder(folder)
    names = {entry.path[1:]: name for name, entry in stored.entries.items() if entry.path[0] == MODEL}
    if not names:
        raise ValueError("it holds no weights of a model")
    groups: dict[Any, list[str]] = {}
    for path, name in names.items():
        groups.setdefault(stored.entries[name].pieces, []).append(".".join(path))
    values = {".".join(path): _value(stored, name) for path, name in names.items()}
    return SavedWeights(values, groups.values())


# Optimizers -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedOptimizer:
    """The state of an optimizer in a checkpoint.

    Attributes:
        groups: Of each parameter group, its options.
        params: Of each parameter group, what its parameters are called: names, or numbers.
        state: Parameter -> key -> `Saved` tensor or another value.
    """

    groups: list[dict[str, Any]]
    params: list[list[Any]]
    state: dict[Any, dict[str, Any]]

    @property
    def is_named(self) -> bool:
        """Whether parameters have names."""
        return any(isinstance(param, str) for group in self.params for param in group)


def optimizer_in_file(state: Any) -> SavedOptimizer:
    """That of a state that was read whole.

    Raises:
        ValueError: when it is none.
    """
    if text := no_optimizer(state):
        raise ValueError(text)
    values = {
        param: {key: of_tensor(value) if isinstance(value, torch.Tensor) else value for key, value in of_param.items()}
        for param, of_param in state["state"].items()
    }
    groups = [dict(group) for group in state["param_groups"]]
    return _named_where_told(groups, [list(group.pop("params")) for group in groups], values)


def _named_where_told(groups: list[dict[str, Any]], params: list[list[Any]], state: dict[Any, Any]) -> SavedOptimizer:
    """With the names that torch notes of an optimizer that was made of named parameters."""
    names = [group.pop("param_names", None) for group in groups]
    numbers = [param for group in params for param in group]
    known = [name for found in names for name in found or ()]
    if len(known) != len(numbers) or any(isinstance(number, str) for number in numbers):
        return SavedOptimizer(groups, params, state)
    called = dict(zip(numbers, known, strict=True))
    return SavedOptimizer(groups, names, {called[number]: values for number, values in state.items()})


def optimizer_in_folder(folder: Path) -> SavedOptimizer:
    """That in a folder of shards.

    Raises:
        LoadError: naming the files that are missing or damaged.
    """
    stored = StoredFolder(folder)
    groups: dict[int, dict[str, Any]] = {}
    state: dict[Any, dict[str, Any]] = {}
    for name, entry in stored.entries.items():
        match entry.path:
            case (kind, "param_groups", number, key) if kind == OPTIMIZER:
                value = _value(stored, name)
                groups.setdefault(int(number), {})[key] = value.read() if isinstance(value, Saved) else value
            case (kind, "state", param, key) if kind == OPTIMIZER:
                state.setdefault(param, {})[key] = _value(stored, name)
            case _:
                raise ValueError(f"{'.'.join(entry.path)} is no part of an optimizer's state")
    if not groups:
        raise ValueError("it holds no state of an optimizer")
    ordered = [groups[number] for number in sorted(groups)]
    return _named_where_told(ordered, [list(group.pop("params", [])) for group in ordered], state)
