"""Variants of the loaders that derive from torchdata's `StatefulDataLoader`, which saves and restores their position.

Imported on use, because it needs torchdata.
"""

from __future__ import annotations

from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from ..runtime import world
from .dispatch import DataLoaderDispatcher
from .shard import DataLoaderShard, SkipDataLoader

ITERATION = "_iteration"
"""Key of the number of completed epochs, beside torchdata's keys."""
SAMPLE_SEED = "_sample_seed"
"""Key of the seed for reading samples."""


class _StatefulMixin:
    """Saves the position of the last batch that was yielded, regardless of batches read ahead."""

    _stateful = True

    def state_dict(self: Any) -> dict[str, Any]:
        """Returns the position after the last batch that was yielded."""
        if self._recorded_position is not None:
            state = self._recorded_position
        elif self._iterator is not None:
            state = StatefulDataLoader.state_dict(self)
        else:  # not started: torchdata would start an iteration now, and draw seeds
            state = self.next_iter_state or {}
        seeds = {} if self._sample_seeds is None else {SAMPLE_SEED: self._sample_seeds.seed}
        return {**state, ITERATION: self.iteration, **seeds}

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        """Resumes after the batch at which `state_dict` was saved, from the next iteration on.

        Args:
            state_dict: A result of `state_dict`, from the same rank of the same number of ranks.
        """
        state = dict(state_dict)
        self.iteration = state.pop(ITERATION, self.iteration)
        seed = state.pop(SAMPLE_SEED, None)
        if seed is not None and self._sample_seeds is not None:
            self._sample_seeds.seed = seed
        self._recorded_position = None
        self.next_iter_state = None
        StatefulDataLoader.load_state_dict(self, _with_position(state))

    def _get_iterator(self: Any) -> Any:
        if self.next_iter_state is None:
            return super()._get_iterator()  # type: ignore[misc]
        # The resumed epoch drew its seeds when it started: random states are not advanced again.
        own = None if self.generator is None else self.generator.get_state()
        with torch.random.fork_rng(devices=[]):
            iterator = super()._get_iterator()  # type: ignore[misc]
        if own is not None:
            self.generator.set_state(own)
        return iterator

    def _record_position(self: Any) -> None:
        self._recorded_position = StatefulDataLoader.state_dict(self)

    def _finish_epoch(self: Any) -> None:
        self._recorded_position = None
        super()._finish_epoch()  # type: ignore[misc]


def _with_position(state: dict[str, Any]) -> dict[str, Any]:
    """Returns a state with the position that torchdata counted, if the sampler kept none of its own."""
    if "_snapshot" in state and "_main_snapshot" in state["_snapshot"]:
        snapshot = state["_snapshot"]
        return {**state, "_snapshot": {**snapshot, "_main_snapshot": _with_position(snapshot["_main_snapshot"])}}
    if state.get("_sampler_iter_state") is None and state.get("_sampler_iter_yielded"):
        return {**state, "_sampler_iter_state": {"drawn": state["_sampler_iter_yielded"], "order": None}}
    return state


class StatefulDataLoaderShard(_StatefulMixin, DataLoaderShard, StatefulDataLoader):
    """A `DataLoaderShard` whose position can be saved."""

    def _synchronize_rng(self) -> None:
        if self.next_iter_state is None or self.next_iter_state.get("_iterator_finished"):
            super()._synchronize_rng()  # otherwise the ranks were synchronized when the epoch started


class StatefulDataLoaderDispatcher(_StatefulMixin, DataLoaderDispatcher, StatefulDataLoader):
    """A `DataLoaderDispatcher` whose position can be saved. Only rank 0 reads, so only rank 0 has a position."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last step on rank 0, and the epoch only on other ranks."""
        return super().state_dict() if world.current().collectives.rank == 0 else {ITERATION: self.iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes after the step at which `state_dict` was saved, on rank 0 or on this rank."""
        if world.current().collectives.rank == 0:
            super().load_state_dict(state_dict)
        else:
            self.iteration = state_dict.get(ITERATION, self.iteration)


class StatefulSkipDataLoader(_StatefulMixin, SkipDataLoader, StatefulDataLoader):
    """A `SkipDataLoader` whose position can be saved."""


CLASSES: dict[type, type] = {
    DataLoaderShard: StatefulDataLoaderShard,
    DataLoaderDispatcher: StatefulDataLoaderDispatcher,
    SkipDataLoader: StatefulSkipDataLoader,
}
