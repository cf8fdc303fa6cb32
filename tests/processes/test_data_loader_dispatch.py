"""The dispatcher on real ranks: what it carries, how it fails, how it is left."""

from __future__ import annotations

import datetime
import pickle
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from accelerate.data_loader import ReadingRankError, gather_for_metrics, prepare_data_loader, skip_first_batches
from accelerate.data_loader.batches.batch_broadcast import BatchBroadcaster
from accelerate.data_loader.dispatch import select_host_collectives
from accelerate.runtime import world
from accelerate.runtime.collective_backend import TorchCollectives
from accelerate.runtime.cpu_groups import cpu_group
from accelerate.state import GradientState, PartialState

Sample = namedtuple("Sample", ["ids", "text"])


def dispatched(dataset: Any, **options: Any) -> Any:
    arguments = {name: options.pop(name) for name in ("split_batches", "slice_fn_for_dispatch") if name in options}
    return prepare_data_loader(DataLoader(dataset, **options), put_on_device=True, dispatch_batches=True, **arguments)


def _rank() -> int:
    return PartialState().process_index


class OnlyOnRank0:
    """Nobody else may look."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        assert _rank() == 0, "read on another rank"
        return {"ids": torch.full((index % 3 + 1,), index), "text": f"sample {index}", "weight": index / 2}


def _ragged(samples: list[Any]) -> Any:
    width = max(len(sample["ids"]) for sample in samples)
    return {
        "ids": torch.stack(
            [torch.nn.functional.pad(sample["ids"], (0, width - len(sample["ids"]))) for sample in samples]
        ),
        "texts": [sample["text"] for sample in samples],
        "pairs": Sample(torch.tensor([sample["weight"] for sample in samples]), tuple(s["text"] for s in samples)),
        "width": width,
        "nothing": None,
    }


def _carries_anything() -> list[Any]:
    loader = dispatched(OnlyOnRank0(10), batch_size=2, collate_fn=_ragged)
    state = GradientState()
    seen = []
    for batch in loader:
        assert isinstance(batch["pairs"], Sample)
        gathered = gather_for_metrics(batch["pairs"].ids, state).tolist()
        seen.append([batch["ids"][:, 0].tolist(), batch["texts"], batch["width"], list(batch["pairs"].text), gathered])
        batch["ids"].zero_()  # what a script does to its batch is its own affair
    return seen


def test_any_batch_arrives(run_ranks: Any) -> None:
    by_rank = run_ranks(2, _carries_anything)
    for rank, steps in enumerate(by_rank):
        for number, (ids, texts, width, pairs, gathered) in enumerate(steps):
            mine = [4 * number + 2 * rank, 4 * number + 2 * rank + 1] if number < 2 else [8 + rank]
            assert ids == mine
            assert texts == pairs == [f"sample {row}" for row in mine]
            assert number == 2 or width == max(row % 3 + 1 for row in mine)
            assert gathered == [row / 2 for row in range(4 * number, min(4 * number + 4, 10))]


def _all_at_once() -> list[Any]:
    """Cases that are cheap side by side; each leaves the line as it found it."""
    results: list[Any] = []
    # Loops that are left, on all ranks, and begun again.
    loader = dispatched(list(range(12)), batch_size=2)
    for _ in loader:
        break
    results.append([batch.tolist() for batch in loader])
    # One loop inside another, over the same line.
    inner = dispatched(list(range(4)), batch_size=1)
    results.append([[batch.tolist(), [one.tolist() for one in inner]] for batch in loader])
    # A copy has a line of its own.
    results.append([batch.tolist() for batch in pickle.loads(pickle.dumps(inner))])
    # Nothing at all.
    results.append(list(dispatched([], batch_size=2)))
    # A later start.
    results.append([batch.tolist() for batch in skip_first_batches(loader, 2)])
    return results


def test_loops_left_nested_empty_and_skipped(run_ranks: Any) -> None:
    for rank, (again, nested, copied, empty, later) in enumerate(run_ranks(2, _all_at_once)):
        steps = [[4 * step + 2 * rank, 4 * step + 2 * rank + 1] for step in range(3)]
        assert again == steps
        assert nested == [[step, [[rank], [2 + rank]]] for step in steps]
        assert copied == [[rank], [2 + rank]]
        assert empty == []
        assert later == steps[2:]


class Breaks(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        yield from range(5)
        raise OSError("sample 5 is on a bad sector")


class Odd:
    """A class of one's own."""


