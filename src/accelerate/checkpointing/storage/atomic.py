"""How a checkpoint lands on disk: written beside its target, then made real by one rename.

    X.incomplete   being written; never read, removed by the next save
    X              a checkpoint
    X.committed    whole, and about to take the place of an older X: whoever finds it finishes that first (`settle`)
    X.deleted      on its way out; never read, removed by the next save

Each step leaves a complete checkpoint behind whatever happens to the process.
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
from .file_writer import FileRecord, record_of, room_made_later, sync_folder, wait_for_room, write_file
from .filenames import files_of, folders_of_shards

logger = logging.getLogger(__name__)

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
        FileExistsError: when `target` is a file, or beside it is a replacement that was interrupted and is damaged now.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; a checkpoint is a folder")
    settle(target)
    if beside(target, COMMITTED).is_dir():
        raise FileExistsError(
            f"{beside(target, COMMITTED)} was to take the place of {target}, and is not whole: move it away or remove it"
        )
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
    for name in present:  # a name that no load would take is refused by the save
        path_inside(staging, name)
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
    if place != target:
        _take_over(place, target, whole)


def settle(target: Path) -> bool:
    """Finishes a replacement that was committed and interrupted, once all of it has been verified.

    One that is damaged is left as it is, with a warning: what `target` holds is judged by itself. This can be interrupted
    anywhere, and repeated.

    Returns:
        Whether there was something to finish, and it was finished.
    """
    committed = beside(target, COMMITTED)
    if committed.is_symlink() or not committed.is_dir():
        return False
    if _holds_no_files(committed) and target.exists():  # all of them had been moved
        _remove(committed)
        sync_folder(target.parent)
        return True
    try:
        new = manifests.read(committed)
        # Those that are not there any more have been moved already.
        problems = manifests.verify(committed, new, locate=lambda name: _whereabouts(committed, target, name))
    except (OSError, ValueError) as error:
        problems = [Problem(manifests.NAME, "corrupt", str(error))]
    if problems:
        logger.warning(
            "%s was to take the place of %s, and is not whole. Both are left as they are; move it away once you have looked "
            "at it:\n%s",
            committed,
            target,
            bullet_list(problems, 5),
        )
        return False
    if not target.exists():
        os.rename(committed, target)
        sync_folder(target.parent)
    else:
        _take_over(committed, target, new)
    return True


def _holds_no_files(folder: Path) -> bool:
    return all(path.is_dir() and not path.is_symlink() for path in folder.rglob("*"))


def _whereabouts(committed: Path, target: Path, name: str) -> Path:
    """Where a file of a committed checkpoint is: still beside the target, or in it."""
    if os.path.lexists(committed / name):
        return path_for_write(committed, name)
    try:
        return path_for_write(target, name)
    except FileNameError:  # it was never moved to behind a link
        return committed / name


def _take_over(committed: Path, target: Path, new: manifests.Manifest) -> None:
    """Moves the files of a committed checkpoint over those of the older one, the manifest last."""
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


def _replace(committed: Path, target: Path, new: frozenset[str], old: set[str]) -> None:
    for name in sorted(old - new - {manifests.NAME}):
        path_for_write(target, name).unlink()
    for shards in folders_of_shards(target):
        if not shards.is_symlink() and not any(shards.iterdir()):
            shards.rmdir()
    for name in sorted(new):
        if os.path.lexists(committed / name):
            _make_own_folders(target, name)
            os.replace(path_for_write(committed, name), path_for_write(target, name))


def _make_own_folders(target: Path, name: str) -> None:
    """Makes the folders in `target` that lead to a file; a link among them makes room, and what it points to stays."""
    for parent in reversed((target / name).relative_to(target).parents[:-1]):
        folder = target / parent
        if folder.is_symlink():
            folder.unlink()
        folder.mkdir(exist_ok=True)


def _files_of(folder: Path) -> set[str]:
    """The files of a folder that belong to the checkpoint in it: by its manifest, else by their names."""
    try:
        known: Iterable[str] = manifests.read(folder).paths
    except (OSError, ValueError):
        known = files_of(folder)
    return {name for name in known if _is_own_file(folder, name)}


def _is_own_file(folder: Path, name: str) -> bool:
    try:
        return file_size(path_for_write(folder, name)) is not None
    except FileNameError:
        return False


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
