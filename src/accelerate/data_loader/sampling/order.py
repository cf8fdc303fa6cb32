"""The order of an epoch: the generator it is drawn from, its synchronization over ranks, and the position in it.

`LookaheadSampler` wraps a sampler so that the last batch can be identified when it is yielded: by the length where that is
exact, else by drawing one batch of indices ahead (which fetches no data). It also records the `StepSizes` of each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ...runtime import rng, world
from ..batches.batch_sharding import StepSizes
from .samplers import SeedableRandomSampler, iter_with_step_sizes


class EpochOrder(Protocol):
    """Determines the order of an epoch when its first index is drawn."""

    def start(self) -> None:
        """Starts an epoch, whose order becomes the same on all ranks."""

    def state(self) -> Any:
        """Returns the state from which `restore` reproduces the order of the current epoch."""

    def restore(self, state: Any) -> None:
        """Replaces `start` for an epoch that is resumed."""


class GeneratorOrder:
    """An order drawn from a torch generator, whose state is copied from rank 0.

    Args:
        generator: The sampler's generator.
        reseed: Seed it from torch's default generator at each start, as a `RandomSampler` without a generator does, so
            that a shuffled loader yields the same batches before and after `prepare`, on any number of ranks.
        synchronize: Copy rank 0's state to the other ranks.
    """

    def __init__(self, generator: torch.Generator, reseed: bool, synchronize: bool) -> None:
        self.generator = generator
        self.reseed = reseed
        self.synchronize = synchronize

    def start(self) -> None:
        if self.reseed:
            self.generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        if self.synchronize:
            rng.synchronize_rng_states(["generator"], self.generator)

    def state(self) -> torch.Tensor:
        return self.generator.get_state()

    def restore(self, state: torch.Tensor) -> None:
        self.generator.set_state(state)


class SeededOrder:
    """The order of a `SeedableRandomSampler`, whose default seed is copied from rank 0.

    Args:
        sampler: The sampler.
        synchronize: Copy rank 0's seed, unless the user set one.
    """

    def __init__(self, sampler: SeedableRandomSampler, synchronize: bool) -> None:
        self.sampler = sampler
        self.synchronize = synchronize

    def start(self) -> None:
        if self.synchronize and not self.sampler.seed_is_shared:
            (self.sampler.initial_seed,) = world.current().collectives.broadcast_object_list(
                [self.sampler.initial_seed]
            )
            self.sampler.seed_is_shared = True

    def state(self) -> dict[str, int]:
        return {"seed": self.sampler.initial_seed, "epoch": self.sampler.epoch}

    def restore(self, state: dict[str, int]) -> None:
        self.sampler.initial_seed = state["seed"]
        self.sampler.epoch = state["epoch"]
        self.sampler.seed_is_shared = True


class IterationProgress:
    """Progress of one iteration over the indices.

    Attributes:
        total: Number of batches of indices; None until the last one has been drawn.
        step_sizes: Position (from 1) -> `StepSizes`, for steps that have them.
        short: Position -> number of indices, for batches that are not full.
        drawn: Number of batches yielded; not counted if `exact`.
        exact: Whether `total` is set from the start, no step has `StepSizes`, and no batch but the last is short.
    """

    __slots__ = ("drawn", "exact", "short", "step_sizes", "total")

    def __init__(self) -> None:
        self.total: int | None = None
        self.step_sizes: dict[int, StepSizes] = {}
        self.short: dict[int, int] = {}
        self.drawn = 0
        self.exact = False


class LookaheadSampler:
    """The sampler that torch's loader draws from: draws ahead of the loader, and records the progress.

    Args:
        sampler: Batch sampler or sampler.
        order: Determines the order of an epoch; None if the sampler does so by itself.
        ahead: Number of batches of indices to draw ahead.
        resumable: Return iterators that can save and restore their position (for torchdata).
        full: Indices in a full batch; None if batches have no fixed size.

    Attributes:
        progress: Progress of the iteration that was started last.
    """

    def __init__(
        self,
        sampler: Any,
        order: EpochOrder | None = None,
        ahead: int = 1,
        resumable: bool = False,
        full: int | None = None,
    ) -> None:
        self.sampler = sampler
        self.order = order
        self.ahead = ahead
        self.resumable = resumable
        self.full = full
        self.progress = IterationProgress()

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        self.progress = IterationProgress()
        if self.resumable:
            return ResumableIterator(self, self.progress)
        if self.order is None and (length := exact_length(self.sampler)) is not None:
            self.progress.total, self.progress.exact = length, True
            return iter(self.sampler)  # not wrapped: this runs once per batch, where every instruction counts
        return self.draw(self.progress)

    def draw(self, progress: IterationProgress, *, begun: bool = False, skip: int = 0) -> Iterator[Any]:
        """Yields the batches of indices, and records them in `progress`.

        Args:
            progress: The record.
            begun: Whether the order has been started already.
            skip: Number of batches to draw and count without yielding them.
        """
        if self.order is not None and not begun:
            self.order.start()
        source = enumerate(iter_with_step_sizes(self.sampler), 1)
        waiting: list[Any] = []
        full = self.full or 0
        for position, (indices, step_sizes) in source:
            if step_sizes is not None:
                progress.step_sizes[position] = step_sizes
            if full and len(indices) < full:
                progress.short[position] = len(indices)
            if position <= skip:
                progress.drawn = position
                continue
            waiting.append(indices)
            if len(waiting) > self.ahead:
                progress.drawn += 1
                yield waiting.pop(0)
        progress.total = progress.drawn + len(waiting)
        for indices in waiting:
            progress.drawn += 1
            yield indices


_EXACT = (
    SequentialSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    DistributedSampler,
    SeedableRandomSampler,
)


def exact_length(sampler: Any) -> int | None:
    """Returns the length of a sampler if it is exact, as with torch's own samplers; custom lengths may be estimates."""
    if type(sampler) is BatchSampler and type(sampler.sampler) in _EXACT:
        return len(sampler)
    return len(sampler) if type(sampler) in _EXACT else None


class ResumableIterator:
    """Iterator of a `LookaheadSampler` whose position torchdata can save and restore.

    The state consists of the state of the epoch's order and the number of batches yielded. Resuming draws the same order
    again and skips that many batches of indices, which fetches no data.
    """

    def __init__(self, sampler: LookaheadSampler, progress: IterationProgress) -> None:
        self._sampler = sampler
        self._progress = progress
        self._indices: Iterator[Any] | None = None
        self._order: Any = None

    def __iter__(self) -> ResumableIterator:
        return self

    def __next__(self) -> Any:
        if self._indices is None:
            if self._sampler.order is not None:
                self._sampler.order.start()
            self._begin(skip=0)
            assert self._indices is not None
        return next(self._indices)

    def _begin(self, skip: int) -> None:
        sampler = self._sampler
        self._order = None if sampler.order is None else sampler.order.state()
        self._indices = sampler.draw(self._progress, begun=True, skip=skip)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the last batch that was yielded."""
        return {"drawn": self._progress.drawn, "order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes after a position."""
        drawn = state["drawn"]
        if not drawn:
            return
        if state.get("order") is not None and self._sampler.order is not None:
            self._sampler.order.restore(state["order"])
        self._begin(skip=drawn)
