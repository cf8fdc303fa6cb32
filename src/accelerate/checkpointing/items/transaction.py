"""Loads states that were read and checked: what may raise goes first and is undone on all ranks if it does.

Objects of users are the ones that refuse a state that fits by its types. Their old states are kept until all of them took
the new ones. Models and optimizers, of which no second copy is kept, come after them; if one fails all the same, the error
lists what has changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...runtime.world import World
from ..consensus import run_on_all_ranks
from ..errors import LoadError, Problem, bullet_list
from .state_item import Entry

States = Sequence[tuple[Entry, Any]]


def apply(
    world: World,
    folder: Path,
    states: States,
    *,
    begin: Callable[[], None] | None = None,
    changed: Sequence[str] = (),
) -> None:
    """Puts everything that was read in its place. Collective.

    Args:
        world: This process and its peers.
        folder: The checkpoint, for messages.
        states: The entries that were read, with their states.
        begin: Called when all objects that may refuse have taken their states.
        changed: What has been changed before, for messages.

    Raises:
        LoadError: on every rank, when an object of any rank refuses its state: `changed` lists what is not as it was.
    """
    first = [pair for pair in states if pair[0].revertible]
    _put_or_undo(world, folder, first, list(changed))
    done = [*changed, *(entry.path for entry, _ in first)]

    def put() -> None:
        if begin is not None:
            done.append("the gradients accumulated so far")
            begin()
        for entry, state in states:
            if not entry.revertible:
                done.append(entry.path)
                entry.load(state)

    cause = _attempt(put)
    found = run_on_all_ranks(world.collectives, f"loading {folder}", lambda: (_text(cause), done), LoadError)
    failed = {rank: (done[-1], text) for rank, (text, done) in enumerate(found) if text}
    if failed:
        everything = list(dict.fromkeys(name for _, names in found for name in names))
        raise _refused(world, folder, failed, everything) from cause


def _put_or_undo(world: World, folder: Path, states: States, changed: list[str]) -> None:
    """Loads entries that can be undone, on all ranks or on none."""
    kept: list[tuple[Entry, Any]] = []
    at: list[str] = []

    def put() -> None:
        kept.extend((entry, _own(entry.capture())) for entry, _ in states)
        for entry, state in states:
            at.append(entry.path)
            entry.load(state)

    def undo() -> list[str]:
        return [
            entry.path for entry, old in kept if entry.path in at and _attempt(partial(entry.load, old)) is not None
        ]

    cause = _attempt(put)
    found = run_on_all_ranks(world.collectives, f"loading {folder}", lambda: (_text(cause), at), LoadError)
    failed = {rank: ((paths or ["registered objects"])[-1], text) for rank, (text, paths) in enumerate(found) if text}
    if failed:
        left = run_on_all_ranks(world.collectives, f"undoing the load of {folder}", undo, LoadError)
        everything = list(dict.fromkeys([*changed, *(path for paths in left for path in paths)]))
        raise _refused(world, folder, failed, everything) from cause


def _own(state: Any) -> Any:
    """A copy of a state that a load does not change."""
    try:
        return copy.deepcopy(state)
    except Exception:  # noqa: BLE001 - whatever a class of a user raises: its load may take it as it is
        return state


def _attempt(action: Callable[[], None]) -> Exception | None:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - raised on all ranks
        return error
    return None


def _text(error: Exception | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"


def _refused(world: World, folder: Path, failed: dict[int, tuple[str, str]], changed: list[str]) -> LoadError:
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
