"""A model's weights as files: found, looked into without reading values, and compared with the model.

Everything that is wrong is collected, so that one error can list it before any weight is changed.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..settings.enums import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

_INDEX = "index.json"


class WeightsError(ValueError):
    """Weights do not fit the model, or files are damaged or missing. Nothing was changed.

    Attributes:
        problems: Everything that was found.
    """

    def __init__(self, checkpoint: object, problems: list[str]) -> None:
        shown = [f"  - {problem}" for problem in problems[:40]]
        more = [f"  - … and {len(problems) - 40} more"] if len(problems) > 40 else []
        super().__init__("\n".join([f"{checkpoint} cannot be loaded, and nothing was changed:", *shown, *more]))
        self.problems = problems


@dataclass
class WeightFile:
    """One file of weights, opened for reading tensor by tensor.

    Attributes:
        path: Where it is.
        shapes: The shapes of the tensors in it.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    _read: Any = field(repr=False)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._read(name)
        return tensor

    @property
    def in_place(self) -> bool:
        """Whether single tensors can be read from the file later."""
        return self.path.suffix == ".safetensors"


def load_state_dict(
    checkpoint_file: str | os.PathLike[str], device_map: Mapping[str, int | str | torch.device] | None = None
) -> dict[str, Any]:
    """The tensors of one file. Code in the file is never run.

    Args:
        checkpoint_file: A safetensors file, or one that `torch.save` wrote.
        device_map: Devices by name of module or tensor. None, ``"cpu"`` and ``"disk"``: tensors stay mapped on the CPU.

    Raises:
        ValueError: when the file cannot be read.
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
    """Opens a file of weights over a memory map.

    Raises:
        ValueError: when it cannot be read: what is wrong with it.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is not there")
    try:
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickled(path)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{path.name} holds more than tensors and plain values, which is not loaded because it could run code; or it is "
            f"damaged ({first}). Save it as safetensors where it came from."
        ) from error
    except Exception as error:  # each library has errors of its own for a damaged file
        raise ValueError(f"{path.name} is damaged or cut short ({type(error).__name__}: {error})") from error


def _open_safetensors(path: Path) -> WeightFile:
    from safetensors import safe_open

    file: Any = safe_open(path, framework="pt", device="cpu")
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    return WeightFile(path, shapes, file.get_tensor)


def _open_pickled(path: Path) -> WeightFile:
    with open(path, "rb") as start:
        is_archive = start.read(4) == b"PK\x03\x04"
    # What torch before 1.6 wrote is no archive, and cannot be mapped.
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    if not isinstance(state, Mapping):
        raise TypeError(f"expected a dictionary of tensors, and it holds a {type(state).__name__}")
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return WeightFile(path, {name: tuple(value.shape) for name, value in tensors.items()}, tensors.__getitem__)


# Which files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint.

    Attributes:
        files: Their paths, in order.
        places: File by name of tensor, as an index says; None without an index.
    """

    files: list[Path]
    places: dict[str, Path] | None


def find_checkpoint(checkpoint: str | os.PathLike[str]) -> Checkpoint:
    """The files behind what a user named: a file of weights, an index, or a folder with one of these.

    Raises:
        ValueError: when there is nothing of the kind, or more than one.
    """
    path = Path(os.path.expanduser(checkpoint))
    if path.is_file():
        return _indexed(path) if path.name.endswith(_INDEX) else Checkpoint([path], None)
    if not path.is_dir():
        raise ValueError(
            f"checkpoint={os.fspath(checkpoint)!r} is neither a file nor a folder: expected a file of weights, an index of "
            "them (…index.json), or a folder with one of these."
        )
    indexes = sorted(path.glob(f"*{_INDEX}"))
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        if (path / name).is_file():
            return Checkpoint([path / name], None)
    if len(indexes) == 1:
        return _indexed(indexes[0])
    if indexes:
        safe = [index for index in indexes if ".safetensors" in index.name]
        if len(safe) == 1:
            return _indexed(safe[0])
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
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no index: it is not JSON ({error}).") from error
    places = index.get("weight_map", index) if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{path} is no index: expected a file for each name, by name or below 'weight_map'.")
    here = {name: path.parent / file for name, file in places.items()}
    return Checkpoint(sorted(set(here.values())), here)


# Fitting --------------------------------------------------------------------------------------------------------------


@dataclass
class Inspection:
    """What a checkpoint holds, beside what a model needs.

    Attributes:
        files: The files that can be read.
        problems: What keeps the checkpoint from being loaded at all.
        missing: Names that the model has and no file.
        unexpected: Names that files have and the model does not.
    """

    files: list[WeightFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def inspect(model: nn.Module, checkpoint: Checkpoint, tied: list[list[str]]) -> Inspection:
    """Compares a checkpoint with a model. Reads names and shapes only.

    Args:
        model: The model.
        checkpoint: The files.
        tied: Groups of names that stand for one tensor: one of them is enough.
    """
    found = Inspection()
    expected = dict(_expected(model))
    seen: set[str] = set()
    for path in checkpoint.files:
        try:
            file = open_weights(path)
        except ValueError as error:
            found.problems.append(str(error))
            if checkpoint.places is not None:  # not missing besides
                seen.update(name for name, place in checkpoint.places.items() if place == path)
            continue
        found.files.append(file)
        seen.update(file.shapes)
        for name, shape in file.shapes.items():
            wanted = expected.get(name)
            if wanted is not None and wanted != shape:
                found.problems.append(f"{name} has the shape {shape} in {path.name}, and {wanted} in the model")
        for name, place in (checkpoint.places or {}).items():
            if place == path and name not in file.shapes:
                found.problems.append(f"{name} is not in {path.name}, where the index says it is")
                seen.add(name)
    covered = {name for group in tied for name in group if seen.intersection(group)}
    found.missing = [name for name in expected if name not in seen and name not in covered]
    found.unexpected = sorted(name for name in seen if name not in expected and not name.endswith("_extra_state"))
    if not found.files or (expected and not found.problems and not seen.intersection(expected)):
        found.problems.append(_nothing_fits(expected, seen))
    return found


def _expected(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """The names in a model's state, with shapes that a file must have; None where a class keeps values in its own way."""
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            plain = type(value) in (torch.Tensor, nn.Parameter)
            shape: tuple[int, ...] | None = None
            with suppress(RuntimeError):  # a lazy module does not know yet
                shape = tuple(value.shape) if plain else None
            yield name, shape


def _nothing_fits(expected: Mapping[str, object], seen: set[str]) -> str:
    if not seen:
        return "there are no tensors in it"
    return (
        f"none of its names is the model's: it has {sorted(seen)[0]!r} and others, the model {next(iter(expected))!r} and "
        "others"
    )
