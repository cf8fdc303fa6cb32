"""Built loaders: every sample is read as often as documented, and gathered exactly once, in the order of the data.

The ranks are simulated in one process; tests/processes/test_data_loader_gathering.py does the same with real ones.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from accelerate.data_loader import build_loader
from tests.unit.data_loader.simulate import Numbers, gathered, loop, plan, plans


def _expected(n: int, full: int, drop_last: bool) -> list[int]:
    return list(range(n - n % full if drop_last else n))


def _check_ends(by_rank: list[Any]) -> None:
    for seen in by_rank:
        assert [step.end for step in seen] == [False] * (len(seen) - 1) + [True] * bool(seen)


@given(
    n=st.integers(0, 50),
    ranks=st.integers(1, 4),
    rows_per_rank=st.integers(1, 4),
    drop_last=st.booleans(),
    split=st.booleans(),
    even=st.booleans(),
    stream=st.booleans(),
    dispatch=st.booleans(),
)
def test_gathered_once_in_order(
    n: int, ranks: int, rows_per_rank: int, drop_last: bool, split: bool, even: bool, stream: bool, dispatch: bool
) -> None:
    batch_size = rows_per_rank * ranks if split else rows_per_rank
    loader: DataLoader[Any] = DataLoader(
        Numbers(n) if stream else list(range(n)), batch_size=batch_size, drop_last=drop_last
    )
    settings = {"split_batches": split, "even_batches": even, "dispatch_batches": dispatch}
    loaders = [build_loader(plan) for plan in plans(loader, ranks, **settings)]
    by_rank = [loop(one) for one in loaders]

    full = rows_per_rank * ranks
    expected = _expected(n, full, drop_last)
    assert gathered(by_rank) == expected
    _check_ends(by_rank)

    times = Counter(row for seen in by_rank for step in seen for row in step.rows)
    assert sorted(times) == expected, "seen: all of them, and no others"
    total = sum(times.values())
    if drop_last or ranks == 1 or not n % full:
        assert total == len(expected), "nothing is repeated where nothing has to be completed"
    elif dispatch:
        assert total == -(-n // ranks) * ranks if n < full else n - n % full + -(-(n % full) // ranks) * ranks
    elif even:
        assert total == -(-n // full) * full, "repeated just as often as it takes to make full batches"
    else:
        assert total == n, "uneven: nothing is repeated"
    if even and not dispatch or drop_last:
        assert len({len(seen) for seen in by_rank}) == 1
    if not stream and (even or dispatch):
        assert [len(one) for one in loaders] == [len(seen) for seen in by_rank]


@given(
    lengths=st.lists(st.integers(1, 4), max_size=10),
    ranks=st.integers(1, 4),
    even=st.booleans(),
    dispatch=st.booleans(),
)
def test_a_custom_batch_sampler_of_varying_sizes(lengths: list[int], ranks: int, even: bool, dispatch: bool) -> None:
    numbers = iter(range(1000))
    batches = [[next(numbers) for _ in range(length)] for length in lengths]
    loader: DataLoader[Any] = DataLoader(list(range(sum(lengths))), batch_sampler=batches)  # type: ignore[arg-type]
    by_rank = [loop(build_loader(plan)) for plan in plans(loader, ranks, even_batches=even, dispatch_batches=dispatch)]
    assert gathered(by_rank) == list(range(sum(lengths)))
    _check_ends(by_rank)


@given(n=st.integers(0, 20), ranks=st.integers(1, 4), even=st.booleans(), stream=st.booleans())
def test_loaders_without_a_batch_size(n: int, ranks: int, even: bool, stream: bool) -> None:
    # Each item is a batch of two rows.
    loader: DataLoader[Any] = DataLoader(Numbers(n) if stream else range(n), batch_size=None, collate_fn=_two_rows)
    by_rank = [loop(build_loader(plan)) for plan in plans(loader, ranks, even_batches=even, dispatch_batches=False)]
    assert gathered(by_rank) == [row for item in range(n) for row in (2 * item, 2 * item + 1)]
    _check_ends(by_rank)


def _two_rows(item: int) -> Any:
    import torch

    return torch.tensor([2 * item, 2 * item + 1])


@given(n=st.integers(0, 30), ranks=st.integers(1, 4), even=st.booleans())
def test_a_batch_sampler_given_as_the_sampler(n: int, ranks: int, even: bool) -> None:
    sampler = BatchSampler(SequentialSampler(range(n)), 3, False)
    loader: DataLoader[Any] = DataLoader(_Rows(n), sampler=sampler, batch_size=None)
    by_rank = [loop(build_loader(plan)) for plan in plans(loader, ranks, even_batches=even)]
    assert gathered(by_rank) == list(range(n))
    _check_ends(by_rank)


class _Rows:
    """A dataset that is indexed by lists."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, rows: list[int]) -> Any:
        import torch

        return torch.tensor(rows)


@given(n=st.integers(0, 40), ranks=st.integers(1, 3), rows_per_rank=st.integers(1, 3), first=st.integers(0, 8))
def test_a_sampler_of_another_length_than_the_dataset(n: int, ranks: int, rows_per_rank: int, first: int) -> None:
    chosen = list(range(min(first, n), n))
    loader: DataLoader[Any] = DataLoader(list(range(n)), batch_size=rows_per_rank, sampler=chosen)  # type: ignore[arg-type]
    by_rank = [loop(build_loader(plan)) for plan in plans(loader, ranks)]
    assert gathered(by_rank) == chosen
    for seen in by_rank:
        assert all(step.remainder == len(chosen) % (rows_per_rank * ranks) for step in seen)


def test_a_custom_batch_sampler_is_kept() -> None:
    class Own(BatchSampler):
        pass

    sampler = RandomSampler(range(8))
    batches = Own(sampler, 2, False)
    loader = build_loader(plan(DataLoader(range(8), batch_sampler=batches), use_seedable_sampler=True, data_seed=0))
    assert loader.batch_sampler.batch_sampler is batches  # type: ignore[union-attr]
    assert type(batches.sampler).__name__ == "SeedableRandomSampler"
    drawing = Own(RandomSampler(range(8)), 2, False)
    build_loader(plan(DataLoader(range(8), batch_sampler=drawing)))
    assert type(drawing.sampler) is RandomSampler


def test_a_custom_sampler_is_kept() -> None:
    class Own(RandomSampler):
        pass

    sampler = Own(range(8))
    made = plan(DataLoader(range(8), sampler=sampler))
    loader = build_loader(made)
    assert loader.sampler is sampler
    assert loader.synchronized_generator is sampler.generator is not None  # type: ignore[attr-defined]


def test_sequential_order_is_kept() -> None:
    made = build_loader(plan(DataLoader(range(8), batch_size=2), ranks=1))
    assert type(made.sampler) is SequentialSampler


def test_arguments_of_torch_are_forwarded() -> None:
    def initialize(worker: int) -> None: ...

    options: dict[str, Any] = {
        "num_workers": 1,
        "persistent_workers": True,
        "prefetch_factor": 5,
        "timeout": 60,
        "worker_init_fn": initialize,
        "multiprocessing_context": "spawn",
        "collate_fn": list,
        "generator": torch.Generator(),
    }
    built = build_loader(plan(DataLoader(range(8), batch_size=2, **options)), "cpu")  # type: ignore[arg-type]
    context = options.pop("multiprocessing_context")
    assert built.multiprocessing_context.get_start_method() == context
    assert {name: getattr(built, name) for name in options} == options
