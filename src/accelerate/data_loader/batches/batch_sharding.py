"""How batches are dealt to the ranks: pure arithmetic over index lists, all ranks at once, no process and no tensor.

One step of all ranks' loops together is a *round*. `shard_batches` and `shard_items` turn the index batches of one
sampler into rounds; a rank picks its part. What a step holds beyond the plain case is said by a `StepSizes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any, NamedTuple, TypeVar

_T = TypeVar("_T")
_END = object()


@dataclass(frozen=True)
class StepSizes:
    """What one step of all ranks holds, where that is not "every rank has the same number of rows, all of them data".

    Attributes:
        sizes: Rows each rank was given, padding included, in rank order. 0: that rank has no batch at this step, and
            has left its loop; such ranks are always the last ones.
        rows: How many rows are data. Concatenated in rank order, the first `rows` are data and the rest repeats
            samples (with `kept`, each rank's own first rows are).
        whole: `sizes` and `rows` count whole batches, because rows are unknown (a loader with ``batch_size=None``).
        kept: Rows of each rank that are data, where repeated ones may be in between: ranks that read shards of their own
            end in any order. None elsewhere.
    """

    sizes: tuple[int, ...]
    rows: int
    counts_batches: bool = False
    valid_rows: tuple[int, ...] | None = None

    @property
    def active_ranks(self) -> int:
        """How many ranks have a batch at this step: ranks 0 to ``active_ranks - 1``."""
        return sum(size > 0 for size in self.sizes)

    @property
    def ragged(self) -> bool:
        """Whether the ranks that have a batch may have different numbers of rows."""
        return self.counts_batches or len({size for size in self.sizes if size}) > 1

    @property
    def padded(self) -> bool:
        """Whether some rows repeat samples."""
        return self.rows < sum(self.sizes)


class ShardedStep(NamedTuple):
    """One round: each rank's part, and its `StepSizes` where it is not a plain one."""

    parts: list[list[Any]]
    step_sizes: StepSizes | None


def irregular_sizes(sizes: Iterable[int], rows: int) -> StepSizes | None:
    """The `StepSizes` of these sizes; None when every rank has as many rows and all are data."""
    sizes = tuple(sizes)
    return None if len(set(sizes)) == 1 and rows == sum(sizes) else StepSizes(sizes, rows)


def pad_cyclic(items: Sequence[_T], source: Sequence[_T], length: int) -> list[_T]:
    """`items`, brought to `length` with the items of `source`, over and over."""
    return [*items, *islice(cycle(source), max(0, length - len(items)))]


def split_evenly(items: list[_T], count: int) -> list[list[_T]]:
    """`items` cut into `count` parts of one size, which must divide them."""
    size = len(items) // count
    return [items[part * size : (part + 1) * size] for part in range(count)]


def grouped(items: Iterable[_T], size: int) -> Iterator[tuple[list[_T], bool]]:
    """Lists of `size` successive items (the last may be shorter), each with whether it is the last. Reads one item
    ahead."""
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
    """Deals index batches to ranks.

    Args:
        batches: The index batches of the whole data.
        ranks: How many parts.
        batch_size: Indices in a full batch; None where batches have no fixed size.
        split: Cut every batch into `ranks` parts; else each rank takes whole batches in turn.
        even: Repeat samples from the start, so that at the end every rank has as many as the others (a full batch each,
            or, without a fixed size, a batch each). False: the last ranks get fewer, or none.
        drop_last: Leave out what does not make a full round.

    Yields:
        One `ShardedStep` a round. A rank without a batch has an empty part; that happens in the last round only.
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
    # Refilled row by row only if the data stay in front, that is, if only the last batch can be short.
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
                f"the batch sampler says batch_size={batch_size} but gave a batch of {rows}, which cannot be split over "
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
    """Deals single items, each of which is a whole batch of unknown size, to ranks in turn.

    Args:
        items: What the sampler of a loader with ``batch_size=None`` gives, or such a dataset.
        ranks: How many parts.
        even: Repeat items from the start so that every rank has one in the last round.
        drop_last: Leave out an incomplete last round.

    Yields:
        One `ShardedStep` a round; a part is a list of one item, or empty. The `StepSizes` of an incomplete one counts whole
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
