"""Weight files of a model: finds them, inspects them without reading values, and compares them with the model.

All problems are collected, so that one error lists them before any weight is changed.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..runtime.system.file_names import FileNameError, path_inside, read_json
from ..settings.enums import SAFE_WEIGHTS_NAME, WEIGHTS_NAME
from .io.safetensors_file import SafetensorsFile

EXTRA_STATE = "_extra_state"
"""Suffix of the state dict entries that modules write with `get_extra_state`."""

_INDEX = "index.json"


class WeightsError(ValueError):
    """Weights do not match the model, or files are damaged or missing. Nothing was changed.

    Attributes:
        problems: All problems found.
    """

    def __init__(self, checkpoint: object, problems: list[str]) -> None:
        shown = [f"  - {problem}" for problem in problems[:40]]
        more = [f"  - … and {len(problems) - 40} more"] if len(problems) > 40 else []
        super().__init__("\n".join([f"{checkpoint} cannot be loaded, and nothing was changed:", *shown, *more]))
        self.problems = problems


class WeightFile:
    """One weight file, read tensor by tensor.

    Args:
        path: The file.
        shapes: Shapes of its tensors, by name.
        load: Maps or reads all tensors.
        tensors: The tensors, if they are mapped already.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        load: Callable[[], Mapping[str, torch.Tensor]],
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.path = path
        self.shapes = shapes
        self._load = load
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._tensors is None:
            self._tensors = self._load()
        return self._tensors[name]

    def release(self) -> None:
        """Releases the tensors that were read or mapped, so that at most one file is held in memory."""
        self._tensors = None

    @property
    def in_place(self) -> bool:
        """Whether single tensors can be read from the file later."""
        return self.path.suffix == ".safetensors"


def load_state_dict(
    checkpoint_file: str | os.PathLike[str], device_map: Mapping[str, int | str | torch.device] | None = None
) -> dict[str, Any]:
    """Loads the tensors of one file. Code in the file is never executed.

    Args:
        checkpoint_file: A safetensors file, or a file written by `torch.save`.
        device_map: Devices by name of module or tensor. None, ``"cpu"`` and ``"disk"``: tensors stay mapped on the CPU.

    Raises:
        ValueError: if the file cannot be read.
    """
    from .device_map import device_of

    file = open_weights(Path(checkpoint_file))
    state = {}
    for name in file.shapes:
        device = device_of(name, device_map or {})
        tensor = file[name]
        state[name] = tensor if device is None or device in ("cpu", "disk") else tensor.to(device)
    return state


def open_weights(path: Path) -> WeightFile:
    """Opens a weight file over a memory map.

    Raises:
        ValueError: if it cannot be read, with the reason.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} does not exist")
    try:
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickled(path)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{path.name} contains more than tensors and plain values and is not loaded, since it could run code; or it is "
            f"damaged ({first}). Convert it to safetensors where it came from."
        ) from error
    except Exception as error:  # each library raises its own errors for a damaged file
        raise ValueError(f"{path.name} is damaged or truncated ({type(error).__name__}: {error})") from error


def _open_safetensors(path: Path) -> WeightFile:
    file = SafetensorsFile(path)
    return WeightFile(path, file.shapes, functools.partial(SafetensorsFile, path), file)


def _open_pickled(path: Path) -> WeightFile:
    with open(path, "rb") as start:
        is_archive = start.read(4) == b"PK\x03\x04"
    # Files written by torch before 1.6 are not zip archives and cannot be mapped.
    load = functools.partial(_unpickled, path, mapped=is_archive)
    tensors = load()
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    return WeightFile(path, shapes, load, tensors if is_archive else None)


def _unpickled(path: Path, *, mapped: bool) -> dict[str, torch.Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(state, Mapping):
        raise TypeError(f"expected a dictionary of tensors, but it contains a {type(state).__name__}")
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


# Finding files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint.

    Attributes:
        files: Their paths, in order.
        listed: Names of the tensors in each file, from the index; None without an index.
    """

    files: list[Path]
    listed: dict[Path, set[str]] | None


