"""Saves and loads the checkpoints of one `Accelerator`: its hooks, the save in progress, and the order of the steps.

A save never touches an existing checkpoint before the new one is complete:

1. agree on the folder        rank 0's; ranks on a machine without a shared disk use one of their own
2. capture                    hooks run, states are taken (and copied, if the save runs in the background)
3. write                      each rank writes its files beside the target, and syncs them
4. commit                     rank 0 writes the manifest and renames; then checkpoints beyond the limit are deleted
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..logging import get_logger
from ..runtime.collective_backend import Collectives
from ..runtime.world import World
from ..settings.handlers import ProjectConfiguration
from . import loading
from .async_saver import AsyncSaver
from .consensus import broadcast_from_rank0, check_called_by_all_ranks, checkpoint_group, run_on_all_ranks
from .discovery import is_whole
from .errors import CheckpointError, LoadError, SaveError, bullet_list
from .items.state_item import CapturedItem, CheckpointStrategy, SaveItem, TrainingState, WrittenFile
from .items.training_state import save_items
from .sharded.dcp_writer import WriteResult, write_metadata
from .storage.atomic import commit, delete, stage
from .storage.file_writer import thread_map, write_file
from .storage.filenames import (
    CHECKPOINT_PREFIX,
    CHECKPOINTS_FOLDER,
    checkpoint_number,
    is_url,
    item_of,
    numbered_checkpoints,
)
from .storage.remote import Upload, load_from_url
from .storage.staging import StagingBuffer

logger = get_logger(__name__)

PreHook = Callable[..., None]
_THREADS = 4
_TOKEN = ".disk"


class CheckpointManager:
    """Saves and loads the state of a run.

    Args:
        run: The objects of the run.
        strategy: Provides the items of models and optimizers.
        project: Settings of the project folder.
    """

    def __init__(self, run: TrainingState, strategy: CheckpointStrategy, project: ProjectConfiguration) -> None:
        self.run = run
        self._strategy = strategy
        self._project = project
        self._saver = AsyncSaver()
        self._buffer = StagingBuffer()
        self.save_hooks: OrderedDict[int, PreHook] = OrderedDict()
        self.load_hooks: OrderedDict[int, PreHook] = OrderedDict()
        self.sync_hooks: OrderedDict[int, Callable[[], None]] = OrderedDict()
        """Called on all ranks before a save, to make replicas equal that are trained independently."""

    def add_hook(self, hooks: OrderedDict[int, Callable[..., None]], hook: Callable[..., None]) -> RemovableHandle:
        """Adds a hook; the handle removes it."""
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        return handle

    def wait(self) -> None:
        """Waits for the save in progress, and raises its error."""
        if self._saver.pending:
            self._saver.wait()

    def _begin(self, call: str, failure: type[CheckpointError]) -> World:
        """Checks a collective call and waits for the save in progress.

        Returns:
            The world with a group of its own for checkpoints, whose ranks may wait for each other's disks.
        """
        world = self._strategy.world
        if world.debug:
            check_called_by_all_ranks(world.collectives, call)
        if call != "resume":
            self._check_accumulation(call, failure)
        self.wait()
        return dataclasses.replace(world, collectives=checkpoint_group(world.collectives, failure))

    def _check_accumulation(self, call: str, failure: type[CheckpointError]) -> None:
        if not self._strategy.can_save_mid_accumulation and not self.run.accumulation.sync_gradients:
            raise failure(
                f"{call} was called during gradient accumulation, while no rank holds whole gradients to save or restore: "
                "call it when `accelerator.sync_gradients` is true."
            )

    # Save ------------------------------------------------------------------------------------------------------------

    def save(self, output_dir: str | os.PathLike[str] | None, safe: bool, asynchronous: bool) -> Path | str:
        """See `Accelerator.save_state`."""
        world = self._begin("save_state", SaveError)
        for synchronize in self.sync_hooks.values():
            synchronize()
        upload = Upload(world, str(output_dir)) if is_url(output_dir) else None
        target = self._choose_target(world, output_dir) if upload is None else upload.folder
        staging = open_staging(world, target, self._project.save_on_each_node)
        target = staging.target
        try:
            items = self._capture(world, staging, upload, safe, asynchronous)
        except SaveError:
            discard_staging(staging)
            if upload is not None:
                upload.clean_up()
            raise
        project = self._project_folder() if upload is None else None
        group = checkpoint_group(world.collectives, SaveError, "saves in the background") if asynchronous else None
        job = SaveJob(
            world,
            world.collectives if group is None else group,
            staging,
            items,
            step=self.run.counter.step,
            number=self._project.iteration,
            project=project if project is not None and target.parent == project / CHECKPOINTS_FOLDER else None,
            limit=self._project.total_limit,
            upload=upload,
        )
        if asynchronous:
            self._saver.start(job.run)
        else:
            job.run()
        self._project.iteration += 1
        return target if upload is None else upload.url

    def _capture(
        self, world: World, staging: StagingTarget, upload: Upload | None, safe: bool, asynchronous: bool
    ) -> list[CapturedItem]:
        """Captures this rank's items."""
        run, strategy = self.run, self._strategy
        weights: list[dict[str, Any]] = []
        captured: list[CapturedItem] = []

        def take_weights() -> None:
            if upload is not None:
                upload.check_shared_folder(staging.group)
            weights.extend(strategy.state_to_save(model) for model in run.models)
            for hook in self.save_hooks.values():
                hook(run.models, weights, str(staging.folder))

        def take_all() -> None:
            items = [
                *strategy.save_items(run.models, run.optimizers, weights, safe=safe),
                *save_items(run, world.rank, gradients=strategy.can_save_mid_accumulation),
            ]
            captured.extend(capture(items, staging, self._buffer if asynchronous else None))

        # In two steps: a hook may fail on one rank alone, and what follows it may be collective.
        run_on_all_ranks(world.collectives, f"taking the weights for {staging.target}", take_weights, SaveError)
        run_on_all_ranks(world.collectives, f"taking the state for {staging.target}", take_all, SaveError)
        return captured

    def _project_folder(self) -> Path | None:
        folder = self._project.project_dir
        if is_url(folder):
            raise ValueError(
                f"project_dir={folder!r} is a URL, and checkpoints are numbered below local folders only: choose one, or "
                "name each checkpoint, as in save_state('s3://bucket/run/step_100') and load_state of the same."
            )
        return None if folder is None else Path(os.path.expanduser(folder))

    def _choose_target(self, world: World, output_dir: str | os.PathLike[str] | None) -> Path:
        if output_dir is not None:
            return Path(os.path.expanduser(output_dir))
        project = self._project_folder()
        if project is None:
            raise TypeError(
                "save_state needs a folder: pass `output_dir`, or give the Accelerator a `project_dir` and let "
                "ProjectConfiguration(automatic_checkpoint_naming=True) number the checkpoints below it."
            )
        target = project / CHECKPOINTS_FOLDER / f"{CHECKPOINT_PREFIX}{self._project.iteration}"
        is_taken = target.is_dir() and is_whole(target)
        if broadcast_from_rank0(world.collectives, f"preparing {target}", is_taken, SaveError):
            raise ValueError(
                f"{target} exists already. Go on from the newest checkpoint with `accelerator.resume()`, which also counts "
                "on from it; or set `accelerator.project_configuration.iteration` to a number that is free."
            )
        return target

    # Load ------------------------------------------------------------------------------------------------------------

    def resume(self, *, strict: bool) -> loading.LoadReport | None:
        """See `Accelerator.resume`."""
        project = self._project_folder()
        if project is None:
            raise ValueError("resume looks for checkpoints below the project's folder: Accelerator(project_dir=...).")
        world = self._begin("resume", LoadError)
        folder, skipped = loading.find(world, project)
        return None if folder is None else self._load_found(world, folder, skipped, strict=strict)

    def load(self, input_dir: str | os.PathLike[str] | None, **options: Any) -> loading.LoadReport:
        """See `Accelerator.load_state`."""
        world = self._begin("load_state", LoadError)
        if is_url(input_dir):
            report: loading.LoadReport = load_from_url(
                world, str(input_dir), lambda folder: self._load(world, folder, verified=False, **options)
            )
            report.url = str(input_dir)
            return report
        if input_dir is not None:
            name = os.path.expanduser(input_dir)
            name = broadcast_from_rank0(world.collectives, f"opening {name}", name, LoadError)
            return self._load(world, Path(name), verified=False, **options)
        project = self._project_folder()
        if project is None:
            raise ValueError(
                "load_state needs a folder: pass `input_dir`, or give the Accelerator the `project_dir` whose newest "
                "checkpoint is to be loaded."
            )
        folder, skipped = loading.find(world, project)
        if folder is None:
            reasons = [f"{path.name}: {problem}" for path, problems in skipped for problem in problems[:3]]
            found = f"; these are no valid ones:\n{bullet_list(reasons)}" if reasons else "."
            raise LoadError(f"there is no checkpoint in {project / CHECKPOINTS_FOLDER}{found}")
        return self._load_found(world, folder, skipped, **options)

    def _load_found(
        self, world: World, folder: Path, skipped: list[tuple[Path, list[Any]]], **options: Any
    ) -> loading.LoadReport:
        report = self._load(world, folder, verified=True, **options)
        report.passed_over = skipped
        return report

    def _load(self, world: World, folder: Path, **options: Any) -> loading.LoadReport:
        self._check_accumulation("load_state", LoadError)
        report = loading.load(world, folder, self.run, self._strategy, list(self.load_hooks.values()), **options)
        self._strategy.sync_rng()
        self._continue_numbering(folder)
        return report

    def _continue_numbering(self, folder: Path) -> None:
        """Numbers the next checkpoint after those in the project, if `folder` is one of them."""
        project = self._project_folder() if checkpoint_number(folder) is not None else None
        if project is None or folder.resolve().parent != (project / CHECKPOINTS_FOLDER).resolve():
            return
        numbers = [checkpoint_number(other) for other in numbered_checkpoints(project)]
        self._project.iteration = max(number for number in numbers if number is not None) + 1


