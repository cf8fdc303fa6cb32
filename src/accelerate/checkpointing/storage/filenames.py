"""File names of the documented checkpoint layouts, and numbered checkpoint folders of a project."""

from __future__ import annotations

import fnmatch
import os
import re
from pathlib import Path

from ...settings.enums import (
    FSDP_MODEL_NAME,
    MODEL_NAME,
    OPTIMIZER_NAME,
    RNG_STATE_NAME,
    SAFE_MODEL_NAME,
    SAMPLER_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
)

LOADER_NAME = "dl_state_dict"
CUSTOM_NAME = "custom_checkpoint"
GRADIENTS_NAME = "gradients"
PROGRESS_NAME = "progress.json"
CHECKPOINTS_FOLDER = "checkpoints"
CHECKPOINT_PREFIX = "checkpoint_"


def indexed_name(stem: str, index: int, suffix: str) -> str:
    """Returns ``optimizer.bin``, ``optimizer_1.bin``, ``optimizer_2.bin`` …"""
    return f"{stem}{f'_{index}' if index else ''}{suffix}"


def model_file(index: int, safe: bool) -> str:
    """Returns the name of a weights file."""
    return indexed_name(SAFE_MODEL_NAME, index, ".safetensors") if safe else indexed_name(MODEL_NAME, index, ".bin")


def full_model_file(index: int) -> str:
    """Returns the name of the file with the full weights of a sharded model."""
    return indexed_name(FSDP_MODEL_NAME, index, ".bin")


def optimizer_file(index: int) -> str:
    """Returns the name of an optimizer's file."""
    return indexed_name(OPTIMIZER_NAME, index, ".bin")


def model_folder(index: int) -> str:
    """Returns the name of the folder with the shards of a model."""
    return f"{FSDP_MODEL_NAME}_{index}"


def optimizer_folder(index: int) -> str:
    """Returns the name of the folder with the shards of an optimizer."""
    return f"{OPTIMIZER_NAME}_{index}"


def rng_file(rank: int) -> str:
    """Returns the name of the file with a rank's random states."""
    return f"{RNG_STATE_NAME}_{rank}.pkl"


def custom_file(index: int) -> str:
    """Returns the name of a registered object's file."""
    return f"{CUSTOM_NAME}_{index}.pkl"


def gradients_file(rank: int) -> str:
    """Returns the name of the file with a rank's accumulated gradients."""
    return f"{GRADIENTS_NAME}_{rank}.bin"


_COUNTED = "|".join((OPTIMIZER_NAME, SCHEDULER_NAME, SAMPLER_NAME, LOADER_NAME, MODEL_NAME, FSDP_MODEL_NAME))
_SHARED = re.compile(
    rf"({_COUNTED})(_\d+)?\.bin|{SAFE_MODEL_NAME}(_\d+)?\.safetensors|{CUSTOM_NAME}_\d+\.pkl|{re.escape(SCALER_NAME)}"
    rf"|{re.escape(PROGRESS_NAME)}"
)
_FOLDER = re.compile(rf"({FSDP_MODEL_NAME}|{OPTIMIZER_NAME})_\d+")
_IN_FOLDER = re.compile(rf"({_FOLDER.pattern})/(__\d+_\d+\.distcp|\.metadata)")
_OF_RANKS = re.compile(rf"{RNG_STATE_NAME}_\d+\.pkl|{GRADIENTS_NAME}_\d+\.bin")


def is_shared(name: str) -> bool:
    """Returns True for the names of items that are the same on all ranks: files and folders of shards."""
    return _SHARED.fullmatch(name) is not None or _FOLDER.fullmatch(name) is not None


def is_checkpoint_file(name: str) -> bool:
    """Returns True for the names of files that checkpoints consist of; for shards, with the folder in front."""
    return any(pattern.fullmatch(name) for pattern in (_SHARED, _OF_RANKS, _IN_FOLDER))


def item_of(name: str) -> str:
    """Returns the item that a file belongs to: the file itself, or its folder of shards."""
    return name.split("/")[0] if _IN_FOLDER.fullmatch(name) else name


def checkpoint_files_in(folder: Path) -> set[str]:
    """Returns the paths of files in a folder that `is_checkpoint_file` accepts."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in found if is_checkpoint_file(name)}


def shard_folders(folder: Path) -> list[Path]:
    """Returns the folders of shards in a checkpoint."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and _FOLDER.fullmatch(path.name))


_DESCRIPTIONS = {
    PROGRESS_NAME: "progress of the run",
    SCALER_NAME: "gradient scaler",
    f"{FSDP_MODEL_NAME}_*/.metadata": "weights, index of the shards",
    f"{FSDP_MODEL_NAME}_*/*": "weights, shards of a process",
    f"{OPTIMIZER_NAME}_*/.metadata": "optimizer, index of the shards",
    f"{OPTIMIZER_NAME}_*/*": "optimizer, shards of a process",
    f"{OPTIMIZER_NAME}*.bin": "optimizer",
    f"{SCHEDULER_NAME}*.bin": "learning rate scheduler",
    f"{SAMPLER_NAME}*.bin": "order of a loader",
    f"{LOADER_NAME}*.bin": "position of a loader",
    f"{MODEL_NAME}*.bin": "weights",
    f"{SAFE_MODEL_NAME}*.safetensors": "weights",
    f"{CUSTOM_NAME}_*.pkl": "registered object",
    f"{RNG_STATE_NAME}_*.pkl": "random states of a process",
    f"{GRADIENTS_NAME}_*.bin": "gradients of a process",
}


def describe_file(name: str) -> str:
    """Describes the content of a file of a checkpoint, by its name."""
    return next((text for pattern, text in _DESCRIPTIONS.items() if fnmatch.fnmatchcase(name, pattern)), "")


def checkpoint_number(folder: Path) -> int | None:
    """Returns the number of a folder ``checkpoint_<number>``, or None for other names."""
    digits = folder.name.removeprefix(CHECKPOINT_PREFIX)
    return int(digits) if digits != folder.name and digits.isdecimal() else None


def numbered_checkpoints(project: Path) -> list[Path]:
    """Returns the folders ``checkpoints/checkpoint_<number>`` of a project, in order of their numbers."""
    if not (project / CHECKPOINTS_FOLDER).is_dir():
        return []
    found = {
        number: entry
        for entry in (project / CHECKPOINTS_FOLDER).iterdir()
        if (number := checkpoint_number(entry)) is not None
    }
    return [found[number] for number in sorted(found) if found[number].is_dir()]


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)")  # at least two letters: one is a drive


def is_url(path: str | os.PathLike[str] | None) -> bool:
    """Returns whether a path is a URL, which fsspec opens."""
    return isinstance(path, str) and _URL.match(path) is not None
