"""Collective steps of a checkpoint: an error on one rank is raised on all."""

from __future__ import annotations

import ast
import contextlib
import datetime
import functools
import linecache
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import torch.distributed as dist

from ..runtime import world
from ..runtime.collective_backend import Collectives
from ..runtime.cpu_groups import cpu_group
from .errors import CheckpointError, LoadError, SaveError

_T = TypeVar("_T")

TIMEOUT = datetime.timedelta(hours=12)
"""How long ranks wait for each other in a save or a load: longer than a slow disk takes (4 TB at 100 MB/s). A rank that
died is noticed long before, by its closed connections."""


def checkpoint_group(ranks: Collectives, failure: type[CheckpointError], purpose: str = "checkpoints") -> Collectives:
    """Returns a group of all ranks in which they may wait for a disk. The first call for a purpose is collective.

    Args:
        ranks: All ranks, in the training group.
        failure: The error to raise.
        purpose: Name of the group; a background thread uses another one than the main thread.

    Raises:
        CheckpointError: on every rank, if one has ended.
    """

    def meet() -> None:  # the training group notices a rank that has ended; creating a group would wait for it
        run_on_all_ranks(ranks, "meeting for a checkpoint", lambda: None, failure)

    return ranks if ranks.size == 1 else cpu_group(purpose, TIMEOUT, meet)


def run_on_all_ranks(
    collectives: Collectives, doing: str, action: Callable[[], _T], failure: type[CheckpointError]
) -> list[_T]:
    """Runs `action` on every rank and waits for all.

    Args:
        collectives: The ranks.
        doing: Name of the step, for the message.
        action: This rank's part. Its result is sent to all ranks, so it must be small and picklable.
        failure: The error to raise.

    Returns:
        The results in rank order.

    Raises:
        CheckpointError: on every rank, if the action failed on any, or if a rank has ended.
    """
    cause: Exception | None = None
    result: Any = None
    try:
        result = action()
    except Exception as error:  # noqa: BLE001 - sent to the other ranks, which are waiting, before it is raised
        cause = error
    own = None if cause is None else _describe(cause)
    outcomes = [(own, result)]
    if collectives.size > 1:
        try:
            outcomes = collectives.all_gather_object((own, result))
        except Exception as error:  # noqa: BLE001 - backends raise errors of many types
            here = f" On this rank: {own}." if own else ""
            raise failure(
                f"{doing} failed on rank {collectives.rank}: the other processes do not answer ({error}).{here} One of "
                "them has probably ended."
            ) from cause or error
    failed = [(rank, text) for rank, (text, _) in enumerate(outcomes) if text is not None]
    if not failed:
        return [outcome for _, outcome in outcomes]
    where = "; ".join(text if collectives.size == 1 else f"on rank {rank}: {text}" for rank, text in failed)
    raise failure(f"{doing} failed: {where}") from cause


def broadcast_from_rank0(collectives: Collectives, doing: str, value: _T, failure: type[CheckpointError]) -> _T:
    """Returns rank 0's value on every rank. Arguments and errors as for `run_on_all_ranks`."""
    return run_on_all_ranks(collectives, doing, lambda: value, failure)[0]


def _describe(error: BaseException) -> str:
    if isinstance(error, CheckpointError) and not isinstance(error, LoadError):
        return str(error)
    return f"{type(error).__name__}: {error}"


# A file that one rank writes, perhaps in a call that no other rank makes ----------------------------------------------

_calls: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()
_OK, _FAILED = "+", "-"