def find_checkpoint(checkpoint: str | os.PathLike[str]) -> Checkpoint:
    """Finds the weight files of a checkpoint: a weight file, an index, or a folder with one of these.

    Raises:
        ValueError: if there is none, or more than one.
    """
    path = Path(os.path.expanduser(checkpoint))
    if path.is_file():
        return _indexed(path) if path.name.endswith(_INDEX) else Checkpoint([path], None)
    if not path.is_dir():
        raise ValueError(
            f"checkpoint={os.fspath(checkpoint)!r} is neither a file nor a folder: expected a weight file, an index "
            "(…index.json), or a folder with one of these."
        )
    indexes = sorted(path.glob(f"*{_INDEX}"))
    safe = [index for index in indexes if ".safetensors" in index.name]
    if (path / SAFE_WEIGHTS_NAME).is_file():
        return Checkpoint([path / SAFE_WEIGHTS_NAME], None)
    if len(safe) == 1:
        return _indexed(safe[0])
    if not safe and (path / WEIGHTS_NAME).is_file():
        return Checkpoint([path / WEIGHTS_NAME], None)
    if len(indexes) == 1:
        return _indexed(indexes[0])
    if indexes:
        raise ValueError(f"{path} has several indexes: {', '.join(i.name for i in indexes)}. Name one as `checkpoint`.")
    single = sorted(file for suffix in ("safetensors", "bin") for file in path.glob(f"*.{suffix}"))
    if len(single) == 1:
        return Checkpoint(single, None)
    raise ValueError(
        f"{path} has no weights: expected {SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME}, or an index of shards that ends in {_INDEX}"
        + (f"; found {', '.join(file.name for file in single)} without an index." if single else ".")
    )


def _indexed(path: Path) -> Checkpoint:
    try:
        index = read_json(path)
    except FileNameError as error:
        raise ValueError(f"{path} is not an index: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not an index: it is not JSON ({error}).") from error
    places = index.get("weight_map", index) if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{path} is not an index: expected a file for each name, by name or below 'weight_map'.")
    try:
        files = {file: path_inside(path.parent, file) for file in sorted(set(places.values()))}
    except FileNameError as error:
        raise FileNameError(f"{path} is rejected, and nothing was read: {error}.") from error
    listed: dict[Path, set[str]] = {file: set() for file in files.values()}
    for name, file in places.items():
        listed[files[file]].add(name)
    return Checkpoint(list(listed), listed)


# Comparison with the model --------------------------------------------------------------------------------------------


@dataclass
class Inspection:
    """Differences between a checkpoint and a model.

    Attributes:
        files: The readable files.
        problems: Reasons why the checkpoint cannot be loaded at all.
        missing: Names in the model that are in no file.
        unexpected: Names in the files that are not in the model.
        names: All names in the model's state dict.
    """

    files: list[WeightFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)


def inspect(model: nn.Module, checkpoint: Checkpoint, tied: list[list[str]]) -> Inspection:
    """Compares a checkpoint with a model by names and shapes.

    Args:
        model: The model.
        checkpoint: The files.
        tied: Groups of names that share one tensor; a file needs one name of each.
    """
    state = model.state_dict(keep_vars=True)
    found = Inspection(names=set(state))
    expected = dict(_expected(state))
    where: dict[str, Path] = {}
    lost: set[str] = set()  # reported already, so not missing as well
    for path in checkpoint.files:
        listed = checkpoint.listed[path] if checkpoint.listed is not None else set[str]()
        try:
            file = open_weights(path)
        except ValueError as error:
            found.problems.append(str(error))
            lost |= listed
            continue
        found.files.append(file)
        for name, shape in file.shapes.items():
            if expected.get(name, shape) not in (shape, None):
                found.problems.append(f"{name} has shape {shape} in {path.name}, and {expected[name]} in the model")
        for name in sorted(where.keys() & file.shapes.keys()):
            found.problems.append(f"{name} is in both {where[name].name} and {path.name}: expected it in one file")
        where.update(dict.fromkeys(file.shapes, path))
        for name in sorted(listed - file.shapes.keys()):
            found.problems.append(f"{name} is not in {path.name}, where the index lists it")
            lost.add(name)
    seen = where.keys() | lost
    covered = {name for group in tied for name in group if seen.intersection(group)}
    found.missing = [name for name in expected if name not in seen and name not in covered and not _is_extra(name)]
    found.unexpected = sorted(name for name in where.keys() - state.keys() if not _is_extra(name))
    if not found.problems and expected and not seen.intersection(expected):
        found.problems.append(_nothing_fits(expected, seen))
    return found


def _is_extra(name: str) -> bool:
    """Returns whether the entry is a module's extra state, whose content only that module interprets."""
    return name.endswith(EXTRA_STATE)


def _expected(state: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """Yields the tensors of a state dict with the shape expected in a file; None for subclasses with their own layout."""
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            plain = type(value) in (torch.Tensor, nn.Parameter)  # a lazy module has no shape yet
            yield name, tuple(value.shape) if plain else None


def _nothing_fits(expected: Mapping[str, object], seen: set[str]) -> str:
    if not seen:
        return "it contains no tensors"
    return (
        f"none of its names is in the model: it has {sorted(seen)[0]!r} and others, the model {next(iter(expected))!r} and "
        "others"
    )
