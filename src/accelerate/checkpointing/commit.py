"""How a checkpoint lands on disk: written beside its target, then made real by one rename.

    X.incomplete   being written; never read, removed by the next save
    X              a checkpoint
    X.committed    whole, and about to take the place of an older X: whoever finds it finishes that first (`settle`)
    X.deleted      on its way out; never read, removed by the next save

Each step leaves a complete checkpoint behind whatever happens to the process.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from . import manifest as manifests
from .disk import FileRecord, record_of, room_made_later, sync_folder, wait_for_room, write_file
from .names import files_of, folders_of_shards

INCOMPLETE = ".incomplete"
COMMITTED = ".committed"
DELETED = ".deleted"


def beside(target: Path, suffix: str) -> Path:
    """The folder beside `target` that stands for one of its stages."""
    return target.with_name(target.name + suffix)


def stage(target: Path) -> Path:
    """Makes the empty folder that a checkpoint is written to before it becomes `target`.

    Raises:
        OSError: where it cannot be made.
        FileExistsError: when `target` is a file.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; a checkpoint is a folder")
    settle(target)
    wait_for_room()
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (beside(target, DELETED), beside(target, INCOMPLETE)):
        _remove(leftover)
    staging = beside(target, INCOMPLETE)
    staging.mkdir()
    return staging


def commit(
    staging: Path,
    target: Path,
    records: Iterable[FileRecord],
    *,
    world_size: int,
    step: int,
    number: int,
    kinds: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Makes what lies in `staging` the checkpoint `target`.

    Args:
        staging: What `stage` gave, with every rank's part written and synced.
        target: The checkpoint's folder. One that is there is replaced; files in it that are no part of a checkpoint stay.
        records: The files whose records are known; others in `staging` (written by hooks) are read.
        world_size, step, number, kinds: For the manifest.
    """
    known = {record.path: record for record in records}
    present = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
    complete = [known.get(name) or record_of(staging / name, name) for name in present]
    lost = sorted(known.keys() - set(present))
    if lost:
        raise FileNotFoundError(f"files vanished from {staging} while it was being written: {', '.join(lost)}")
    whole = manifests.Manifest.of(complete, world_size=world_size, step=step, iteration=number, kinds=kinds)
    write_file(staging / manifests.NAME, manifests.NAME, whole.write)
    for folder in {(staging / name).parent for name in present} | {staging}:
        sync_folder(folder)
    place = beside(target, COMMITTED) if target.exists() else target
    os.rename(staging, place)
    try:
        sync_folder(target.parent)
    except OSError:  # it may not be on disk, and must not be taken for saved
        os.rename(place, staging)
        raise
    settle(target)


def settle(target: Path) -> bool:
    """Finishes a replacement that was committed: moves its files over those of the older checkpoint, the manifest last.

    It can be interrupted anywhere, and repeated.

    Returns:
        Whether there was something to finish.
    """
    committed = beside(target, COMMITTED)
    if not committed.is_dir():
        return False
    if not target.exists():
        os.rename(committed, target)
        sync_folder(target.parent)
        return True
    if (committed / manifests.NAME).exists():
        new = manifests.read(committed)
        old = _files_of(target)
        with room_made_later(target / name for name in old):
            _replace(committed, target, new.paths, old)
            for folder in {(target / name).parent for name in new.paths} | {target}:
                sync_folder(folder)
            # Names in several folders reach the disk in any order: the manifest moves when the others are there.
            os.replace(committed / manifests.NAME, target / manifests.NAME)
            sync_folder(target)
    _remove(committed)
    sync_folder(target.parent)
    return True


def _replace(committed: Path, target: Path, new: frozenset[str], old: set[str]) -> None:
    for name in sorted(old - new - {manifests.NAME}):
        (target / name).unlink()
    for shards in folders_of_shards(target):
        if not any(shards.iterdir()):
            shards.rmdir()
    for name in sorted(new):
        if (committed / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(committed / name, target / name)


def _files_of(folder: Path) -> set[str]:
    """The files of a folder that belong to the checkpoint in it: by its manifest, else by their names."""
    try:
        known = manifests.read(folder).paths
    except (OSError, ValueError):
        return files_of(folder)
    return {name for name in known if (folder / name).is_file()}


def discard(target: Path) -> None:
    """Removes a checkpoint so that a half-removed one is never taken for whole."""
    doomed = beside(target, DELETED)
    _remove(doomed)
    os.rename(target, doomed)
    with room_made_later([path for path in doomed.rglob("*") if path.is_file()]):
        shutil.rmtree(doomed, ignore_errors=True)
    if doomed.exists():  # over NFS, a file that somebody holds open keeps its folder
        wait_for_room()
        _remove(doomed)


def _remove(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    elif folder.exists() or folder.is_symlink():
        folder.unlink()