@contextlib.contextmanager
def wait_for_writer(doing: str, writer: int) -> Iterator[None]:
    """Leaves the block on every rank that enters it after the rank that writes has left it.

    This is not a collective, since scripts may make such a call under ``if accelerator.is_main_process``: the writer puts
    the outcome into the training group's store, which the other ranks poll. (`Store.wait` would hold a lock that NCCL's
    watchdog needs.) Outcomes are matched by the number of the call. After a call that only the writer made, other ranks
    return early.

    Args:
        doing: Name of the step, for the message.
        writer: The rank that writes.

    Raises:
        SaveError: on the other ranks, if the block failed on the writer.
    """
    here, store = world.current(), _store()
    if here.size == 1 or store is None:
        yield
        return
    group = dist.group.WORLD
    assert group is not None
    _calls[group] = _calls.get(group, 0) + 1
    key = f"accelerate/writer_{writer}/call_{_calls[group]}"
    if here.rank != writer:
        yield
        outcome = _poll(store, key, doing, writer)
        if outcome[:1] == _FAILED:
            raise SaveError(f"{doing} failed: on rank {writer}: {outcome[1:]}")
        return
    try:
        yield
    except BaseException as error:
        store.set(key, _FAILED + _describe(error))
        raise
    store.set(key, _OK)


def _store() -> dist.Store | None:
    # torch has no public name for it. Without it the other ranks do not wait, and the training group's timeout applies.
    get = getattr(dist.distributed_c10d, "_get_default_store", None) if dist.is_available() else None
    return get() if get is not None and dist.is_initialized() else None


def _poll(store: dist.Store, key: str, doing: str, writer: int) -> str:
    pause, limit = 0.005, time.monotonic() + TIMEOUT.total_seconds()
    try:
        while not store.check([key]):
            if time.monotonic() > limit:
                raise TimeoutError(f"no answer within {TIMEOUT}")
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        return store.get(key).decode()
    except Exception as error:
        raise SaveError(
            f"{doing}: rank {writer}, which writes, does not answer ({error}). It has probably ended."
        ) from error


# Debug mode: collective calls that only some ranks make ----------------------------------------------------------------

_RANK_FLAGS = {"is_main_process", "is_local_main_process", "is_last_process"}
_RANK_NUMBERS = {"process_index", "local_process_index"}


def check_called_by_all_ranks(collectives: Collectives, call: str) -> None:
    """Rejects a collective call in a branch that only some ranks take, where it would wait for the others forever.

    Parses the source of every caller on the stack, so it belongs to debug mode.

    Raises:
        RuntimeError: naming the line.
    """
    if collectives.size == 1:
        return
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path, line = frame.f_code.co_filename, frame.f_lineno
        for first, last, test in _rank_branches(path):
            if first <= line <= last:
                raise RuntimeError(
                    f"{call} is called under `if {test}` ({path}, line {line}), so that only some processes call it. All "
                    "of them have to: each has a part of the state. Take the call out of the `if`; files that are the same "
                    "everywhere are written by one process only."
                )
        frame = frame.f_back


@functools.lru_cache(maxsize=1024)
def _rank_branches(path: str) -> tuple[tuple[int, int, str], ...]:
    source = "".join(linecache.getlines(path))
    if not any(name in source for name in (*_RANK_FLAGS, *_RANK_NUMBERS)):
        return ()
    try:
        tree = ast.parse(source)
    except SyntaxError:  # not plain Python: a template, a notebook cell with magic
        return ()
    return tuple(_branches(tree))


def _branches(tree: ast.AST) -> Iterator[tuple[int, int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.If):
            continue
        tests = (
            node.test.values if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And) else [node.test]
        )
        if any(_tests_rank(test) for test in tests):
            yield node.body[0].lineno, _end_line(node.body[-1]), ast.unparse(node.test)
        negated = (
            node.test.operand if isinstance(node.test, ast.UnaryOp) and isinstance(node.test.op, ast.Not) else None
        )
        if node.orelse and negated is not None and _tests_rank(negated):
            yield node.orelse[0].lineno, _end_line(node.orelse[-1]), f"{ast.unparse(node.test)}: … else"


def _tests_rank(test: ast.AST) -> bool:
    if (
        isinstance(test, ast.Compare)
        and isinstance(test.ops[0], ast.Eq)
        and isinstance(test.comparators[0], ast.Constant)
    ):
        return isinstance(test.left, ast.Attribute) and test.left.attr in _RANK_NUMBERS
    return isinstance(test, ast.Attribute) and test.attr in _RANK_FLAGS


def _end_line(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno
