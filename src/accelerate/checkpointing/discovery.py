"""Finds checkpoints in a project folder, and the problems of a checkpoint by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..runtime.system.file_names import require_regular_file
from .errors import LoadError, Problem
from .sharded.dcp_reader import DCPReader
from .storage import manifest as manifests
from .storage.atomic import COMMITTED, recover
from .storage.filenames import (
    CHECKPOINTS_FOLDER,
    checkpoint_number,
    is_checkpoint_file,
    numbered_checkpoints,
    shard_folders,
)


@dataclass
class Found:
    """Result of a search for the latest valid checkpoint.

    Attributes:
        folder: The checkpoint; None if there is none.
        passed_over: Newer folders that are not valid, each with its problems.
    """

    folder: Path | None
    passed_over: list[tuple[Path, list[Problem]]] = field(default_factory=list)


def latest_valid(project: Path, inspect: Callable[[Path], list[Problem]] | None = None) -> Found:
    """Searches the numbered checkpoints of a project, newest first, after finishing interrupted replacements.

    Args:
        project: The project's folder.
        inspect: Returns the problems of a folder; None: `problems_of`.
    """
    recover_all(project)
    found = Found(None)
    for folder in reversed(numbered_checkpoints(project)):
        problems = (inspect or problems_of)(folder)
        if not problems:
            found.folder = folder
            return found
        found.passed_over.append((folder, problems))
    return found


def recover_all(project: Path) -> None:
    """Finishes the replacements in a project that were interrupted after their commit."""
    folder = project / CHECKPOINTS_FOLDER
    if folder.is_dir():
        for entry in sorted(folder.iterdir()):
            target = entry.with_name(entry.name.removesuffix(COMMITTED))
            if entry.name.endswith(COMMITTED) and checkpoint_number(target) is not None:
                recover(target)


def problems_of(folder: Path) -> list[Problem]:
    """Returns the problems of a checkpoint by itself: no checkpoint, incomplete, or files that differ from the manifest."""
    if not folder.is_dir():
        text = "it is a file; a checkpoint is a folder" if folder.exists() else "there is no such folder"
        return [Problem(str(folder), "missing", text)]
    try:
        manifest = manifests.read(folder)
    except FileNotFoundError:
        return problems_without_manifest(folder)
    except (OSError, ValueError) as error:
        return [Problem(manifests.NAME, "corrupt", str(error))]
    return manifests.verify(folder, manifest)


def problems_without_manifest(folder: Path) -> list[Problem]:
    """Returns the problems of a folder without a manifest, which another library may have saved: reads all its files."""
    from .items.state_item import SAFETENSORS, TORCH

    names = sorted(path.name for path in folder.iterdir() if not path.is_dir() and is_checkpoint_file(path.name))
    if not any(name.startswith("random_states_") for name in names):
        return [Problem(str(folder), "corrupt", "it is no checkpoint: it has neither a manifest nor random states")]
    problems = []
    for name in names:
        if name.endswith(".json"):
            continue
        try:
            require_regular_file(folder / name)
            state = (SAFETENSORS if name.endswith(".safetensors") else TORCH).read(folder / name)
        except Exception as error:  # noqa: BLE001 - a damaged file may raise anything in a reader
            problems.append(Problem(name, "corrupt", f"it cannot be read ({_first_line(error)})"))
            continue
        if name.startswith("random_states_") and isinstance(state, dict) and "format" in state:
            text = "the checkpoint was saved with it; without it nothing can be verified"
            problems.append(Problem(manifests.NAME, "missing", text))
    for shards in shard_folders(folder):
        try:
            DCPReader(shards).verify()
        except LoadError as error:
            problems += [replace(found, file=f"{shards.name}/{found.file}") for found in error.problems]
    return problems


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"


def is_whole(folder: Path) -> bool:
    """Returns whether a checkpoint is complete by its manifest and the sizes of its files, without reading them."""
    try:
        manifest = manifests.read(folder)
    except FileNotFoundError:
        return folder.is_dir() and not problems_without_manifest(folder)
    except (OSError, ValueError):
        return False
    return manifests.has_all_files(folder, manifest)
