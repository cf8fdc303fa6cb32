"""The order of an epoch: which generator it is drawn from, how the ranks agree on it, where in it a loader stands.

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
    """Settles the order of an epoch when its first index is drawn."""

    def start(self) -> None:
        """Makes the order of the epoch that begins the same on all ranks."""

    def state(self) -> Any:
        """What `restore` needs to give the epoch that has begun the same order again."""

    def restore(self, state: Any) -> None:
        """Takes the place of `start` for an epoch that is resumed."""


class GeneratorOrder:
    """The order comes from a torch generator: rank 0's counts.

    Args:
        generator: The sampler's generator.
        reseed: Seed it from torch's default generator at each start, as a `RandomSampler` without a generator does. So
            a shuffled loader gives the same batches prepared and not, on one rank and on many.
        synchronise: Copy rank 0's state to the other ranks.
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
    """The order comes from a `SeedableRandomSampler`: a seed that nobody chose is rank 0's.

    Args:
        sampler: The sampler.
        synchronise: Take over rank 0's seed unless one was given.
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
    """What is known of one pass over the indices.

    Attributes:
        total: How many batches of indices there are; None until the last one has been drawn.
        rounds: Position (from 1) -> `StepSizes`, for the steps that have one.
        short: Position -> number of indices, for the batches that are not full ones.
        drawn: How many have been handed out; not counted where `exact`.
        exact: `total` was known beforehand, no step has a `StepSizes`, and none but the last is short.
    """

    __slots__ = ("drawn", "exact", "short", "step_sizes", "total")

    def __init__(self) -> None:
        self.total: int | None = None
        self.step_sizes: dict[int, StepSizes] = {}
        self.short: dict[int, int] = {}
        self.drawn = 0
        self.exact = False


class LookaheadSampler:
    """A sampler as torch's loader draws from it.

    Args:
        sampler: Batch sampler or sampler.
        order: Settles the epoch's order; None where nothing has to be settled.
        ahead: How many batches of indices are drawn ahead.
        resumable: Hand out iterators that can save and restore their position (for torchdata).
        full: Indices in a full batch; None where batches have no fixed size.

    Attributes:
        track: What is known of the pass that was begun last.
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
            return iter(self.sampler)  # nothing stands between: this runs once a batch, and every instruction counts
        return self.draw(self.progress)

    def draw(self, progress: IterationProgress, *, begun: bool = False, skip: int = 0) -> Iterator[Any]:
        """The indices, `progress` telling what is known of them.

        Args:
            begun: The order has been settled.
            skip: Leave out that many batches, but count them.
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
    """The length of a sampler that is known to keep to it: torch's own. Others' lengths may be estimates."""
    if type(sampler) is BatchSampler and type(sampler.sampler) in _EXACT:
        return len(sampler)
    return len(sampler) if type(sampler) in _EXACT else None


class ResumableIterator:
    """The indices of an `LookaheadSampler`, with a position to save and restore. torchdata calls these methods.

    A state holds how the epoch's order came about and how many batches were handed out; going on means drawing the same
    order again and passing over that many batches of indices, which fetches no data.
    """

    def __init__(self, stream: LookaheadSampler, progress: IterationProgress) -> None:
        self._stream = stream
        self._progress = progress
        self._indices: Iterator[Any] | None = None
        self._order: Any = None

    def __iter__(self) -> ResumableIterator:
        return self

    def __next__(self) -> Any:
        if self._indices is None:
            if self._stream.order is not None:
                self._stream.order.start()
            self._begin(skip=0)
            assert self._indices is not None
        return next(self._indices)

    def _begin(self, skip: int) -> None:
        stream = self._stream
        self._order = None if stream.order is None else stream.order.state()
        self._indices = stream.draw(self._progress, begun=True, skip=skip)

    def state_dict(self) -> dict[str, Any]:
        """The position of the batch that was handed out last."""
        return {"drawn": self._progress.drawn, "order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind the position that `state` names."""
        drawn = state["drawn"]
        if not drawn:
            return
        if state.get("order") is not None and self._stream.order is not None:
            self._stream.order.restore(state["order"])
        self._begin(skip=drawn)
