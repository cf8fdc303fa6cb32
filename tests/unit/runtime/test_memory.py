"""Batch sizes that fit one process, what counts as out of memory, and letting go of objects."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from accelerate.runtime.memory import (
    clear_device_cache,
    find_executable_batch_size,
    release_memory,
    should_reduce_batch_size,
)
from tests.helpers.behaviors import outputs


def fitting(limit: int, tried: list[int], message: str = "CUDA out of memory.") -> Callable[[int], int]:
    def attempt(batch_size: int) -> int:
        tried.append(batch_size)
        if batch_size > limit:
            raise RuntimeError(message)
        return batch_size

    return attempt


def test_sizes_are_halved() -> None:
    """A decided difference: the observed sizes went down by a tenth, the documented ones are halved."""
    tried: list[int] = []
    assert find_executable_batch_size(fitting(30, tried), starting_batch_size=100)() == 25
    assert tried == [100, 50, 25]
    assert outputs("find_executable_batch_size")[0]["sequence"][:3] == [100, 90, 81]


def test_nothing_fits() -> None:
    """The error is as observed; the sizes on the way are halved (see above)."""
    tried: list[int] = []
    with pytest.raises(RuntimeError, match=r"No executable batch size found: `attempt` .* from 128 down") as raised:
        find_executable_batch_size(fitting(0, tried))()
    assert type(raised.value).__name__ == outputs("find_executable_batch_size.exhaust")[0]["raises"]
    assert tried == [128, 64, 32, 16, 8, 4, 2, 1]
    with pytest.raises(RuntimeError, match="No executable batch size"):
        find_executable_batch_size(fitting(0, tried), starting_batch_size=0)()


@pytest.mark.parametrize("takes_the_present_one", [True, False])
def test_a_function_of_ones_own_gives_the_next_size(takes_the_present_one: bool) -> None:
    tried: list[int] = []
    last = 8

    def three_less() -> int:
        nonlocal last
        last -= 3
        return last

    attempt = fitting(2, tried, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …")
    smaller: Callable[..., int] = (lambda size: size - 3) if takes_the_present_one else three_less
    found = find_executable_batch_size(attempt, starting_batch_size=8, reduce_batch_size_fn=smaller)()
    assert [{"return": found, "sequence": tried}] == outputs("find_executable_batch_size.reduce_fn")


def test_the_next_size_must_be_smaller() -> None:
    with pytest.raises(ValueError, match="returned 8 after 8"):
        find_executable_batch_size(fitting(2, []), 8, lambda size: size)()


def test_the_caller_leaves_the_batch_size_out() -> None:
    @find_executable_batch_size(starting_batch_size=4)
    def g(batch_size: int, factor: int = 1, *, plus: int = 0) -> int:
        """Doc."""
        return batch_size * factor + plus

    assert (g(), g(2), g(factor=3, plus=1)) == (4, 8, 13)
    assert (g.__name__, g.__doc__) == ("g", "Doc.")
    for call in (lambda: g(128, 5), lambda: g(batch_size=128), lambda: g(wrong=1)):
        with pytest.raises(TypeError, match=r"`g` does not take .* without it"):
            call()
    assert outputs("find_executable_batch_size.args")[0]["raises"] == "TypeError"

    class Trainer:
        def train(self, batch_size: int, epochs: int) -> tuple[int, int]:
            return batch_size, epochs

    assert find_executable_batch_size(Trainer().train, starting_batch_size=2)(epochs=3) == (2, 3)


def test_other_errors_pass_at_once() -> None:
    tried: list[int] = []
    with pytest.raises(RuntimeError, match="shapes"):
        find_executable_batch_size(fitting(0, tried, "shapes do not match"))()
    assert tried == [128]


class Big:
    """Stands for a tensor: something that must be gone before the next attempt."""


def test_what_an_attempt_held_is_gone_before_the_next() -> None:
    alive: list[weakref.ref[Big]] = []

    @find_executable_batch_size(starting_batch_size=4)
    def attempt(batch_size: int) -> int:
        assert all(reference() is None for reference in alive)
        held = Big()
        cycle: list[Any] = [held]
        cycle.append(cycle)
        alive.append(weakref.ref(held))
        if batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch_size

    assert attempt() == 1
    assert len(alive) == 3


def test_what_counts_as_out_of_memory() -> None:
    """A decided difference: torch.OutOfMemoryError counts whatever its text; observed was only the text."""
    for message, expected in outputs("should_reduce_batch_size")[0].items():
        assert should_reduce_batch_size(RuntimeError(message)) is expected, message
    assert outputs("should_reduce_batch_size.OOMError") == [False]
    assert should_reduce_batch_size(torch.OutOfMemoryError("x"))
    assert should_reduce_batch_size(MemoryError())
    assert should_reduce_batch_size(RuntimeError("NPU out of memory. Tried to allocate"))
    assert not should_reduce_batch_size(ValueError("CUDA out of memory."))


def test_a_real_allocation_that_fails() -> None:
    @find_executable_batch_size(starting_batch_size=2**50, reduce_batch_size_fn=lambda size: size // 2**20)
    def allocate(batch_size: int) -> int:
        return torch.empty(batch_size, dtype=torch.uint8).numel()

    assert allocate() == 2**30


def test_release_memory() -> None:
    assert [release_memory(object(), object())] == outputs("release_memory")
    kept = Big()
    reference = weakref.ref(kept)
    kept, other = release_memory(kept, None)  # type: ignore[assignment]
    assert (kept, other, reference()) == (None, None, None)
    assert release_memory() == []


def test_clear_device_cache_collects_only_when_asked() -> None:
    gc.collect()
    gc.disable()
    try:
        held = Big()
        held.me = held  # type: ignore[attr-defined]
        reference = weakref.ref(held)
        del held
        clear_device_cache()
        assert reference() is not None
        clear_device_cache(garbage_collection=True)
        assert reference() is None
    finally:
        gc.enable()


class OutOfResources(Exception):
    """As Triton has it: no RuntimeError."""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 63.98 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("HIP error: out of memory"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
        RuntimeError("CUDA error: rocblas_status_memory_error when calling ..."),
        RuntimeError("NCCL error ... ncclUnhandledCudaError\nLast error:\nCuda failure 2 'out of memory'"),
        RuntimeError("Last error:\nCuda failure 'out of memory'"),
        RuntimeError("Last error:\nHIP failure: 'out of memory'"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        OutOfResources("out of resource: shared memory, Required: 262144, Hardware limit: 232448."),
        RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
        RuntimeError("Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)"),
        RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried to allocate 8"
        ),
        torch.cuda.OutOfMemoryError("whatever it says"),
    ],
    ids=str,
)
def test_out_of_memory_in_every_library(error: Exception) -> None:
    assert should_reduce_batch_size(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("No executable batch size found: `f` ran out of memory at every size from 8 down."),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        RuntimeError("Last error:\nCuda failure 700 'an illegal memory access was encountered'"),
        ValueError("CUDA out of memory"),
    ],
    ids=str,
)
def test_other_errors_are_not_about_memory(error: Exception) -> None:
    assert not should_reduce_batch_size(error)


def test_memory_of_the_cpu_really_runs_out() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 62, dtype=torch.uint8)
    assert should_reduce_batch_size(raised.value)
