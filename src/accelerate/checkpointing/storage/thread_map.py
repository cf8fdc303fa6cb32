"""Maps a function over items on a few threads. (`concurrent.futures` accepts no work during interpreter shutdown, which is
when a background save is waited for.)
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


def thread_map(action: Callable[[_T], _R], items: Sequence[_T], threads: int) -> list[_R]:
    """Returns ``[action(item) for item in items]``, computed by threads; raises the error of the first item that fails."""
    if min(threads, len(items)) < 2:
        return [action(item) for item in items]
    results: list[Any] = [None] * len(items)
    errors: dict[int, BaseException] = {}
    numbers = itertools.count()

    def work() -> None:
        while not errors and (number := next(numbers)) < len(items):
            try:
                results[number] = action(items[number])
            except BaseException as error:  # noqa: BLE001 - raised below, on the calling thread
                errors[number] = error

    workers = [threading.Thread(target=work, name="checkpoint") for _ in range(min(threads, len(items)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[min(errors)]
    return results
