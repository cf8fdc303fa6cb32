"""`DataLoaderShard`, which reads one rank's shard, and `SkipDataLoader`, which skips batches of a plain loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..runtime import rng
from ..runtime.devices import with_index
from ..settings.enums import RNGType
from .base import DataLoaderAdapter, make_transfer_fn
from .iterable import StreamShard
from .stream_shards import LockstepReader


class DataLoaderShard(DataLoaderAdapter):
    """A torch `DataLoader` that yields this rank's shard of the data, on its device.

    At the start of each iteration it synchronizes random orders between the ranks; while it is iterated over, it is the
    active loader of `GradientState`. `prepare_data_loader` builds one from a plain loader.

    Args:
        dataset: The dataset; of an iterable one, this rank's shard (`IterableDatasetShard`).
        device: Where batches are moved; None leaves them.
        rng_types: Random states to copy from rank 0 at the start of each iteration: ``"generator"``
            (`synchronized_generator`), ``"torch"``, ``"cuda"`` …
        synchronized_generator: The generator that the sampler, batch sampler or dataset draws from.
        skip_batches: Number of batches to skip at the start; those of a map-style dataset are not fetched.
        use_stateful_dataloader: Derive from torchdata's `StatefulDataLoader` as well, whose position can be saved.
        _drop_last: The original loader drops an incomplete last batch.
        _non_blocking: Copy to the device asynchronously.
        torch_device_mesh: The device mesh, if there is one.
        iteration: Epoch of the first iteration.
        **kwargs: As for `torch.utils.data.DataLoader`.

    Attributes:
        end_of_dataloader, remainder, step_sizes: State of the loop; see `DataLoaderStateMixin`.
        iteration: Number of epochs that have been completed.
    """

    def __init__(
        self,
        dataset: Any,
        device: torch.device | str | int | None = None,
        rng_types: Iterable[str | RNGType] | None = None,
        synchronized_generator: torch.Generator | None = None,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        torch_device_mesh: Any = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        self.device = None if device is None else with_index(device)
        self.rng_types = None if rng_types is None else list(rng_types)
        self.synchronized_generator = synchronized_generator
        self._non_blocking = _non_blocking
        self.torch_device_mesh = torch_device_mesh
        super().__init__(
            dataset,
            use_stateful_dataloader=use_stateful_dataloader,
            skip_batches=skip_batches,
            iteration=iteration,
            _drop_last=_drop_last,
            **kwargs,
        )

    def _epoch(self) -> Iterator[Any]:
        self._begin_epoch()
        self._synchronize_rng()
        batches = self._batches()
        move = make_transfer_fn(self.device, self._non_blocking)
        return batches if move is None else map(move, batches)

    def _iterable_batches(self) -> Iterator[Any]:
        if not isinstance(self.dataset, StreamShard):
            yield from super()._iterable_batches()
            return
        reader = LockstepReader(self.torch_iterator(), self.dataset.batch_size, self._position)
        for step in reader.steps(self._batches_to_skip()):
            self._recorded_position = step.position
            self.end_of_dataloader = step.last
            self._update_step_sizes(step.step_sizes)
            yield step.batch
        self._record_position()

    def _position(self) -> Any:
        self._record_position()
        return self._recorded_position

    def _synchronizes_generator(self) -> bool:
        return RNGType.GENERATOR in map(RNGType, self.rng_types or ())

    def _synchronize_rng(self) -> None:
        # `GeneratorOrder` synchronizes the generator of a map-style dataset's sampler, when the first index is drawn.
        types: list[RNGType] = [kind for kind in map(RNGType, self.rng_types or ()) if kind is not RNGType.GENERATOR]
        if self.is_iterable and self.synchronized_generator is not None and self._synchronizes_generator():
            types.append(RNGType.GENERATOR)
        if types:
            rng.synchronize_rng_states(types, self.synchronized_generator)


class SkipDataLoader(DataLoaderAdapter):
    """A plain loader without its first batches, for a dataset whose batches cannot be selected.

    Args:
        dataset: The dataset.
        skip_batches: Number of batches to skip.
        use_stateful_dataloader: Derive from torchdata's `StatefulDataLoader` as well.
        **kwargs: As for `torch.utils.data.DataLoader`.
    """

    def __init__(
        self, dataset: Any, skip_batches: int = 0, use_stateful_dataloader: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(dataset, use_stateful_dataloader=use_stateful_dataloader, skip_batches=skip_batches, **kwargs)