# Staging --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StagingTarget:
    """Folder that this rank writes a checkpoint to before it is committed.

    Attributes:
        target: The checkpoint's folder.
        folder: The staging folder beside it.
        commits: This rank commits.
        shared: This rank writes the files that are the same on all ranks.
        group: The rank that commits on this rank's disk.
    """

    target: Path
    folder: Path
    commits: bool
    shared: bool
    group: int


def open_staging(world: World, target: Path, save_on_each_node: bool) -> StagingTarget:
    """Creates the staging folder, on each disk.

    Args:
        world: This process and its peers.
        target: The checkpoint's folder; rank 0's counts.
        save_on_each_node: Files that are the same on all ranks are written on every machine with a disk of its own.

    Raises:
        SaveError: on every rank, if it cannot be created.
    """
    comm = world.collectives
    token = uuid.uuid4().hex
    name, token = broadcast_from_rank0(comm, f"preparing {target}", (str(target), token), SaveError)
    target = Path(name)
    folder = target.with_name(target.name + ".incomplete")

    def create() -> None:
        if world.rank == 0:
            stage(target)
            (folder / _TOKEN).write_text(token)

    run_on_all_ranks(comm, f"preparing {target}", create, SaveError)
    if world.local_size == world.size:
        return StagingTarget(target, folder, commits=world.rank == 0, shared=world.rank == 0, group=0)

    def sees_token() -> bool:
        return (folder / _TOKEN).is_file() and (folder / _TOKEN).read_text() == token

    sees = run_on_all_ranks(comm, f"preparing {target}", sees_token, SaveError)
    first = world.rank - world.local_rank
    own_disk = not sees[first]

    def create_own() -> None:
        if own_disk and world.local_rank == 0:
            stage(target)

    run_on_all_ranks(comm, f"preparing {target}", create_own, SaveError)
    commits = world.rank == 0 or (own_disk and world.local_rank == 0)
    shared = world.rank == 0 or (commits and save_on_each_node)
    return StagingTarget(target, folder, commits=commits, shared=shared, group=first if own_disk else 0)


