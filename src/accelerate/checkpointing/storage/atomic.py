"""Commits checkpoints atomically: a checkpoint is written to a sibling of its target folder and renamed into place.

    X.incomplete   being written; never read, removed by the next save
    X              a checkpoint
    X.committed    complete, and about to replace an older X; `recover` finishes the replacement
    X.deleted      being removed; never read, removed by the next save

After a crash at any step, a complete checkpoint is left.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from ...runtime.system.file_names import FileNameError, file_size, path_for_write, path_inside
from ..errors import Problem, bullet_list
from . import manifest as manifests
from .file_writer import FileRecord, deferred_unlink, fingerprint, sync_folder, wait_for_unlinks, write_file
from .filenames import checkpoint_files_in, shard_folders

logger = logging.getLogger(__name__)

INCOMPLETE = ".incomplete"
COMMITTED = ".committed"
DELETED = ".deleted"


def sibling(target: Path, suffix: str) -> Path:
    """Returns the folder beside `target` for one of its stages."""
    return target.with_name(target.name + suffix)


def stage(target: Path) -> Path:
    """Creates the empty folder that a checkpoint is written to before it becomes `target`.

    Raises:
        OSError: if it cannot be created.
        FileExistsError: if `target` is a file, or an interrupted replacement of it is damaged.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; a checkpoint is a folder")
    recover(target)
    if sibling(target, COMMITTED).is_dir():
        raise FileExistsError(
            f"{sibling(target, COMMITTED)} was to replace {target}, and is not complete: move it away or remove it"
        )
    wait_for_unlinks()
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (sibling(target, DELETED), sibling(target, INCOMPLETE)):
        _remove(leftover)
    staging = sibling(target, INCOMPLETE)
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
    """Makes the content of `staging` the checkpoint `target`.

    Args:
        staging: Folder from `stage`, with the synced files of all ranks.
        target: Folder of the checkpoint. An existing checkpoint is replaced; other files in the folder stay.
        records: Records of files; those without one in `staging` (written by hooks) are read to compute it.
        world_size, step, number, kinds: Fields of the manifest.
    """
    known = {record.path: record for record in records}
    present = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
    for name in present:  # refuse names that no load would accept
        path_inside(staging, name)
    complete = [known.get(name) or fingerprint(staging / name, name) for name in present]
    lost = sorted(known.keys() - set(present))
    if lost:
        raise FileNotFoundError(f"files vanished from {staging} while it was being written: {', '.join(lost)}")
    whole = manifests.Manifest.of(complete, world_size=world_size, step=step, iteration=number, kinds=kinds)
    write_file(staging / manifests.NAME, manifests.NAME, whole.write)
    for folder in {(staging / name).parent for name in present} | {staging}:
        sync_folder(folder)
    place = sibling(target, COMMITTED) if target.exists() else target
    os.rename(staging, place)
    try:
        sync_folder(target.parent)
    except OSError:  # the rename may not be durable, so the save has failed
        os.rename(place, staging)
        raise
    if place != target:
        _replace_target(place, target, whole)


def recover(target: Path) -> bool:
    """Finishes an interrupted replacement of `target`, after verifying all files. Can be interrupted and repeated.

    A damaged replacement stays as it is, with a warning; `target` is then judged by itself.

    Returns:
        True if a replacement was finished.
    """
    committed = sibling(target, COMMITTED)
    if committed.is_symlink() or not committed.is_dir():
        return False
    if _holds_no_files(committed) and target.exists():  # every file had been moved
        _remove(committed)
        sync_folder(target.parent)
        return True
    try:
        new = manifests.read(committed)
        # Files that are missing here were moved to the target.
        problems = manifests.verify(committed, new, locate=lambda name: _locate(committed, target, name))
    except (OSError, ValueError) as error:
        problems = [Problem(manifests.NAME, "corrupt", str(error))]
    if problems:
        logger.warning(
            "%s was to replace %s, and is not complete. Both are left as they are; inspect it, then move it away:\n%s",
            committed,
            target,
            bullet_list(problems, 5),
        )
        return False
    if not target.exists():
        os.rename(committed, target)
        sync_folder(target.parent)
    else:
        _replace_target(committed, target, new)
    return True


def _holds_no_files(folder: Path) -> bool:
    return all(path.is_dir() and not path.is_symlink() for path in folder.rglob("*"))


def _locate(committed: Path, target: Path, name: str) -> Path:
    """Returns the path of a file of a committed checkpoint: beside the target, or already moved into it."""
    if os.path.lexists(committed / name):
        return path_for_write(committed, name)
    try:
        return path_for_write(target, name)
    except FileNameError:  # files are never moved through a link
        return committed / name


def _replace_target(committed: Path, target: Path, new: manifests.Manifest) -> None:
    """Moves the files of a committed checkpoint over those of the older one, the manifest last."""
    old = _files_of(target)
    with deferred_unlink(target / name for name in old):
        _move_files(committed, target, new.paths, old)
        for folder in {(target / name).parent for name in new.paths} | {target}:
            sync_folder(folder)
        # Directory entries of several folders reach the disk in any order: sync them before the manifest moves.
        os.replace(committed / manifests.NAME, target / manifests.NAME)
        sync_folder(target)
    _remove(committed)
    sync_folder(target.parent)


def _move_files(committed: Path, target: Path, new: frozenset[str], old: set[str]) -> None:
    for name in sorted(old - new - {manifests.NAME}):
        path_for_write(target, name).unlink()
    for shards in shard_folders(target):
        if not shards.is_symlink() and not any(shards.iterdir()):
            shards.rmdir()
    for name in sorted(new):
        if os.path.lexists(committed / name):
            _make_own_folders(target, name)
            os.replace(path_for_write(committed, name), path_for_write(target, name))


def _make_own_folders(target: Path, name: str) -> None:
    """Creates the parent folders of a file in `target`; a link among them is removed, and its destination stays."""
    for parent in reversed((target / name).relative_to(target).parents[:-1]):
        folder = target / parent
        if folder.is_symlink():
            folder.unlink()
        folder.mkdir(exist_ok=True)


def _files_of(folder: Path) -> set[str]:
    """Returns the files of the checkpoint in a folder: from its manifest, or else by their names."""
    try:
        known: Iterable[str] = manifests.read(folder).paths
    except (OSError, ValueError):
        known = checkpoint_files_in(folder)
    return {name for name in known if _is_own_file(folder, name)}


def _is_own_file(folder: Path, name: str) -> bool:
    try:
        return file_size(path_for_write(folder, name)) is not None
    except FileNameError:
        return False


def delete(target: Path) -> None:
    """Removes a checkpoint; a partly removed one is never taken for complete."""
    doomed = sibling(target, DELETED)
    _remove(doomed)
    os.rename(target, doomed)
    with deferred_unlink([path for path in doomed.rglob("*") if path.is_file()]):
        shutil.rmtree(doomed, ignore_errors=True)
    if doomed.exists():  # on NFS, a file that is open keeps its folder
        wait_for_unlinks()
        _remove(doomed)


def _remove(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    elif folder.exists() or folder.is_symlink():
        folder.unlink()
