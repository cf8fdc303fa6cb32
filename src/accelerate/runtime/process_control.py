"""`ProcessControl`: methods of the states and of `Accelerator` that run code on some processes, or split inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, overload

from .cluster import partition

_T = TypeVar("_T")
_R = TypeVar("_R")
_P = ParamSpec("_P")


class _Restriction(Protocol):
    """Decorator after which a function runs on some processes and returns None on the others."""

    def __call__(self, function: Callable[_P, _R], /) -> Callable[_P, _R | None]: ...


class ProcessControl:
    """Mixin that runs code on one process only or first, and splits inputs between processes.

    A subclass provides the attributes below and `wait_for_everyone`.

    Attributes:
        num_processes: Number of processes.
        process_index: Rank over all machines.
        local_process_index: Rank on this machine.
        is_main_process: Whether this is rank 0 of the run.
        is_local_main_process: Whether this is the first process on its machine.
        is_last_process: Whether this is the last rank of the run.
    """

    if TYPE_CHECKING:  # attributes of one subclass, properties of another

        @property
        def num_processes(self) -> int: ...
        @property
        def process_index(self) -> int: ...
        @property
        def local_process_index(self) -> int: ...
        @property
        def is_main_process(self) -> bool: ...
        @property
        def is_local_main_process(self) -> bool: ...
        @property
        def is_last_process(self) -> bool: ...
        def wait_for_everyone(self) -> None: ...

    def _check_joined(self) -> None:
        """Raises ValueError if the state of this process is not initialized."""

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Runs the block on the main process before all others, to download or cache files for them."""
        with self._goes_first(self.is_main_process):
            yield

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Runs the block on the first process of each machine before the others on that machine."""
        with self._goes_first(self.is_local_main_process):
            yield

    @contextmanager
    def _goes_first(self, first: bool) -> Iterator[None]:
        if not first:
            self.wait_for_everyone()
        try:
            yield
        finally:  # after an exception too, so that the others do not deadlock
            if first:
                self.wait_for_everyone()

    @contextmanager
    def split_between_processes(self, inputs: _T, apply_padding: bool = False) -> Iterator[_T]:
        """Yields this process's slice of `inputs`.

        Args:
            inputs: A list, tuple, tensor, array, ``datasets.Dataset``, or a dict of these with equal lengths. A string is
                not split: every process gets all of it.
            apply_padding: Repeat the last item so that all slices have equal length (for a `gather` afterwards).

        Raises:
            TypeError: for an object that cannot be sliced.
            ValueError: for a dict whose values differ in length.

        Example:
            ```python
            with state.split_between_processes(["a", "b", "c"]) as prompts:
                print(prompts)  # of two processes, the first has ["a", "b"], the second ["c"]
            ```
        """
        yield partition.split(inputs, self.process_index, self.num_processes, apply_padding=apply_padding)

    @overload
    def on_main_process(self, function: Callable[_P, _R]) -> Callable[_P, _R | None]: ...
    @overload
    def on_main_process(self, function: None = None) -> _Restriction: ...
    def on_main_process(self, function: Callable[..., Any] | None = None) -> Any:
        """Decorator: runs the function on the main process only and returns None on the others."""
        self._check_joined()
        if function is None:
            return self.on_main_process
        return _only_if(lambda: self.is_main_process, function)

    @overload
    def on_local_main_process(self, function: Callable[_P, _R]) -> Callable[_P, _R | None]: ...
    @overload
    def on_local_main_process(self, function: None = None) -> _Restriction: ...
    def on_local_main_process(self, function: Callable[..., Any] | None = None) -> Any:
        """Decorator: runs the function on the first process of each machine only."""
        if function is None:
            return self.on_local_main_process
        return _only_if(lambda: self.is_local_main_process, function)

    def on_last_process(self, function: Callable[_P, _R]) -> Callable[_P, _R | None]:
        """Decorator: runs the function on the last process only."""
        return _only_if(lambda: self.is_last_process, function)

    @overload
    def on_process(self, function: Callable[_P, _R], process_index: int | None = None) -> Callable[_P, _R | None]: ...
    @overload
    def on_process(self, function: None = None, process_index: int | None = None) -> _Restriction: ...
    def on_process(self, function: Callable[..., Any] | None = None, process_index: int | None = None) -> Any:
        """Decorator: runs the function on the process with a given rank only."""
        if function is None:
            return functools.partial(self.on_process, process_index=process_index)
        return _only_if(lambda: self.process_index == process_index, function)

    @overload
    def on_local_process(
        self,
        function: Callable[_P, _R],
        local_process_index: int | None = None,
        local_process_idx: int | None = None,
    ) -> Callable[_P, _R | None]: ...
    @overload
    def on_local_process(
        self, function: None = None, local_process_index: int | None = None, local_process_idx: int | None = None
    ) -> _Restriction: ...
    def on_local_process(
        self,
        function: Callable[..., Any] | None = None,
        local_process_index: int | None = None,
        local_process_idx: int | None = None,
    ) -> Any:
        """Decorator: runs the function on the process with a given local rank on each machine only.

        `local_process_idx` is the older spelling of `local_process_index`.
        """
        wanted = local_process_index if local_process_index is not None else local_process_idx
        if function is None:
            return functools.partial(self.on_local_process, local_process_index=wanted)
        return _only_if(lambda: self.local_process_index == wanted, function)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints on the first process of each machine only."""
        if self.is_local_main_process:
            print(*args, **kwargs)


def _only_if(condition: Callable[[], bool], function: Callable[_P, _R]) -> Callable[_P, _R | None]:
    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        return function(*args, **kwargs) if condition() else None

    return wrapped
