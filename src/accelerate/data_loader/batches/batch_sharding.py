"""Shards index batches over the ranks: pure arithmetic over lists of indices, for all ranks at once.

`shard_batches` and `shard_items` turn the index batches of one sampler into steps of all ranks, of which each rank takes
its own shard. `StepSizes` describes a step whose shards differ in size or are padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, cycle, islice
from typing import Any, NamedTuple, TypeVar

_T = TypeVar("_T")
_END = object()


@dataclass(frozen=True)
class StepSizes:
    """Sizes of one step of all ranks, if the ranks' sizes differ or some rows are padding.

    Attributes:
        sizes: Rows of each rank, padding included, in rank order. 0: the rank has no batch at this step and has left its
            loop; such ranks are always the last ones.
        rows: Number of rows that are data. Concatenated in rank order, the first `rows` are data and the others repeat
            samples (with `valid_rows`, the first rows of each rank are data).
        counts_batches: `sizes` and `rows` count batches, because rows are unknown (a loader with ``batch_size=None``).
        valid_rows: Number of rows of each rank that are data, if padding may lie in between: ranks that read shards of
            their own end in any order. None otherwise.
    """

    sizes: tuple[int, ...]
    rows: int
    counts_batches: bool = False
    valid_rows: tuple[int, ...] | None = None

    @property
    def active_ranks(self) -> int:
        """Number of ranks with a batch at this step: ranks 0 to ``active_ranks - 1``."""
        return sum(size > 0 for size in self.sizes)

    @property
    def ragged(self) -> bool:
        """Whether numbers of rows may differ between the ranks that have a batch."""
        return self.counts_batches or len({size for size in self.sizes if size}) > 1

    @property
    def padded(self) -> bool:
        """Whether some rows repeat samples."""
        return self.rows < sum(self.sizes)

    def drop_padding(self, parts: list[Any]) -> list[Any]:
        """Drops the rows that repeat samples.

        Args:
            parts: Tensors, lists or tuples with a row per sample, one for each rank with a batch at this step.
        """
        if self.counts_batches:
            return parts[: self.rows]
        if self.valid_rows is not None:
            return [part[:rows] for part, rows in zip(parts, self.valid_rows, strict=True)]
        if not self.padded:
            return parts
        ends = accumulate(map(len, parts), initial=0)
        return [part[: max(0, self.rows - end)] for part, end in zip(parts, ends, strict=False)]


class ShardedStep(NamedTuple):
    """One step of all ranks: the shard of each rank, and the `StepSizes` unless all are full."""

    parts: list[list[Any]]
    step_sizes: StepSizes | None


def irregular_sizes(sizes: Iterable[int], rows: int) -> StepSizes | None:
    """Returns the `StepSizes` of a step; None if all ranks have the same number of rows and none is padding."""
    sizes = tuple(sizes)
    return None if len(set(sizes)) == 1 and rows == sum(sizes) else StepSizes(sizes, rows)


def pad_cyclic(items: Sequence[_T], source: Sequence[_T], length: int) -> list[_T]:
    """Pads `items` to `length` with the items of `source`, repeated as often as needed."""
    return [*items, *islice(cycle(source), max(0, length - len(items)))]


def split_evenly(items: list[_T], count: int) -> list[list[_T]]:
    """Splits `items` into `count` lists of equal length; `count` must divide their number."""
    size = len(items) // count
    return [items[part * size : (part + 1) * size] for part in range(count)]


def grouped(items: Iterable[_T], size: int) -> Iterator[tuple[list[_T], bool]]:
    """Yields lists of `size` successive items (the last may be shorter), each with whether it is the last.

    Reads one item ahead.
    """
    source = iter(items)
    upcoming: Any = next(source, _END)
    while upcoming is not _END:
        group = [upcoming, *islice(source, size - 1)]
        upcoming = next(source, _END)
        yield group, upcoming is _END


def shard_batches(
    batches: Iterable[Sequence[Any]],
    ranks: int,
    *,
    batch_size: int | None,
    split: bool = False,
    even: bool = True,
    drop_last: bool = False,
) -> Iterator[ShardedStep]:
    """Shards index batches over ranks.

    Args:
        batches: The index batches of the whole data.
        ranks: Number of ranks.
        batch_size: Indices in a full batch; None if batches have no fixed size.
        split: Split every batch into `ranks` shards; else distribute whole batches to the ranks in turn.
        even: Repeat samples from the start, so that all ranks have equal shards at the last step (full batches or,
            without a fixed size, one batch each). False: the last ranks get fewer rows, or none.
        drop_last: Drop an incomplete last step.

    Yields:
        One `ShardedStep` per step. The shard of a rank without a batch is empty, which happens at the last step only.
    """
    if ranks == 1:
        yield from (ShardedStep([list(batch)], None) for batch in batches)
    elif split:
        assert batch_size is not None and batch_size % ranks == 0
        yield from _split_batches(batches, ranks, batch_size, even, drop_last)
    else:
        yield from _distribute_batches(batches, ranks, batch_size, even, drop_last)


def _distribute_batches(
    batches: Iterable[Sequence[Any]], ranks: int, batch_size: int | None, even: bool, drop_last: bool
) -> Iterator[ShardedStep]:
    start: list[list[Any]] = []
    for group, last in grouped(map(list, batches), ranks):
        start = start or group
        rows = sum(map(len, group))
        if last:
            if drop_last and len(group) < ranks:
                return
            if not drop_last:
                group = _completed(group, start, ranks, batch_size, even)
        yield ShardedStep(group, irregular_sizes(map(len, group), rows))


def _completed(
    group: list[list[Any]], start: list[list[Any]], ranks: int, batch_size: int | None, even: bool
) -> list[list[Any]]:
    missing = ranks - len(group)
    if not even:
        return group + [[] for _ in range(missing)]
    # Padding row by row keeps the data in front only if no batch but the last is short.
    if (
        batch_size is not None
        and all(len(batch) == batch_size for batch in group[:-1])
        and len(group[-1]) <= batch_size
    ):
        rows = list(chain.from_iterable(group))
        return split_evenly(pad_cyclic(rows, list(chain.from_iterable(start)), ranks * batch_size), ranks)
    return pad_cyclic(group, start, ranks)


def _split_batches(
    batches: Iterable[Sequence[Any]], ranks: int, batch_size: int, even: bool, drop_last: bool
) -> Iterator[ShardedStep]:
    start: list[Any] = []
    rows_per_rank = batch_size // ranks
    for batch in map(list, batches):
        start = start or batch
        rows = len(batch)
        if rows > batch_size:
            raise ValueError(
                f"the batch sampler has batch_size={batch_size} but returned a batch of {rows}, which cannot be split over "
                f"{ranks} ranks without losing samples. Correct its batch_size, or use split_batches=False."
            )
        if rows < batch_size:
            if drop_last:
                continue
            if even:
                batch = pad_cyclic(batch, start, batch_size)
        parts = [batch[rank * rows_per_rank : (rank + 1) * rows_per_rank] for rank in range(ranks)]
        yield ShardedStep(parts, irregular_sizes(map(len, parts), rows))


def shard_items(
    items: Iterable[Any], ranks: int, *, even: bool = True, drop_last: bool = False
) -> Iterator[ShardedStep]:
    """Distributes items, each of which is a batch of unknown size, to the ranks in turn.

    Args:
        items: The items of the sampler of a loader with ``batch_size=None``, or of such a dataset.
        ranks: Number of ranks.
        even: Repeat items from the start so that every rank has one at the last step.
        drop_last: Drop an incomplete last step.

    Yields:
        One `ShardedStep` per step; a shard is a list of one item, or empty. The `StepSizes` of an incomplete step counts
        batches.
    """
    start: list[Any] = []
    for group, last in grouped(items, ranks):
        start = start or group
        if not last or len(group) == ranks:
            yield ShardedStep([[item] for item in group], None)
        elif not drop_last:
            held = pad_cyclic(group, start, ranks) if even else group
            sizes = (1,) * len(held) + (0,) * (ranks - len(held))
            yield ShardedStep(
                [[item] for item in held] + [[] for _ in range(ranks - len(held))], StepSizes(sizes, len(group), True)
            )