def discard_staging(staging: StagingTarget) -> None:
    """Removes the files of a checkpoint that failed, as far as possible."""
    if staging.commits:
        shutil.rmtree(staging.folder, ignore_errors=True)


def capture(items: Sequence[SaveItem], staging: StagingTarget, buffer: StagingBuffer | None) -> list[CapturedItem]:
    """Captures the items that this rank saves.

    Args:
        items: All items.
        staging: Determines what this rank writes.
        buffer: Copies tensors to there, so that training may change them while they are written.
    """
    if buffer is not None:
        buffer.clear()
    captured = []
    try:
        for item in items:
            saves = item.per_rank or staging.shared
            if saves or item.collective:
                state = item.capture()
                if saves and state is not None:
                    kept = state if buffer is None or item.owns_memory else _copy_tree(state, buffer)
                    captured.append(CapturedItem(item.path, kept, item.format, item.class_name))
    finally:
        if buffer is not None:
            buffer.wait()
    return captured


def _copy_tree(tree: Any, buffer: StagingBuffer) -> Any:
    seen: dict[int, torch.Tensor] = {}

    def walk(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            # Tied tensors stay tied, and are written once.
            if id(node) not in seen:
                seen[id(node)] = buffer.copy(node)
            return seen[id(node)]
        if isinstance(node, dict):
            return type(node)((key, walk(value)) for key, value in node.items())
        if type(node) in (list, tuple):
            return type(node)(walk(value) for value in node)
        return node

    copied = walk(tree)
    buffer.copy_cpu_tensors()
    return copied


# Write ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SaveJob:
    """A captured checkpoint to write; `run` may be called on another thread.

    Attributes:
        world: This process and its peers.
        collectives: The ranks that run it, in a group of its own if it runs in the background.
        staging: Folder to write to.
        items: This rank's items.
        step, number: For the manifest.
        project: Project folder whose checkpoints are limited; None: there is no limit.
        limit: Number of numbered checkpoints to keep; None: all.
        upload: Uploads the checkpoint after the commit; None: it stays.
    """

    world: World
    collectives: Collectives
    staging: StagingTarget
    items: Sequence[CapturedItem]
    step: int
    number: int
    project: Path | None = None
    limit: int | None = None
    upload: Upload | None = None

    def run(self) -> None:
        """Writes, commits, uploads and deletes checkpoints beyond the limit.

        Raises:
            SaveError: on every rank. There is no new checkpoint then, and existing ones are untouched.
        """
        comm, target = self.collectives, self.staging.target
        try:
            written = run_on_all_ranks(comm, f"writing {target}", self._write, SaveError)
            run_on_all_ranks(comm, f"committing {target}", lambda: self._commit(written), SaveError)
            if self.upload is not None:
                run_on_all_ranks(comm, f"sending the checkpoint to {self.upload.url}", self._send, SaveError)
        except SaveError:
            discard_staging(self.staging)
            raise
        finally:
            if self.upload is not None and self.staging.commits:
                self.upload.clean_up()
        run_on_all_ranks(comm, f"removing checkpoints older than {target}, which is saved,", self._prune, SaveError)

    def _write(self) -> tuple[int, list[WrittenFile]]:
        largest_first = sorted(self.items, key=lambda item: _nbytes(item.state), reverse=True)
        return self.staging.group, thread_map(self._write_file, largest_first, _THREADS)

    def _write_file(self, item: CapturedItem) -> WrittenFile:
        results: list[list[WriteResult] | None] = []
        path = self.staging.folder / item.path
        record = write_file(path, item.path, lambda writer: results.append(item.format.write(item.state, writer)))
        return WrittenFile(record, results[0] or [])

    def _send(self) -> None:
        if self.upload is not None and self.staging.commits:
            self.upload.send()

    def _commit(self, written: Sequence[tuple[int, list[WrittenFile]]]) -> None:
        if not self.staging.commits:
            return
        folder = self.staging.folder
        (folder / _TOKEN).unlink(missing_ok=True)
        records = [file.record for group, files in written if group == self.staging.group for file in files]
        shard_folders: dict[str, list[WriteResult]] = {}
        for file in (file for _, files in written for file in files if file.results):
            shard_folders.setdefault(os.path.dirname(file.record.path), []).extend(file.results)
        for name, results in shard_folders.items():
            (folder / name).mkdir(exist_ok=True)
            write_metadata(folder / name, results)
        commit(
            folder,
            self.staging.target,
            records,
            world_size=self.world.size,
            step=self.step,
            number=self.number,
            kinds={item_of(item.path): item.class_name for item in self.items if item.class_name},
        )

    def _prune(self) -> None:
        if self.project is not None and self.limit is not None and self.staging.commits:
            prune(self.project, self.limit, self.staging.target)


def _nbytes(tree: Any) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        return sum(map(_nbytes, tree.values()))
    return sum(map(_nbytes, tree)) if isinstance(tree, (list, tuple)) else 0


def prune(project: Path, limit: int, newest: Path) -> None:
    """Deletes the oldest numbered checkpoints, so that `limit` whole ones are left; the one just committed stays."""
    kept = 0
    for folder in reversed(numbered_checkpoints(project)):
        if kept < limit:
            kept += folder == newest or is_whole(folder)
        elif folder != newest:
            try:
                delete(folder)
            except OSError as error:
                logger.warning(f"the old checkpoint {folder} could not be removed: {error}")
