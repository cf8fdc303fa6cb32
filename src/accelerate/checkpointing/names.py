"""The names that files of a checkpoint have, as the documented layouts have them, and the numbered folders of a project."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

from ..settings.enums import (
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
FOLDER = "checkpoints"
NUMBERED = "checkpoint_"


def numbered(stem: str, index: int, suffix: str) -> str:
    """``optimizer.bin``, ``optimizer_1.bin``, ``optimizer_2.bin`` …"""
    return f"{stem}{f'_{index}' if index else ''}{suffix}"


def model_file(index: int, safe: bool) -> str:
    """The file with the weights of a model."""
    return numbered(SAFE_MODEL_NAME, index, ".safetensors") if safe else numbered(MODEL_NAME, index, ".bin")


def random_file(rank: int) -> str:
    """The file with the random states of a rank."""
    return f"{RNG_STATE_NAME}_{rank}.pkl"


def custom_file(index: int) -> str:
    """The file of a registered object."""
    return f"{CUSTOM_NAME}_{index}.pkl"


def gradients_file(rank: int) -> str:
    """The file with the gradients a rank had accumulated."""
    return f"{GRADIENTS_NAME}_{rank}.bin"


_COUNTED = "|".join((OPTIMIZER_NAME, SCHEDULER_NAME, SAMPLER_NAME, LOADER_NAME, MODEL_NAME))
_SHARED = re.compile(
    rf"({_COUNTED})(_\d+)?\.bin|{SAFE_MODEL_NAME}(_\d+)?\.safetensors|{CUSTOM_NAME}_\d+\.pkl|{re.escape(SCALER_NAME)}"
    rf"|{re.escape(PROGRESS_NAME)}"
)
_OF_RANKS = re.compile(rf"{RNG_STATE_NAME}_\d+\.pkl|{GRADIENTS_NAME}_\d+\.bin")


def is_shared(name: str) -> bool:
    """Whether a file has the name of a part that is the same for all ranks."""
    return _SHARED.fullmatch(name) is not None


def is_ours(name: str) -> bool:
    """Whether a file has the name of any part of a checkpoint."""
    return is_shared(name) or _OF_RANKS.fullmatch(name) is not None


_HOLDS = {
    PROGRESS_NAME: "where the run stands",
    SCALER_NAME: "gradient scaler",
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


def describe(name: str) -> str:
    """What a file of a checkpoint holds, by its name."""
    return next((text for pattern, text in _HOLDS.items() if fnmatch.fnmatchcase(name, pattern)), "")


def number_of(folder: Path) -> int | None:
    """The number of a folder ``checkpoint_<number>``; None for others."""
    digits = folder.name.removeprefix(NUMBERED)
    return int(digits) if digits != folder.name and digits.isdecimal() else None


def numbered_folders(project: Path) -> list[Path]:
    """The folders ``checkpoints/checkpoint_<number>`` of a project, in order of their numbers."""
    if not (project / FOLDER).is_dir():
        return []
    found = {number: entry for entry in (project / FOLDER).iterdir() if (number := number_of(entry)) is not None}
    return [found[number] for number in sorted(found) if found[number].is_dir()]
