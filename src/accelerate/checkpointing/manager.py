"""The checkpoints of one `Accelerator`: its hooks, the save under way, and the order in which saving and loading go."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.hooks import RemovableHandle

from ..settings.handlers import ProjectConfiguration
from ..state import GradientState
from . import loading
from .async_saver import AsyncSaver
from .consensus import broadcast_from_rank0, check_called_by_all_ranks, checkpoint_group, run_on_all_ranks
from .discovery import is_whole
from .errors import CheckpointError, LoadError, SaveError, bullet_list
from .items import training_state, transaction
from .items.standard_items import custom_entry, scaler_entry, scheduler_entry
from .items.state_item import Entry
from .items.training_state import TrainingState
from .saving import SaveJob, capture, discard_staging, open_staging
from .storage import remote
from .storage.filenames import CHECKPOINT_PREFIX, CHECKPOINTS_FOLDER, checkpoint_number, numbered_checkpoints
from .storage.staging import StagingBuffer

PreHook = Callable[..., None]


class CheckpointManager:
    """Saves and loads the state of a run.

    Args:
        run: Gives the objects of the run as they are now.
        strategy: Gives the entries of models and optimizers, and the models' states.
        project: Where checkpoints go that are not given a folder.
    """

    def __init__(self, run: Callable[[], TrainingState], strategy: Any, project: ProjectConfiguration) -> None:
        self._run = run
        self._strategy = strategy
        self._project = project
        self._writer = AsyncSaver()
        self._room = StagingBuffer()
        self.save_hooks: OrderedDict[int, PreHook] = OrderedDict()
        self.load_hooks: OrderedDict[int, PreHook] = OrderedDict()
        self.boundaries: OrderedDict[int, Callable[[], None]] = OrderedDict()
        """What all ranks do together before a save, to have one state: those that train apart average."""

    def add_hook(self, hooks: OrderedDict[int, Callable[..., None]], hook: Callable[..., None]) -> RemovableHandle:
        """Adds a hook; the handle removes it."""
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        return handle

    def wait(self) -> None:
        """Waits for the save under way, and raises what went wrong in it."""
        self._writer.wait()

    # Save ------------------------------------------------------------------------------------------------------------

    def save(self, output_dir: str | os.PathLike[str] | None, safe: bool, asynchronous: bool) -> Path | str:
        """See `Accelerator.save_state`."""
        run = self._run()
        check_called_by_all_ranks(run.world.collectives, "save_state")
        self._check_window("save_state", SaveError)
        self.wait()
        for agree in self.boundaries.values():
            agree()
        run = _apart(run, SaveError)
        comm = run.world.collectives
        outgoing = remote.Upload(run.world, str(output_dir)) if remote.is_url(output_dir) else None
        target = self._named(run, output_dir) if outgoing is None else outgoing.folder
        collectives = checkpoint_group(SaveError, "saves in the background") if asynchronous else comm
        disk = open_staging(run.world, target, self._project.save_on_each_node)
        # Ranks may differ in the folder they asked for; rank 0's counts.
        target = disk.target

        def take_weights() -> None:
            if outgoing is not None:
                outgoing.check_shared_folder(disk.group)
            weights.extend(self._strategy.state_to_save(model) for model in run.models)
            for hook in self.save_hooks.values():
                hook(run.models, weights, str(disk.staging))

        def take_all() -> None:
            entries = [
                *self._strategy.entries(run.models, run.optimizers, weights, safe=safe),
                *self._others(run, run.world.size),
            ]
            parts.extend(capture(entries, disk, self._room if asynchronous else None))

        weights: list[dict[str, Any]] = []
        parts: list[Any] = []
        try:
            # Hooks may fail on one rank alone, and what follows them may be collective.
            run_on_all_ranks(comm, f"taking the weights for {target}", take_weights, SaveError)
            run_on_all_ranks(comm, f"taking the state for {target}", take_all, SaveError)
        except SaveError:
            discard_staging(disk)
            if outgoing is not None:
                outgoing.clean_up()
            raise
        project = self._project_folder() if outgoing is None else None
        job = SaveJob(
            run.world,
            collectives,
            disk,
            parts,
            step=run.step,
            number=self._project.iteration,
            project=project if project is not None and target.parent == project / CHECKPOINTS_FOLDER else None,
            limit=self._project.total_limit,
            outgoing=outgoing,
        )
        if asynchronous:
            self._writer.start(job)
        else:
            job.run()
        self._project.iteration += 1
        return target if outgoing is None else outgoing.url

    def _others(self, run: TrainingState, saved_world_size: int) -> list[Entry]:
        """The entries besides models and optimizers; random states last, since everything else may draw from them."""
        gradients = (
            training_state.no_gradients_entry(run)
            if not self._strategy.can_save_mid_accumulation
            else training_state.gradients_entry(run)
            if saved_world_size == run.world.size
            else training_state.merged_gradients_entry(run, saved_world_size)
        )
        return [
            *(scheduler_entry(index, scheduler) for index, scheduler in enumerate(run.schedulers)),
            *training_state.loader_entries(run.loaders),
            *([] if run.scaler is None else [scaler_entry(run.scaler)]),
            *(custom_entry(index, registered) for index, registered in enumerate(run.registered)),
            training_state.progress_entry(run),
            gradients,
            training_state.random_entry(run, saved_world_size),
        ]

    def _project_folder(self) -> Path | None:
        folder = self._project.project_dir
        if remote.is_url(folder):
            raise ValueError(
                f"project_dir={folder!r} is a URL, and checkpoints are numbered below local folders only: choose one, or "
                "name each checkpoint, as in save_state('s3://bucket/run/step_100') and load_state of the same."
            )
        return None if folder is None else Path(os.path.expanduser(folder))

    def _named(self, run: TrainingState, output_dir: str | os.PathLike[str] | None) -> Path:
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
        taken = broadcast_from_rank0(run.world.collectives, f"preparing {target}", is_taken, SaveError)
        if taken:
            raise ValueError(
                f"{target} exists already. Go on from the newest checkpoint with `accelerator.resume()`, which also counts "
                "on from it; or set `accelerator.project_configuration.iteration` to a number that is free."
            )
        return target

    def _check_window(self, call: str, failure: type[CheckpointError]) -> None:
        if not self._strategy.can_save_mid_accumulation and not GradientState().sync_gradients:
            raise failure(
                f"{call} was called between the micro-steps of an update, and no rank has the gradients that are being "
                "accumulated as a whole: call it when `accelerator.sync_gradients` is true."
            )

    # Load ------------------------------------------------------------------------------------------------------------

    def resume(self, **options: Any) -> loading.LoadReport | None:
        """See `Accelerator.resume`."""
        run = self._run()
        check_called_by_all_ranks(run.world.collectives, "resume")
        project = self._project_folder()
        if project is None:
            raise ValueError("resume looks for checkpoints below the project's folder: Accelerator(project_dir=...).")
        self.wait()
        run = _apart(run, LoadError)
        folder, passed_over = loading.find(run.world, project)
        if folder is None:
            return None
        report = self._load(run, folder, verified=True, **options)
        report.passed_over = passed_over
        return report

    def load(self, input_dir: str | os.PathLike[str] | None, **options: Any) -> loading.LoadReport:
        """See `Accelerator.load_state`."""
        run = self._run()
        check_called_by_all_ranks(run.world.collectives, "load_state")
        self.wait()
        run = _apart(run, LoadError)
        if remote.is_url(input_dir):
            report: loading.LoadReport = remote.load_from_url(
                run.world, str(input_dir), lambda folder: self._load(run, folder, verified=False, **options)
            )
            report.url = str(input_dir)
            return report
        if input_dir is not None:
            name = os.path.expanduser(input_dir)
            name = broadcast_from_rank0(run.world.collectives, f"opening {name}", name, LoadError)
            return self._load(run, Path(name), verified=False, **options)
        project = self._project_folder()
        if project is None:
            raise ValueError(
                "load_state needs a folder: pass `input_dir`, or give the Accelerator the `project_dir` whose newest "
                "checkpoint is to be loaded."
            )
        folder, passed_over = loading.find(run.world, project)
        if folder is None:
            reasons = [f"{path.name}: {problem}" for path, problems in passed_over for problem in problems[:3]]
            told = f"; these are no valid ones:\n{bullet_list(reasons)}" if reasons else "."
            raise LoadError(f"there is no checkpoint in {project / CHECKPOINTS_FOLDER}{told}")
        report = self._load(run, folder, verified=True, **options)
        report.passed_over = passed_over
        return report

    def _load(
        self,
        run: TrainingState,
        folder: Path,
        *,
        verified: bool,
        strict: bool = True,
        load_kwargs: dict[str, Any] | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> loading.LoadReport:
        self._check_window("load_state", LoadError)
        manifest = loading.open_checkpoint(run.world, folder)
        size = manifest.world_size if manifest is not None else _ranks_in(folder)
        options = load_kwargs or {}
        others = [*self._strategy.optimizer_entries(folder, run.optimizers, run.models), *self._others(run, size)]
        if manifest is not None and not verified:
            loading.verify_files(run.world, folder, manifest, others)
        readings = [loading.read_items(folder, others, manifest, options)]
        models = list(run.models)
        changed: list[str] = []
        if self.load_hooks:
            # A hook changes models itself: what can be checked before is checked before.
            loading.merge_problems(run.world, folder, readings, strict)
            changed = self._run_load_hooks(run, folder, models)
        entries = self._strategy.model_entries(folder, models, model_options or {})
        readings.append(loading.read_items(folder, entries, manifest, options))
        hooked = [] if self.load_hooks else loading.extra_files(folder, [*others, *entries], manifest)
        readings.append(loading.ReadResult(problems=hooked))
        problems = loading.merge_problems(run.world, folder, readings, strict, changed)
        begin = None if GradientState().sync_gradients else functools.partial(training_state.drop_gradients, run)
        transaction.apply(run.world, folder, [*readings[1].states, *readings[0].states], begin=begin, changed=changed)
        self._strategy.sync_rng()
        self._count_on(folder)
        return loading.LoadReport(
            folder, problems, world_size=size, number=None if manifest is None else manifest.iteration
        )

    def _run_load_hooks(self, run: TrainingState, folder: Path, models: list[Any]) -> list[str]:
        """Runs the hooks on every rank; returns what they may have changed, for messages."""
        changed = ["what the hooks of register_load_state_pre_hook changed"]

        def call() -> None:
            for hook in self.load_hooks.values():
                hook(models, str(folder))

        try:
            run_on_all_ranks(run.world.collectives, f"running the hooks before {folder} is loaded", call, LoadError)
        except LoadError as error:
            error.changed = changed
            raise
        return changed

    def _count_on(self, folder: Path) -> None:
        project = self._project_folder() if checkpoint_number(folder) is not None else None
        if project is None or folder.resolve().parent != (project / CHECKPOINTS_FOLDER).resolve():
            return
        numbers = [checkpoint_number(other) for other in numbered_checkpoints(project)]
        self._project.iteration = max(number for number in numbers if number is not None) + 1


def _apart(run: TrainingState, failure: type[CheckpointError]) -> TrainingState:
    """Returns the run with the ranks in a group of their own, since they wait for each other's disks."""
    return dataclasses.replace(run, world=dataclasses.replace(run.world, collectives=checkpoint_group(failure)))


def _ranks_in(folder: Path) -> int:
    return sum(1 for _ in folder.glob("random_states_*.pkl"))
