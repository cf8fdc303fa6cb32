"""Device memory: releases it, detects out-of-memory errors, and searches for a batch size that fits.

The search needs the consensus of all processes, reached in a gloo group of its own.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import gc
import inspect
import logging
import re
import sys
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

import torch

from . import devices
from .collective_backend import Collectives
from .cpu_groups import cpu_group

_R = TypeVar("_R")
_P = ParamSpec("_P")

logger = logging.getLogger(__name__)

_ATTEMPT_TIMEOUT = datetime.timedelta(days=365)
"""Timeout of the consensus after an attempt, which may be the whole training."""

_WAITING_WARNING = (
    "process %d ran out of memory at batch size %d and waits for the others. If they are blocked in a collective that needs "
    "this process, the run ends with the timeout of their process group."
)
_WARN_AFTER_SECONDS = 30.0
"""Seconds that a process which ran out of memory waits for the others before it warns."""

# Messages of allocators and libraries, in any case. "HIP" stands for cuda in ROCm builds of torch.
_KINDS = "|".join((*devices.DEVICES, "hip"))
_OUT_OF_MEMORY = re.compile(
    rf"""\b({_KINDS}|MPS\ backend)\ out\ of\ memory              # torch's caching allocators
    |\b({_KINDS})(\ driver)?\ (error|failure)\b[^\n]{{0,20}}\bout\ of\ memory\b  # the driver; NCCL quotes it
    |\bTriton\ Error\ \[\w+\]:\ out\ of\ memory\b
    |\bout\ of\ resource:\ shared\ memory\b                    # Triton, too: a kernel's tiles
    |_STATUS_ALLOC_FAILED\b                                   # cuBLAS, cuDNN, cuSPARSE, hipBLAS ...
    |\bcuDNN\ error:\ CUDNN_STATUS_NOT_SUPPORTED\b
    |\brocblas_status_memory_error\b
    |\b(UR_RESULT|PI|ZE_RESULT)_ERROR_OUT_OF_(DEVICE_MEMORY|HOST_MEMORY|RESOURCES)\b  # XPU's driver
    |\bDefaultCPUAllocator:\ (can't\ allocate|not\ enough)\ memory\b
    |\bFATAL\ ERROR\ ::\ MODULE:PT_DEVMEM\ Allocation\ failed   # Gaudi
    """,
    re.IGNORECASE | re.VERBOSE,
)


def clear_device_cache(garbage_collection: bool = False) -> None:
    """Releases memory cached by torch's device allocators to the driver.

    Args:
        garbage_collection: Run Python's garbage collector first, since unreachable objects may hold tensors.
    """
    if garbage_collection:
        gc.collect()
    for kind in devices.DEVICES.values():
        if kind.name != "cpu" and kind.is_available():
            kind.empty_cache()


def malloc_trim() -> None:
    """Returns freed host memory to the system; glibc keeps blocks of up to 32 MiB otherwise."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def release_memory(*objects: Any) -> list[None]:
    """Drops references to objects and releases their device memory.

    The caller's own references remain, so assign the result to them.

    Args:
        *objects: The objects.

    Returns:
        A None for each object.

    Example:
        ```python
        model, optimizer = release_memory(model, optimizer)
        ```
    """
    released = [None] * len(objects)
    del objects
    clear_device_cache(garbage_collection=True)
    return released


def should_reduce_batch_size(exception: Exception) -> bool:
    """Returns whether an exception is an out-of-memory error, after which a smaller batch may fit.

    True for `torch.OutOfMemoryError`, for Python's `MemoryError`, for Triton's ``OutOfResources``, and for a `RuntimeError`
    with the message of an allocator or library that has no exception class (the CPU's, the driver's, cuBLAS's, NCCL's).
    """
    # The older alias of torch.OutOfMemoryError, which torch 2.4 has too; it covers every device type.
    if isinstance(exception, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    # Triton's is not a RuntimeError, and is compared by name in order not to import Triton.
    of_an_allocator = isinstance(exception, RuntimeError) or type(exception).__name__ == "OutOfResources"
    return of_an_allocator and _OUT_OF_MEMORY.search(str(exception)) is not None


class _WithoutBatchSize(Protocol):
    """Decorator that removes a function's first parameter, the batch size."""

    def __call__(self, function: Callable[Concatenate[int, _P], _R], /) -> Callable[_P, _R]: ...


@overload
def find_executable_batch_size(
    function: Callable[Concatenate[int, _P], _R],
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[..., int] | None = None,
) -> Callable[_P, _R]: ...
@overload
def find_executable_batch_size(
    function: None = None, starting_batch_size: int = 128, reduce_batch_size_fn: Callable[..., int] | None = None
) -> _WithoutBatchSize: ...
def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Decorator: retries a function with smaller and smaller batch sizes while it runs out of memory.

    The decorated function passes the batch size as the first argument; the caller omits it. Create model, optimizer and
    loaders inside the function: objects of the caller stay in memory across attempts. Each call of the decorated function
    starts at `starting_batch_size`.

    All processes must call the decorated function. After each attempt they reach a consensus: if any of them ran out of
    memory, all retry with the same smaller size, and results of the others are dropped. The consensus uses a process group
    of its own, so that it cannot interleave with collectives of the function.

    One case cannot be retried: a process runs out of memory *before* a collective in which its peers already block (the
    gradient all-reduce of DistributedDataParallel, a gather). They block until the timeout of their process group and then
    raise its error, after which the process that ran out of memory raises `RuntimeError`. Processes never continue with
    different batch sizes. Set a shorter ``timeout`` in `InitProcessGroupKwargs` to shorten the wait. Other exceptions are
    raised at once.

    Args:
        function: The function; None returns a decorator.
        starting_batch_size: The first batch size.
        reduce_batch_size_fn: Returns the next batch size. It is called with the current one if it has a parameter without
            default, else without arguments. None halves.

    Returns:
        The function without its first parameter.

    Raises:
        TypeError: if the caller passes the batch size too, or arguments that the function does not take.
        RuntimeError: if not even batch size 1 fits, or if the consensus fails as described above.
        ValueError: if `reduce_batch_size_fn` returns a size that is not smaller.

    Example:
        ```python
        @find_executable_batch_size(starting_batch_size=256)
        def train(batch_size):
            accelerator.free_memory()
            ...

        train()
        ```
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    wanted = function
    smaller = _resolve_reducer(reduce_batch_size_fn)

    @functools.wraps(wanted)
    def search(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(wanted, args, kwargs)
        consensus = _BatchSizeConsensus()
        batch_size = starting_batch_size
        clear_device_cache(garbage_collection=True)
        while batch_size > 0:
            fitted, result = _attempt(functools.partial(wanted, batch_size, *args, **kwargs))
            if consensus.all_fit(fitted, batch_size):
                return result
            # `_attempt` has dropped the exception, whose traceback held the tensors.
            result = None
            clear_device_cache(garbage_collection=True)
            batch_size = consensus.min(_validated(smaller(batch_size), batch_size))
            logger.info("out of memory: trying again with batch size %d", batch_size)
        raise RuntimeError(
            f"No executable batch size found: `{_name(wanted)}` ran out of memory at every size from "
            f"{starting_batch_size} down, and the next one is zero."
        )

    return search


def _attempt(call: Callable[[], _R]) -> tuple[bool, _R | None]:
    try:
        return True, call()
    except Exception as error:
        if not should_reduce_batch_size(error):
            raise
        return False, None


def _halved(batch_size: int) -> int:
    return batch_size // 2


def _resolve_reducer(function: Callable[..., int] | None) -> Callable[[int], int]:
    if function is None:
        return _halved
    given = function
    needed = [
        parameter
        for parameter in inspect.signature(given).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return given if needed else lambda batch_size: given()


def _validated(smaller: int, present: int) -> int:
    if smaller >= present:
        raise ValueError(
            f"reduce_batch_size_fn returned {smaller} after {present}: it must return a smaller size each time."
        )
    return int(smaller)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _check_arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin without a signature raises by itself
        return
    try:
        signature.bind(0, *args, **kwargs)
    except TypeError as error:
        passed = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
        raise TypeError(
            f"`{_name(function)}` does not take ({passed}) after the batch size: {error}. The decorator passes the "
            f"batch size as the first argument: call `{_name(function)}` without it."
        ) from None


class _BatchSizeConsensus:
    """Consensus of the processes after each attempt."""

    def __init__(self) -> None:
        # Created before the first attempt, after which peers may be in other code. A process without a process group may
        # initialize one during the attempt; `all_fit` looks again.
        self._group = _consensus_group()

    def all_fit(self, fitted: bool, batch_size: int) -> bool:
        """Returns whether the batch fitted on every process."""
        if self._group.size == 1:
            self._group = _consensus_group()
        if fitted or self._group.size == 1:
            return self.min(int(fitted)) == 1
        # Peers usually arrive within seconds.
        late = threading.Timer(
            _WARN_AFTER_SECONDS,
            logger.warning,
            (_WAITING_WARNING, self._group.rank, batch_size),
        )
        late.daemon = True
        late.start()
        try:
            return self.min(int(fitted)) == 1
        finally:
            late.cancel()

    def min(self, number: int) -> int:
        """Returns the minimum of a number over the processes."""
        try:
            return min(self._group.all_gather_object(number))
        except RuntimeError as error:
            raise RuntimeError(
                "the processes could not agree on a batch size, because one of them ended or never arrived. If one of "
                "them ran out of memory while others were blocked in a collective that needed it (DDP's gradient "
                "all-reduce, a gather), the attempt cannot be retried: start with a smaller batch size."
            ) from error


def _consensus_group() -> Collectives:
    return cpu_group("attempts at a batch size", _ATTEMPT_TIMEOUT)
