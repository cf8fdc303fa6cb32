"""The loaders as torchdata `StatefulDataLoader`s: position in, position out. Imported only where torchdata is there."""

from __future__ import annotations

from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from ..runtime import world
from .dispatch import DataLoaderDispatcher
from .shard import DataLoaderShard, SkipDataLoader

ITERATION = "_iteration"
"""Key of the number of epochs gone through, beside torchdata's own."""
SAMPLE_SEED = "_sample_seed"
"""Key of the seed that samples are read with."""


class _StatefulMixin:
    """The position that belongs to the batch handed out last, whatever has been read ahead since."""

    _stateful = True

    def state_dict(self: Any) -> dict[str, Any]:
        """The position behind the batch that was handed out last."""
        if self._recorded_position is not None:
            state = self._recorded_position
        elif self._iterator is not None:
            state = StatefulDataLoader.state_dict(self)
        else:  # not begun: torchdata would begin now, and draw seeds
            state = self.next_iter_state or {}
        seeds = {} if self._sample_seeds is None else {SAMPLE_SEED: self._sample_seeds.seed}
        return {**state, ITERATION: self.iteration, **seeds}

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        """Resumes behind the batch that `state_dict` was taken at; takes effect at the next iteration.

        Args:
            state_dict: What `state_dict` gave, on the same rank of as many ranks.
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
        # The epoch that is resumed drew its seeds when it began: random states go on as they are.
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
    """A state whose sampler kept no position of its own, with the one torchdata counted."""
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
            super()._synchronize_rng()  # else the ranks were brought together when the epoch began


class StatefulDataLoaderDispatcher(_StatefulMixin, DataLoaderDispatcher, StatefulDataLoader):
    """A `DataLoaderDispatcher` whose position can be saved. Only rank 0 reads, so only its position counts."""

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last step, as rank 0 knows it; the other ranks know the epoch only."""
        return super().state_dict() if world.current().collectives.rank == 0 else {ITERATION: self.iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes behind the step that `state_dict` was taken at, from rank 0's state or the rank's own."""
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
