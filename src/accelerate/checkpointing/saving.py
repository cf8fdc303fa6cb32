"""`save`: all ranks write their parts beside the target, rank 0 commits. Nothing that exists is touched before that.

1. agree on the folder        rank 0's; ranks on a machine without a common disk make one of their own
2. capture                    hooks run, states are taken (copied first, if the step is to go on meanwhile)
3. write                      every rank its files, synced
4. commit                     manifest, one rename; then older checkpoints beyond the limit go
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..logging import get_logger
from ..runtime.collective_backend import Collectives
from ..runtime.world import World
from .consensus import broadcast_from_rank0, run_on_all_ranks
from .discovery import is_whole
from .errors import SaveError
from .items.state_item import Entry, Part, Written
from .sharded.dcp_writer import WriteResult, write_metadata
from .storage.atomic import commit, delete, stage
from .storage.filenames import item_of, numbered_checkpoints
from .storage.remote import Upload
from .storage.staging import StagingBuffer
from .storage.thread_map import thread_map

logger = get_logger(__name__)

_THREADS = 4
_TOKEN = ".disk"


@dataclass(frozen=True)
class StagingTarget:
    """Where this rank's part goes, and what it does there.

    Attributes:
        target: The checkpoint's folder.
        staging: Where it is written first.
        commits: This rank makes the folder real.
        shared: This rank writes the parts that are the same for all.
        group: Which ranks write to the same disk: the rank that commits there.
    """

    target: Path
    staging: Path
    commits: bool
    shared: bool
    group: int


def open_staging(world: World, target: Path, save_on_each_node: bool) -> StagingTarget:
    """Makes the folder that all ranks write to, on each disk.

    Args:
        world: This process and its peers.
        target: The checkpoint's folder; rank 0's counts.
        save_on_each_node: Parts that are the same for all are written on every machine that has a disk of its own.

    Raises:
        SaveError: on every rank, when it cannot be made.
    """
    comm = world.collectives
    token = uuid.uuid4().hex
    name, token = broadcast_from_rank0(comm, f"preparing {target}", (str(target), token), SaveError)
    target = Path(name)
    staging = target.with_name(target.name + ".incomplete")

    def make() -> None:
        if world.rank == 0:
            stage(target)
            (staging / _TOKEN).write_text(token)

    run_on_all_ranks(comm, f"preparing {target}", make, SaveError)
    if world.local_size == world.size:
        return StagingTarget(target, staging, commits=world.rank == 0, shared=world.rank == 0, group=0)

    def look() -> bool:
        return (staging / _TOKEN).is_file() and (staging / _TOKEN).read_text() == token

    sees = run_on_all_ranks(comm, f"preparing {target}", look, SaveError)
    first = world.rank - world.local_rank
    alone = not sees[first]

    def make_own() -> None:
        if alone and world.local_rank == 0:
            stage(target)

    run_on_all_ranks(comm, f"preparing {target}", make_own, SaveError)
    leads = world.rank == 0 or (alone and world.local_rank == 0)
    shares = world.rank == 0 or (leads and save_on_each_node)
    return StagingTarget(target, staging, commits=leads, shared=shares, group=first if alone else 0)


def capture(entries: Sequence[Entry], disk: StagingTarget, room: StagingBuffer | None) -> list[Part]:
    """This rank's parts of a checkpoint.

    Args:
        entries: All entries.
        disk: What this rank writes.
        room: Copy tensors to there, so that the training may change them while they are written.
    """
    if room is not None:
        room.clear()
    parts = []
    try:
        for entry in entries:
            saves = entry.everywhere or disk.shared
            if saves or entry.collective:
                state = entry.capture()
                if saves and state is not None:
                    kept = state if room is None or entry.fresh else _copied(state, room)
                    parts.append(Part(entry.path, kept, entry.format, entry.kind))
    finally:
        if room is not None:
            room.wait()
    return parts


def _copied(tree: Any, room: StagingBuffer) -> Any:
    seen: dict[int, torch.Tensor] = {}

    def walk(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            # Tied tensors stay tied: they are written once.
            if id(node) not in seen:
                seen[id(node)] = room.copy(node)
            return seen[id(node)]
        if isinstance(node, dict):
            return type(node)((key, walk(value)) for key, value in node.items())
        if type(node) in (list, tuple):
            return type(node)(walk(value) for value in node)
        return node

    copied = walk(tree)
    room.copy_cpu_tensors()
    return copied


@dataclass(frozen=True)
class SaveJob:
    """A captured checkpoint on its way to the disk; `run` may be called on another thread.

    Attributes:
        world: This process and its peers.
        collectives: The ranks in `run`: in a group of its own if it runs beside the training.
        disk: Where to.
        parts: This rank's parts.
        step, number: For the manifest.
        project: Where the limit applies; None where it does not.
        limit: How many numbered checkpoints are kept; None: all.
        outgoing: Where the checkpoint goes from there; None: it stays.
    """

    world: World
    collectives: Collectives
    disk: StagingTarget
    parts: Sequence[Part]
    step: int
    number: int
    project: Path | None = None
    limit: int | None = None
    outgoing: Upload | None = None

    def run(self) -> None:
        """Writes, commits, sends and prunes.

        Raises:
            SaveError: on every rank. The checkpoint is not there then, and what was there before is.
        """
        comm, disk = self.collectives, self.disk
        try:
            written = run_on_all_ranks(comm, f"writing {disk.target}", self._write, SaveError)
            run_on_all_ranks(comm, f"committing {disk.target}", lambda: self._commit(written), SaveError)
            if self.outgoing is not None:
                run_on_all_ranks(comm, f"sending the checkpoint to {self.outgoing.url}", self._send, SaveError)
        except SaveError:
            discard_staging(disk)
            raise
        finally:
            if self.outgoing is not None and disk.commits:
                self.outgoing.clean_up()
        run_on_all_ranks(
            comm, f"removing older checkpoints than {disk.target}, which is there,", self._prune, SaveError
        )

    def _write(self) -> tuple[int, list[Written]]:
        largest_first = sorted(self.parts, key=lambda part: _bytes(part.state), reverse=True)
        return self.disk.group, thread_map(lambda part: part.write(self.disk.staging), largest_first, _THREADS)

    def _send(self) -> None:
        if self.outgoing is not None and self.disk.commits:
            self.outgoing.send()

    def _commit(self, written: Sequence[tuple[int, list[Written]]]) -> None:
        if not self.disk.commits:
            return
        (self.disk.staging / _TOKEN).unlink(missing_ok=True)
        records = [one.record for group, part in written if group == self.disk.group for one in part]
        folders: dict[str, list[WriteResult]] = {}
        for one in (one for _, part in written for one in part if one.places):
            folders.setdefault(os.path.dirname(one.record.path), []).extend(one.places)
        for name, places in folders.items():
            (self.disk.staging / name).mkdir(exist_ok=True)
            write_metadata(self.disk.staging / name, places)
        commit(
            self.disk.staging,
            self.disk.target,
            records,
            world_size=self.world.size,
            step=self.step,
            number=self.number,
            kinds={item_of(part.path): part.kind for part in self.parts if part.kind},
        )

    def _prune(self) -> None:
        if self.project is not None and self.limit is not None and self.disk.commits:
            prune(self.project, self.limit, self.disk.target)


def _bytes(tree: Any) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        return sum(map(_bytes, tree.values()))
    return sum(map(_bytes, tree)) if isinstance(tree, (list, tuple)) else 0


def discard_staging(disk: StagingTarget) -> None:
    """Removes what was written of a checkpoint that failed, as far as it can be."""
    if disk.commits:
        shutil.rmtree(disk.staging, ignore_errors=True)


def prune(project: Path, limit: int, newest: Path, *, valid: Callable[[Path], bool] | None = None) -> list[Path]:
    """Removes the oldest numbered checkpoints, so that `limit` good ones are left.

    Args:
        project: The project's folder.
        limit: How many are kept.
        newest: The one that was just committed, which always stays.
        valid: Whether a folder holds a whole checkpoint; others do not count among those kept.

    Returns:
        What was removed.
    """
    valid = valid or is_whole
    kept = 0
    removed = []
    for folder in reversed(numbered_checkpoints(project)):
        if kept < limit:
            kept += folder == newest or valid(folder)
        elif folder != newest:
            try:
                delete(folder)
            except OSError as error:
                logger.warning(f"the old checkpoint {folder} could not be removed: {error}")
            else:
                removed.append(folder)
    return removed
