"""Checks of a load: every rank checks its part, and all findings are gathered before anything is changed (`applying`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
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
from .items.state_item import Entry
from .storage import manifest as manifests
from .storage.atomic import recover
from .storage.filenames import checkpoint_files_in, is_shared, item_of
from .storage.verified_reader import CorruptFileError

logger = get_logger(__name__)


@dataclass
class LoadReport:
    """What a load did.

    Attributes:
        folder: The checkpoint; of one at a URL, where it was read on its way.
        problems: What did not fit and was left out (``strict=False``).
        passed_over: Newer folders that were not taken, each with the reasons.
        world_size: Number of processes that saved it; None where that is not recorded.
        number: Its number, as the manifest has it.
        url: Where it is, if not in a folder.
    """

    folder: Path
    problems: list[Problem] = field(default_factory=list)
    passed_over: list[tuple[Path, list[Problem]]] = field(default_factory=list)
    world_size: int | None = None
    number: int | None = None
    url: str | None = None


def find(world: World, project: Path) -> tuple[Path | None, list[tuple[Path, list[Problem]]]]:
    """The newest valid checkpoint of a project, as rank 0 finds it."""

    def look() -> Any:
        return latest_valid(project) if world.rank == 0 else None

    found = run_on_all_ranks(world.collectives, f"looking for checkpoints in {project}", look, LoadError)[0]
    for folder, problems in found.passed_over:
        logger.warning(f"the checkpoint {folder} is passed over, it is not valid:\n{bullet_list(problems, 5)}")
    return found.folder, found.passed_over


def open_checkpoint(world: World, folder: Path) -> manifests.Manifest | None:
    """The manifest of a checkpoint, once an interrupted replacement has been finished.

    Args:
        world: This process and its peers.
        folder: The checkpoint.

    Returns:
        None for a checkpoint of another release, which has none.

    Raises:
        LoadError: on every rank, when it is none, or its manifest is damaged.
    """

    def finish() -> None:
        if world.rank == 0:
            recover(folder)

    run_on_all_ranks(world.collectives, f"opening {folder}", finish, LoadError)

    def look() -> tuple[Any, list[Problem]]:
        if not folder.is_dir():
            return None, problems_of(folder)
        try:
            return manifests.read(folder), []
        except FileNotFoundError:
            return None, problems_without_manifest(folder)
        except (OSError, ValueError) as error:
            return None, [Problem(manifests.NAME, "corrupt", str(error))]

    outcomes = run_on_all_ranks(world.collectives, f"opening {folder}", look, LoadError)
    _refuse_damaged(folder, [found for _, found in outcomes])
    own: manifests.Manifest | None = outcomes[world.rank][0]
    return own


def _left(changed: Sequence[str]) -> str:
    return f"nothing was changed but {', '.join(changed)}" if changed else "nothing was changed"


def _refuse_damaged(folder: Path, outcomes: Sequence[Sequence[Problem]], changed: Sequence[str] = ()) -> None:
    problems = list(dict.fromkeys(problem for found in outcomes for problem in found))
    if problems:
        raise LoadError(f"{folder} cannot be loaded, and {_left(changed)}:\n{bullet_list(problems)}", problems, changed)


def verify_files(world: World, folder: Path, manifest: manifests.Manifest, entries: Sequence[Entry]) -> None:
    """Compares all files with the manifest; the ranks of a machine share the reading out between them.

    A rank that is alone on its machine leaves the content of files that `read_items` compares to that.

    Raises:
        LoadError: on every rank, with all that is missing or damaged.
    """
    left = {entry.path for entry in entries if entry.kept and world.local_size == 1}

    def look() -> list[Problem]:
        share = (world.local_rank, world.local_size)
        found = manifests.verify(folder, manifest, share=share, size_only=left)
        return found and manifests.verify(folder, manifest, share=share)  # what is wrong is all told at once

    _refuse_damaged(folder, run_on_all_ranks(world.collectives, f"verifying {folder}", look, LoadError))


@dataclass
class ReadResult:
    """Entries that have been read, and what was found; `damaged`: what makes the whole checkpoint one not to load."""

    states: list[tuple[Entry, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    damaged: list[Problem] = field(default_factory=list)


def read_items(
    folder: Path, entries: Sequence[Entry], manifest: manifests.Manifest | None, options: dict[str, Any]
) -> ReadResult:
    """Reads entries and checks whether they fit. Changes nothing.

    Args:
        folder: The checkpoint.
        entries: What to read.
        manifest: Its manifest: the classes that the states are of, and the checksums of files that are read into memory of
            their own.
        options: For `torch.load`.
    """
    reading = ReadResult()
    records = {} if manifest is None else {record.path: record for record in manifest.files}
    for entry in entries:
        if not os.path.lexists(folder / entry.path):
            if entry.required:
                reading.problems.append(Problem(entry.path, "missing", "this run needs it"))
            continue
        try:
            if not (folder / entry.path).is_dir():
                require_regular_file(folder / entry.path)
            own = {"mmap": False, "record": records.get(entry.path)} if entry.kept else {}
            state = entry.read(folder, {**options, **own})
            problems = _of_another_class(entry, manifest) or entry.check(state)
        except CorruptFileError as error:
            reading.damaged.append(Problem(entry.path, "corrupt", str(error)))
            continue
        except LoadError as error:
            reading.problems += [replace(found, file=f"{entry.path}/{found.file}") for found in error.problems]
            continue
        except Exception as error:  # noqa: BLE001 - whatever a file that does not fit makes a reader raise
            text = f"it cannot be read ({type(error).__name__}: {_reason(error)}).{entry.needs}"
            reading.problems.append(Problem(entry.path, "corrupt", text))
            continue
        reading.problems += problems
        if problems and entry.partial is not None:
            reading.states.append((entry, entry.partial(state)))
        elif not problems:
            reading.states.append((entry, state))
    return reading


def _of_another_class(entry: Entry, manifest: manifests.Manifest | None) -> list[Problem]:
    saved = "" if manifest is None else manifest.kinds.get(entry.path, "")
    if not saved or not entry.kind or saved == entry.kind:
        return []
    text = f"it was saved by {saved}, and this run has {entry.kind}, which has to begin anew (strict=False)"
    return [Problem(entry.path, "state", text)]


def _reason(error: Exception) -> str:
    # torch's refusal goes on for a screen about turning its protection off, which is not what one should do.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (telling or lines or [""])[0][:300]


def extra_files(folder: Path, entries: Sequence[Entry], manifest: manifests.Manifest | None) -> list[Problem]:
    """Parts in a checkpoint that this run has no object for."""
    present = manifest.paths if manifest is not None else checkpoint_files_in(folder)
    names = set(map(item_of, present))
    wanted = {entry.path for entry in entries}
    return [
        Problem(name, "extra", "this run has nothing to load it into")
        for name in sorted(names)
        if is_shared(name) and name not in wanted and not name.startswith(SAMPLER_NAME)
    ]


def merge_problems(
    world: World, folder: Path, readings: Sequence[ReadResult], strict: bool, changed: Sequence[str] = ()
) -> list[Problem]:
    """All ranks' findings, once each.

    Args:
        world: This process and its peers.
        folder: The checkpoint.
        readings: What was read.
        strict: Findings are errors.
        changed: What has been changed before, for the message.

    Raises:
        LoadError: on every rank, with `strict` and any finding, or when anything is damaged.
    """

    def own() -> tuple[list[Problem], list[Problem]]:
        damaged = [problem for reading in readings for problem in reading.damaged]
        return damaged, [problem for reading in readings for problem in reading.problems]

    outcomes = run_on_all_ranks(world.collectives, f"checking {folder}", own, LoadError)
    if any(damaged for damaged, _ in outcomes):
        _refuse_damaged(folder, [found for outcome in outcomes for found in outcome], changed)
    problems = list(dict.fromkeys(problem for _, found in outcomes for problem in found))
    if problems and strict:
        raise LoadError(
            f"{folder} does not fit this run, and {_left(changed)} (strict=False loads what fits):\n{bullet_list(problems)}",
            problems,
            changed,
        )
    if problems:
        logger.warning(
            f"{folder} was loaded except for what does not fit:\n{bullet_list(problems)}", main_process_only=True
        )
    return problems
