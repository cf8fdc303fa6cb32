"""Loads a checkpoint: every rank reads and checks its items, and nothing changes before all findings are collected.

Then items are restored, so that a failure leaves as much as possible as it was. Objects of users are the only ones that
reject a state that has passed its checks: they come first, and are restored on all ranks if one raises. Models and
optimizers, which are too large to back up, come after them; if one raises all the same, the error lists what has changed.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..logging import get_logger
from ..runtime.system.file_names import require_regular_file
from ..runtime.world import World
from ..settings.enums import SAMPLER_NAME
from .consensus import run_on_all_ranks
from .discovery import latest_valid, problems_of, problems_without_manifest
from .errors import LoadError, Problem, bullet_list
from .items.state_item import CheckpointStrategy, LoadItem, TrainingState
from .items.training_state import drop_gradients, load_items
from .storage import manifest as manifests
from .storage.atomic import recover
from .storage.filenames import checkpoint_files_in, is_shared, item_of
from .storage.verified_reader import CorruptFileError

logger = get_logger(__name__)


@dataclass
class LoadReport:
    """Result of a load.

    Attributes:
        folder: The checkpoint; for one at a URL, the folder that it was downloaded to.
        problems: Mismatches that were skipped (``strict=False``).
        passed_over: Newer folders that are not valid checkpoints, each with the reasons.
        world_size: Number of processes that saved it; None if that is not recorded.
        number: Its number in the manifest.
        url: Its URL, if it has one.
    """

    folder: Path
    problems: list[Problem] = field(default_factory=list)
    passed_over: list[tuple[Path, list[Problem]]] = field(default_factory=list)
    world_size: int | None = None
    number: int | None = None
    url: str | None = None


def load(
    world: World,
    folder: Path,
    run: TrainingState,
    strategy: CheckpointStrategy,
    hooks: Sequence[Callable[..., None]],
    *,
    verified: bool,
    strict: bool = True,
    load_kwargs: dict[str, Any] | None = None,
    model_options: dict[str, Any] | None = None,
) -> LoadReport:
    """Loads a checkpoint from a folder. Collective.

    Args:
        world: This process and its peers.
        folder: The checkpoint.
        run: The objects to restore.
        strategy: Provides the items of models and optimizers.
        hooks: Called before models are loaded.
        verified: Checksums have been compared.
        strict: Reject a checkpoint with any mismatch; otherwise load what matches.
        load_kwargs: For `torch.load`.
        model_options: For ``load_state_dict`` of models.

    Raises:
        LoadError: on every rank, with everything that was found.
    """
    manifest = open_checkpoint(world, folder)
    size = manifest.world_size if manifest is not None else sum(1 for _ in folder.glob("random_states_*.pkl"))
    options = load_kwargs or {}
    others = [
        *strategy.load_optimizer_items(folder, run.optimizers, run.models),
        *load_items(run, world.rank, world.size, size, gradients=strategy.can_save_mid_accumulation),
    ]
    if manifest is not None and not verified:
        verify_files(world, folder, manifest, others)
    results = [read_items(folder, others, manifest, options)]
    models = list(run.models)
    changed: list[str] = []
    if hooks:
        # Hooks change models, so everything that can be checked before is checked before.
        merge_problems(world, folder, results, strict)
        changed = _run_hooks(world, folder, hooks, models)
    items = strategy.load_model_items(folder, models, model_options or {})
    results.append(read_items(folder, items, manifest, options))
    results.append(ReadResult(problems=[] if hooks else extra_files(folder, [*others, *items], manifest)))
    problems = merge_problems(world, folder, results, strict, changed)
    begin = None if run.accumulation.sync_gradients else functools.partial(drop_gradients, run)
    apply(world, folder, [*results[1].states, *results[0].states], begin=begin, changed=changed)
    return LoadReport(folder, problems, world_size=size, number=None if manifest is None else manifest.iteration)


def _run_hooks(world: World, folder: Path, hooks: Sequence[Callable[..., None]], models: list[Any]) -> list[str]:
    """Calls the hooks on every rank; returns a description, for messages, of the changes they may have made."""
    changed = ["what the hooks of register_load_state_pre_hook changed"]

    def call() -> None:
        for hook in hooks:
            hook(models, str(folder))

    try:
        run_on_all_ranks(world.collectives, f"running the hooks before {folder} is loaded", call, LoadError)
    except LoadError as error:
        error.changed = changed
        raise
    return changed


# Find and verify ------------------------------------------------------------------------------------------------------


def find(world: World, project: Path) -> tuple[Path | None, list[tuple[Path, list[Problem]]]]:
    """Returns the latest valid checkpoint of a project as rank 0 finds it, and the newer folders that are not valid."""

    def search() -> Any:
        return latest_valid(project) if world.rank == 0 else None

    found = run_on_all_ranks(world.collectives, f"looking for checkpoints in {project}", search, LoadError)[0]
    for folder, problems in found.passed_over:
        logger.warning(f"the checkpoint {folder} is passed over, it is not valid:\n{bullet_list(problems, 5)}")
    return found.folder, found.passed_over


def open_checkpoint(world: World, folder: Path) -> manifests.Manifest | None:
    """Finishes an interrupted replacement of a checkpoint, then reads its manifest.

    Args:
        world: This process and its peers.
        folder: The checkpoint.

    Returns:
        None for a checkpoint of another library, which has no manifest.

    Raises:
        LoadError: on every rank, if it is not a checkpoint or its manifest is damaged.
    """

    def finish() -> None:
        if world.rank == 0:
            recover(folder)

    run_on_all_ranks(world.collectives, f"opening {folder}", finish, LoadError)

    def read() -> tuple[Any, list[Problem]]:
        if not folder.is_dir():
            return None, problems_of(folder)
        try:
            return manifests.read(folder), []
        except FileNotFoundError:
            return None, problems_without_manifest(folder)
        except (OSError, ValueError) as error:
            return None, [Problem(manifests.NAME, "corrupt", str(error))]

    outcomes = run_on_all_ranks(world.collectives, f"opening {folder}", read, LoadError)
    _raise_damaged(folder, [found for _, found in outcomes])
    own: manifests.Manifest | None = outcomes[world.rank][0]
    return own


def _unchanged(changed: Sequence[str]) -> str:
    return f"nothing was changed but {', '.join(changed)}" if changed else "nothing was changed"


def _raise_damaged(folder: Path, outcomes: Sequence[Sequence[Problem]], changed: Sequence[str] = ()) -> None:
    problems = list(dict.fromkeys(problem for found in outcomes for problem in found))
    if problems:
        text = f"{folder} cannot be loaded, and {_unchanged(changed)}:\n{bullet_list(problems)}"
        raise LoadError(text, problems, changed)


def verify_files(world: World, folder: Path, manifest: manifests.Manifest, items: Sequence[LoadItem]) -> None:
    """Compares all files with the manifest; the ranks of a machine divide the reading.

    A rank that is alone on its machine skips the content of files that `read_items` compares with their checksums.

    Raises:
        LoadError: on every rank, with every file that is missing or damaged.
    """
    skipped = {item.path for item in items if item.keeps_tensors and world.local_size == 1}

    def verify() -> list[Problem]:
        share = (world.local_rank, world.local_size)
        found = manifests.verify(folder, manifest, share=share, size_only=skipped)
        return found and manifests.verify(folder, manifest, share=share)  # if any is damaged, report all

    _raise_damaged(folder, run_on_all_ranks(world.collectives, f"verifying {folder}", verify, LoadError))


# Read and check -------------------------------------------------------------------------------------------------------


@dataclass
class ReadResult:
    """Items that were read, and findings.

    Attributes:
        states: Items with their states.
        problems: Mismatches.
        damaged: Findings for which the whole checkpoint is rejected, even with ``strict=False``.
    """

    states: list[tuple[LoadItem, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    damaged: list[Problem] = field(default_factory=list)


def read_items(
    folder: Path, items: Sequence[LoadItem], manifest: manifests.Manifest | None, options: dict[str, Any]
) -> ReadResult:
    """Reads items and checks whether they match their objects. Changes nothing.

    Args:
        folder: The checkpoint.
        items: Items to read.
        manifest: The manifest: classes of the states, and checksums of files that are not mapped.
        options: For `torch.load`.
    """
    result = ReadResult()
    records = {} if manifest is None else {record.path: record for record in manifest.files}
    for item in items:
        path = folder / item.path
        if not os.path.lexists(path):
            if item.required:
                result.problems.append(Problem(item.path, "missing", "this run needs it"))
            continue
        try:
            if not path.is_dir():
                require_regular_file(path)
            own = {"mmap": False, "record": records.get(item.path)} if item.keeps_tensors else {}
            state = item.read(path, {**options, **own})
            problems = _class_problems(item, manifest) or item.check(state)
        except CorruptFileError as error:
            result.damaged.append(Problem(item.path, "corrupt", str(error)))
            continue
        except LoadError as error:
            result.problems += [replace(found, file=f"{item.path}/{found.file}") for found in error.problems]
            continue
        except Exception as error:  # noqa: BLE001 - a malformed file may raise anything in a reader
            text = f"it cannot be read ({type(error).__name__}: {_reason(error)}).{item.hint}"
            result.problems.append(Problem(item.path, "corrupt", text))
            continue
        result.problems += problems
        if not problems:
            result.states.append((item, state))
        elif (matching := item.matching(state)) is not None:
            result.states.append((item, matching))
    return result


def _class_problems(item: LoadItem, manifest: manifests.Manifest | None) -> list[Problem]:
    saved = "" if manifest is None else manifest.kinds.get(item.path, "")
    if not saved or not item.class_name or saved == item.class_name:
        return []
    text = f"it was saved by {saved}, and this run has {item.class_name}, which has to begin anew (strict=False)"
    return [Problem(item.path, "state", text)]


def _reason(error: Exception) -> str:
    # torch.load's message explains at length how to turn its protection off, which would be unsafe.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    relevant = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (relevant or lines or [""])[0][:300]


def extra_files(folder: Path, items: Sequence[LoadItem], manifest: manifests.Manifest | None) -> list[Problem]:
    """Returns the files and folders of a checkpoint that no item of this run loads."""
    present = manifest.paths if manifest is not None else checkpoint_files_in(folder)
    wanted = {item.path for item in items}
    return [
        Problem(name, "extra", "this run has nothing to load it into")
        for name in sorted(set(map(item_of, present)))
        if is_shared(name) and name not in wanted and not name.startswith(SAMPLER_NAME)
    ]


def merge_problems(
    world: World, folder: Path, results: Sequence[ReadResult], strict: bool, changed: Sequence[str] = ()
) -> list[Problem]:
    """Collects the findings of all ranks, without duplicates.

    Args:
        world: This process and its peers.
        folder: The checkpoint.
        results: This rank's results.
        strict: Any finding is an error.
        changed: Changes that were made before, for the message.

    Raises:
        LoadError: on every rank, if a file is damaged, or for any finding if `strict`.
    """

    def own() -> tuple[list[Problem], list[Problem]]:
        damaged = [problem for result in results for problem in result.damaged]
        return damaged, [problem for result in results for problem in result.problems]

    outcomes = run_on_all_ranks(world.collectives, f"checking {folder}", own, LoadError)
    if any(damaged for damaged, _ in outcomes):
        _raise_damaged(folder, [found for outcome in outcomes for found in outcome], changed)
    problems = list(dict.fromkeys(problem for _, found in outcomes for problem in found))
    if problems and strict:
        raise LoadError(
            f"{folder} does not fit this run, and {_unchanged(changed)} (strict=False loads what fits):\n"
            f"{bullet_list(problems)}",
            problems,
            changed,
        )
    if problems:
        text = f"{folder} was loaded except for what does not fit:\n{bullet_list(problems)}"
        logger.warning(text, main_process_only=True)
    return problems


# Restore --------------------------------------------------------------------------------------------------------------

States = Sequence[tuple[LoadItem, Any]]


def apply(
    world: World,
    folder: Path,
    states: States,
    *,
    begin: Callable[[], None] | None = None,
    changed: Sequence[str] = (),
) -> None:
    """Loads everything that was read into its objects. Collective.

    Args:
        world: This process and its peers.
        folder: The checkpoint, for messages.
        states: The items that were read, with their states.
        begin: Called after all revertible items are loaded.
        changed: Changes that were made before, for messages.

    Raises:
        LoadError: on every rank, if an object of any rank raises. Its `changed` lists everything that is not as it was.
    """
    first = [pair for pair in states if pair[0].revertible]
    _load_or_revert(world, folder, first, list(changed))
    done = [*changed, *(item.path for item, _ in first)]

    def load_rest() -> None:
        if begin is not None:
            done.append("the gradients accumulated so far")
            begin()
        for item, state in states:
            if not item.revertible:
                done.append(item.path)
                item.load(state)

    cause = _attempt(load_rest)
    found = run_on_all_ranks(world.collectives, f"loading {folder}", lambda: (_describe(cause), done), LoadError)
    failed = {rank: (done[-1], text) for rank, (text, done) in enumerate(found) if text}
    if failed:
        everything = list(dict.fromkeys(name for _, names in found for name in names))
        raise _load_error(world, folder, failed, everything) from cause


def _load_or_revert(world: World, folder: Path, states: States, changed: list[str]) -> None:
    """Loads revertible items, on all ranks or on none."""
    backups: list[tuple[LoadItem, Any]] = []
    started: list[str] = []

    def load_all() -> None:
        backups.extend((item, _copy(item.backup())) for item, _ in states)
        for item, state in states:
            started.append(item.path)
            item.load(state)

    def revert() -> list[str]:
        mine = [(item, old) for item, old in backups if item.path in started]
        return [item.path for item, old in mine if _attempt(functools.partial(item.load, old)) is not None]

    cause = _attempt(load_all)
    found = run_on_all_ranks(world.collectives, f"loading {folder}", lambda: (_describe(cause), started), LoadError)
    failed = {rank: ((paths or ["registered objects"])[-1], text) for rank, (text, paths) in enumerate(found) if text}
    if failed:
        left = run_on_all_ranks(world.collectives, f"undoing the load of {folder}", revert, LoadError)
        everything = list(dict.fromkeys([*changed, *(path for paths in left for path in paths)]))
        raise _load_error(world, folder, failed, everything) from cause


def _copy(state: Any) -> Any:
    """Copies a state, so that a load does not change it; a state that cannot be copied is returned as it is."""
    try:
        return copy.deepcopy(state)
    except Exception:  # noqa: BLE001 - user classes may raise anything
        return state


def _attempt(action: Callable[[], None]) -> Exception | None:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - raised on all ranks
        return error
    return None


def _describe(error: Exception | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"


def _load_error(world: World, folder: Path, failed: dict[int, tuple[str, str]], changed: list[str]) -> LoadError:
    problems = [
        Problem(path, "state", f"its object refused it{f' on rank {rank}' if world.size > 1 else ''}: {text}")
        for rank, (path, text) in failed.items()
    ]
    after = (
        f"These have changed already, perhaps in part: {', '.join(changed)}. Load another checkpoint, or start anew"
        if changed
        else "Nothing was changed"
    )
    return LoadError(f"{folder} was not loaded:\n{bullet_list(problems)}\n{after}.", problems, changed)