def _failures() -> list[Any]:
    results: list[Any] = []
    for loader in (
        dispatched(Breaks(), batch_size=1),
        dispatched(list(range(8)), batch_size=2, collate_fn=lambda samples: None),
        dispatched(list(range(8)), batch_size=2, collate_fn=lambda samples: {"odd": Odd()}),
        dispatched(
            list(range(8)),
            batch_size=2,
            split_batches=True,
            collate_fn=lambda samples: {"x": torch.tensor(samples), "w": torch.ones(3)},
        ),
    ):
        seen = []
        try:
            for batch in loader:
                seen.append(batch.tolist())
        except Exception as error:
            results.append([seen, type(error).__name__, str(error)])
        assert not GradientState().in_dataloader
    # Failing is no end: the line can be used again.
    results.append([batch.tolist() for batch in dispatched(list(range(4)), batch_size=2)])
    return results


def test_a_failure_on_rank_0_is_one_of_all_ranks(run_ranks: Any) -> None:
    by_rank = run_ranks(2, _failures)
    expected = [
        ([[0], [2]], "OSError", "sample 5 is on a bad sector"),
        ([], "TypeError", "the loader returned None as a batch"),
        ([], "CannotDispatchError", "Odd"),
        ([], "BatchSlicingError", "different numbers of rows"),
    ]
    for rank, results in enumerate(by_rank):
        *failures, afterwards = results
        for (seen, kind, text), (first, original, says) in zip(failures, expected, strict=True):
            assert seen == [[row + rank for row in batch] for batch in first]
            assert kind == (original if rank == 0 else ReadingRankError.__name__)
            assert says in text
            assert original in text or rank == 0
        assert afterwards == [[2 * rank, 2 * rank + 1]]


def _by_columns(batch: Any, bounds: slice, process_index: int, num_processes: int) -> Any:
    return {"x": batch["x"][:, bounds], "of": (process_index, num_processes)}


def _sliced() -> Any:
    loader = dispatched(
        list(range(4)),
        batch_size=4,
        split_batches=True,
        collate_fn=lambda samples: {"x": torch.arange(16).reshape(4, 4)},
        slice_fn_for_dispatch=_by_columns,
    )
    return [[batch["x"].tolist(), batch["of"]] for batch in loader]


def test_a_slice_function_cuts(run_ranks: Any) -> None:
    for rank, steps in enumerate(run_ranks(2, _sliced)):
        columns = torch.arange(16).reshape(4, 4)[:, 2 * rank : 2 * rank + 2].tolist()
        assert steps == [[columns, (rank, 2)]]


def _resumed() -> list[Any]:
    def make() -> Any:
        return prepare_data_loader(
            DataLoader(list(range(14)), batch_size=2, shuffle=True),
            put_on_device=True,
            dispatch_batches=True,
            use_stateful_dataloader=True,
        )

    torch.manual_seed(_rank())
    loader, seen, states = make(), [], []
    for batch in loader:
        seen.append(batch.tolist())
        states.append(loader.state_dict())
    resumed = make()
    resumed.load_state_dict(states[1])
    return [seen, [batch.tolist() for batch in resumed]]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
def test_a_position_is_rank_0s(run_ranks: Any) -> None:
    pytest.importorskip("torchdata")
    by_rank = run_ranks(2, _resumed)
    for seen, rest in by_rank:
        assert rest[:-1] == seen[2:-1], "the last step is completed with other rows: those from where it was resumed"
        assert len(rest) == len(seen) - 2
    assert sorted(row for seen, _ in by_rank for batch in seen[:-1] for row in batch) != list(range(12)), "shuffled"


def _words_apart() -> list[Any]:
    """Batches as they arrive where tensors travel between devices and headers between hosts."""
    collectives = world.join(cpu=True).collectives
    elsewhere = TorchCollectives(torch.device("meta"))
    on_host = select_host_collectives(elsewhere)
    assert on_host is not None and on_host.device.type == "cpu" and select_host_collectives(collectives) is None
    on_host = cpu_group("dispatched batches", datetime.timedelta(minutes=1))  # as beside NCCL alone
    broadcaster = BatchBroadcaster(collectives, staged=True, host_collectives=on_host)
    got: list[Any] = []
    for rows in (2, 2, 5):
        batch = {"x": torch.arange(rows), "name": "a"}
        if collectives.rank == 0:
            broadcaster.send(broadcaster.pack([batch, batch], rows, None, rows == 5))
        else:
            step = broadcaster.receive(1)
            assert step is not None
            got.append((step.batch["x"].tolist(), step.batch["name"], step.rows, step.last))
    return got


def test_headers_and_tensors_in_groups_of_their_own(run_ranks):
    _, got = run_ranks(2, _words_apart)
    assert got == [([0, 1], "a", 2, False)] * 2 + [([0, 1, 2, 3, 4], "a", 5, True)]
