"""Memory: give it back, recognise that it ran out, and find the largest batch that fits.

The search for a batch size is agreed between all processes, over a channel of its own that no operation of the training
code shares.
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
"""How long processes wait for each other between two attempts: an attempt may be the whole training."""

_WAITING_WARNING = (
    "process %d ran out of memory at batch size %d and waits for the others. If they are inside an operation that waits for "
    "this process, they cannot come: the run then ends with their timeout."
)
_WARN_AFTER_SECONDS = 30.0
"""How long a process that ran out of memory waits for the others before it warns."""

# Messages of allocators and libraries, whatever their case. HIP is what torch calls cuda on AMD's devices.
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
    """Gives the memory that torch caches on this process's devices back to the driver.

    Args:
        garbage_collection: Collect unreachable Python objects first, which may hold some of it.
    """
    if garbage_collection:
        gc.collect()
    for kind in devices.DEVICES.values():
        if kind.name != "cpu" and kind.is_available():
            kind.empty_cache()


def malloc_trim() -> None:
    """Gives freed main memory back to the system; the C library would keep blocks of up to 32 MiB for later."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def release_memory(*objects: Any) -> list[None]:
    """Drops objects and frees the memory they held on the devices.

    The caller holds references of its own, so assign the result over them.

    Args:
        *objects: What to let go of.

    Returns:
        As many None as there were objects.

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
    """Returns whether an exception means that memory ran out, so that a smaller batch may help.

    True for `torch.OutOfMemoryError`, for Python's `MemoryError`, for Triton's ``OutOfResources``, and for a `RuntimeError`
    with the message of an allocator or library that raises no class of its own (the CPU's, the driver's, cuBLAS's, NCCL's).
    """
    # By its older name, which torch 2.4 knows too; it covers every kind of device.
    if isinstance(exception, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    # Triton's is no RuntimeError, and its module must not be imported to look for it.
    of_an_allocator = isinstance(exception, RuntimeError) or type(exception).__name__ == "OutOfResources"
    return of_an_allocator and _OUT_OF_MEMORY.search(str(exception)) is not None


class _WithoutBatchSize(Protocol):
    """A decorator: takes the first parameter, the batch size, from a function."""

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
    """Decorator: calls a function with smaller and smaller batch sizes until it does not run out of memory.

    The function takes the batch size as its first parameter, and the caller leaves it out. Whatever takes memory
    (model, optimizer, loaders) is made inside it: what the caller holds stays in memory through every attempt. Each
    call of the decorated function starts at `starting_batch_size` again.

    With several processes, all of them call the decorated function. After every attempt they wait for each other, and
    if any of them ran out of memory, all try again with the same smaller size; results of those that had room are
    dropped. The agreement uses a process group of its own, so it cannot be mistaken for an operation of the function.

    One case cannot be retried: a process runs out of memory *before* an operation that its peers are already waiting in
    (the gradients of DistributedDataParallel, a gather). Nothing can call the peers back from there. They stay until
    the timeout of their process group and then raise its error; the process that ran out of memory then raises a
    `RuntimeError` which says so. No process goes on with another batch size than its peers. A shorter ``timeout`` in
    `InitProcessGroupKwargs` shortens the wait. Any exception that is not about memory is raised at once.

    Args:
        function: What to call; None gives a decorator.
        starting_batch_size: The first size to try.
        reduce_batch_size_fn: Gives the next size. It is called with the present one if it has a parameter without
            default, else with nothing. None halves.

    Returns:
        The function without its first parameter. It returns what `function` returned.

    Raises:
        TypeError: when the caller passes the batch size too, or other arguments that the function does not take.
        RuntimeError: when not even batch size 1 fits, or when a process was left alone as described above.
        ValueError: when `reduce_batch_size_fn` gives a size that is not smaller.

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
            # Only now is the exception gone, and with it the frames that held the tensors.
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
            f"reduce_batch_size_fn gave {smaller} after {present}: it must return a smaller size each time."
        )
    return int(smaller)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _check_arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin that does not say what it takes will say so when called
        return
    try:
        signature.bind(0, *args, **kwargs)
    except TypeError as error:
        passed = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
        raise TypeError(
            f"`{_name(function)}` does not take ({passed}) after the batch size: {error}. The decorator passes the "
            f"batch size as the first argument, so leave it out and call `{_name(function)}` with the others only."
        ) from None


class _BatchSizeConsensus:
    """What the processes tell each other between two attempts."""

    def __init__(self) -> None:
        # Set up before the first attempt: after it, a peer may be somewhere else. A process that is in no run yet may
        # join one during the attempt, and is asked again.
        self._group = _consensus_group()

    def all_fit(self, fitted: bool, batch_size: int) -> bool:
        """Whether the attempt fitted on every process."""
        if self._group.size == 1:
            self._group = _consensus_group()
        if fitted or self._group.size == 1:
            return self.min(int(fitted)) == 1
        # Usually the others come within moments, and there is nothing to say.
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
        """The smallest of the processes' numbers."""
        try:
            return min(self._group.all_gather_object(number))
        except RuntimeError as error:
            raise RuntimeError(
                "the processes could not agree on a batch size, because one of them ended or never arrived. If one of "
                "them ran out of memory while others were already inside an operation that waited for it (DDP's "
                "gradients, a gather), none can be called back: start with a smaller batch size."
            ) from error


def _consensus_group() -> Collectives:
    return cpu_group("attempts at a batch size", _ATTEMPT_TIMEOUT)
