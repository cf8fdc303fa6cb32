"""Items of a checkpoint, one for each file or folder of shards: `SaveItem` to save, `LoadItem` to load.

    save:  capture (writes nothing) -> write, on this thread or in the background
    load:  read and check every item -> only then load them

A strategy gives the items of models and optimizers (`Strategy.save_items`); `training_state` gives the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ...runtime.world import World
from ...state import GradientState
from ..errors import Problem
from ..sharded.dcp_writer import WriteResult
from ..storage import formats
from ..storage.file_writer import FileRecord, FileWriter


@dataclass(frozen=True)
class FileFormat:
    """Serialization of a state: ``write(state, writer)`` and ``read(path, **options)``.

    In a folder of shards, ``write`` returns an entry for the folder's metadata for each value that it writes.
    """

    write: Callable[[Any, FileWriter], list[WriteResult] | None]
    read: Callable[..., Any]


TORCH = FileFormat(formats.write_torch, formats.read_torch)
SAFETENSORS = FileFormat(formats.write_safetensors, formats.read_safetensors)
JSON = FileFormat(formats.write_json, formats.read_json)


class SaveItem(ABC):
    """A state to save in one file.

    Attributes:
        path: Path of the file in the checkpoint.
        format: Serialization of the file.
        per_rank: Each rank saves a file of its own, and the path names the rank. Otherwise rank 0 saves.
        collective: All ranks take part in `capture`, whichever saves.
        owns_memory: `capture` returns memory that training does not change, so a background save needs no copy.
        class_name: Class of the object, recorded in the manifest where no other class can load the state.
    """

    path: str
    format: FileFormat = TORCH
    per_rank: bool = False
    collective: bool = False
    owns_memory: bool = False
    class_name: str = ""

    @abstractmethod
    def capture(self) -> Any:
        """Returns the state, with references to live tensors; None if there is nothing to save."""


class LoadItem(ABC):
    """A state to load from one file, or from a folder of shards.

    Attributes:
        path: Path of the file or folder in the checkpoint.
        required: A checkpoint without it is incomplete.
        keeps_tensors: `load` keeps the tensors it is given, so they are read into memory of their own, not mapped.
        revertible: `load` runs user code that may raise. Such items are loaded first, and reverted if one fails.
        class_name: Class of the object, compared with the one in the manifest.
        hint: Appended to the error if the file cannot be read.
    """

    path: str
    required: bool = True
    keeps_tensors: bool = False
    revertible: bool = False
    class_name: str = ""
    hint: str = ""

    def read(self, path: Path, options: dict[str, Any]) -> Any:
        """Reads the state from `path`; `options` are for `torch.load`."""
        return formats.read_torch(path, **options)

    def check(self, state: Any) -> list[Problem]:
        """Returns every mismatch between the state and its object. Changes nothing."""
        return []

    @abstractmethod
    def load(self, state: Any) -> None:
        """Puts a state that passed `check` into its object."""

    def matching(self, state: Any) -> Any:
        """Returns the part of a mismatched state that can be loaded; None skips the item."""
        return None

    def backup(self) -> Any:
        """Returns the current state of a revertible item, for `load` to restore."""
        raise NotImplementedError


@dataclass(frozen=True)
class CapturedItem:
    """A captured state, ready to be written to its file."""

    path: str
    state: Any
    format: FileFormat
    class_name: str = ""


@dataclass(frozen=True)
class WrittenFile:
    """Record of a file that was written, and its entries for the metadata of the folder that it is in."""

    record: FileRecord
    results: list[WriteResult]


class HasStep(Protocol):
    """Holder of `Accelerator.step`."""

    step: int


class HasItems(Protocol):
    """Holder of the number of items (``backward(num_items=)``) whose gradients are accumulated; None: not counted."""

    items: torch.Tensor | None


@dataclass
class TrainingState:
    """The objects of a run that its checkpoints save and restore.

    Attributes:
        models, optimizers, schedulers, loaders, registered: The Accelerator's own lists, which grow as it prepares objects.
        scaler: The gradient scaler, or None.
        counter: Holds the step.
        mean: Holds the number of items.
        accumulation: Holds whether this micro-step synchronizes gradients.
    """

    models: list[nn.Module]
    optimizers: list[Any]
    schedulers: list[Any]
    loaders: list[Any]
    registered: list[Any]
    scaler: torch.amp.GradScaler | None
    counter: HasStep
    mean: HasItems
    accumulation: GradientState


class CheckpointStrategy(Protocol):
    """The part of a strategy that checkpoints use."""

    world: World

    @property
    def can_save_mid_accumulation(self) -> bool:
        """Returns whether gradients that are being accumulated can be part of a checkpoint."""

    def state_to_save(self, model: nn.Module) -> dict[str, Any]:
        """Returns the state of a model: the full one, or the shards of this rank."""

    def save_items(
        self, models: Sequence[nn.Module], optimizers: Sequence[Any], weights: Sequence[dict[str, Any]], *, safe: bool
    ) -> list[SaveItem]:
        """Creates the items that save models and optimizers."""

    def load_model_items(self, folder: Path, models: Sequence[nn.Module], options: dict[str, Any]) -> list[LoadItem]:
        """Creates the items that load models."""

    def load_optimizer_items(
        self, folder: Path, optimizers: Sequence[Any], models: Sequence[nn.Module]
    ) -> list[LoadItem]:
        """Creates the items that load optimizers."""

    def sync_rng(self) -> None:
        """Makes ranks that hold parts of one model draw the same random numbers."""
