"""Acceptance, with real ranks: streaming datasets of ``datasets``, of whose shards each rank reads its own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from accelerate.data_loader import ReadMode, gather_for_metrics, prepare_data_loader, skip_first_batches
from accelerate.state import GradientState, PartialState

datasets = pytest.importorskip("datasets")


def _samples(shards: list[tuple[int, int, str]]) -> Iterator[dict[str, int]]:
    """The samples ``100 * shard, …``; each one that is decoded is noted in the shard's file."""
    for shard, size, folder in shards:
        for i in range(size):
            if folder:
                with Path(folder, str(shard)).open("a") as file:
                    file.write(f"{i}\n")
            yield {"x": 100 * shard + i}


def _stream(sizes: list[int], folder: str = "") -> Any:
    shards = [(shard, size, folder) for shard, size in enumerate(sizes)]
    features = datasets.Features({"x": datasets.Value("int64")})
    return datasets.IterableDataset.from_generator(_samples, features=features, gen_kwargs={"shards": shards})


def _prepared(dataset: Any, batch_size: int, workers: int = 0, drop_last: bool = False, **options: Any) -> Any:
    loader: Any = DataLoader(dataset, batch_size=batch_size, num_workers=workers, drop_last=drop_last)
    options = {"dispatch_batches": False, "put_on_device": True, **options}
    return prepare_data_loader(loader, **options)


def _step(loader: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What this rank saw at a step, and what all gathered."""
    state, rank = GradientState(), PartialState().process_index
    x = batch.pop("x")  # the batch is the user's
    rows_per_rank = torch.full((), float(rank)).repeat(loader.full_rows)
    gathered, owners = gather_for_metrics((x, rows_per_rank), state)
    assert gather_for_metrics([str(row) for row in x.tolist()], state) == [str(row) for row in gathered.tolist()]
    members = gather_for_metrics((x, [str(row) for row in x.tolist()]), state)
    assert members[1] == [str(row) for row in gathered.tolist()] == [str(row) for row in members[0].tolist()]
    seen = {"own": x.tolist(), "gathered": gathered.tolist(), "owners": owners.tolist()}
    x.fill_(-1)
    return {**seen, "end": state.end_of_dataloader}


def _epoch(loader: Any) -> list[dict[str, Any]]:
    return [_step(loader, batch) for batch in loader]


def _expected(sizes: list[int]) -> list[int]:
    return [100 * shard + i for shard, size in enumerate(sizes) for i in range(size)]


def _gathered(steps: list[dict[str, Any]]) -> list[int]:
    return sorted(row for step in steps for row in step["gathered"])


def _opened(folders: list[str]) -> list[int]:
    """Two epochs of each rank with its own folder."""
    rank = PartialState().process_index
    loader = _prepared(_stream([5, 3, 4, 0, 7], folders[rank]), 2)
    for _ in range(2):
        for _ in loader:
            pass
    return [len(path.read_text().splitlines()) for path in sorted(Path(folders[rank]).iterdir())]


def test_each_rank_decodes_only_its_shards(run_ranks: Any, tmp_path: Path) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    decoded = run_ranks(2, _opened, [str(folder) for folder in folders])
    assert [sorted(path.name for path in folder.iterdir()) for folder in folders] == [["0", "1", "2"], ["4"]]
    assert decoded == [[10, 6, 8], [14]]


def _cases(ranks: int) -> list[dict[str, Any]]:
    draw = random.Random(ranks)
    cases: list[dict[str, Any]] = [
        {"sizes": [0] * ranks},
        {"sizes": [1] + [0] * ranks},
        {"sizes": [0] * ranks + [1]},
        {"sizes": [0] * ranks + [9], "batch_size": 2},
        {"sizes": [4] * ranks, "batch_size": 2},
        {"sizes": [4] * (2 * ranks + 1), "batch_size": 4 * ranks, "split_batches": True},
        {"sizes": [3] * (ranks - 1)},  # fewer shards than ranks
        {"sizes": [3, 5, 0, 2], "batch_size": 2, "even_batches": False},
        {"sizes": [3, 5, 0, 2], "batch_size": 2, "drop_last": True},
    ]
    for number in range(40):
        split, rows_per_rank = draw.random() < 0.3, draw.randint(1, 4)
        sizes = [draw.choice([0, 1, 2, 3, 5, 9]) for _ in range(draw.randint(ranks, 3 * ranks))]
        cases.append({"sizes": sizes, "batch_size": rows_per_rank * (ranks if split else 1), "split_batches": split})
        if number % 10 == 0:
            cases[-1]["workers"] = 2
    return cases


def _observed(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        options = {"batch_size": 1, **case}
        loader = _prepared(_stream(options.pop("sizes")), **options)
        results.append(
            {
                "reading": loader._plan.read_mode,
                "steps": _epoch(loader),
                "again": [step["own"] for step in _epoch(loader)],
            }
        )
    return results


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_sample_is_gathered_once_in_steps_of_all_ranks(run_ranks: Any, ranks: int) -> None:
    cases = _cases(ranks)
    by_rank = run_ranks(ranks, _observed, cases, timeout=300)
    for number, case in enumerate(cases):
        results = [observed[number] for observed in by_rank]
        whole = case.get("even_batches") is False or case.get("drop_last") or len(case["sizes"]) < ranks
        assert {result["reading"] for result in results} == {ReadMode.SHARD if whole else ReadMode.OWN_SHARDS}, case
        steps = results[0]["steps"]
        expected = _expected(case["sizes"])
        if case.get("drop_last"):
            expected = expected[: len(expected) // (2 * ranks) * 2 * ranks]
        assert _gathered(steps) == expected, case
        assert all(len(step["owners"]) == len(step["gathered"]) for step in steps), case
        if whole:
            continue
        rows_per_rank = case.get("batch_size", 1) // (ranks if case.get("split_batches") else 1)
        for result in results:
            own = result["steps"]
            assert [step["end"] for step in own] == [False] * (len(steps) - 1) + [True] * bool(steps), case
            assert all(len(step["own"]) == rows_per_rank for step in own), case
            assert [step["gathered"] for step in own] == [step["gathered"] for step in steps], case
            assert result["again"] == [step["own"] for step in own], case


def _resumed(sizes: list[int], batch_size: int, stateful: bool, workers: int) -> list[Any]:
    """A whole epoch, and the rest of it from each step on."""

    def make() -> Any:
        return _prepared(_stream(sizes), batch_size, workers, use_stateful_dataloader=stateful)

    loader = make()
    whole, states = [], []
    for batch in loader:
        whole.append(_step(loader, batch))
        states.append(loader.state_dict() if stateful else None)
    rests = []
    for taken, state in enumerate(states, 1):
        later = make()
        if stateful:
            later.load_state_dict(state)
        rest = later if stateful else skip_first_batches(later, taken)
        rests.append([_epoch(rest), _epoch(later)])
    return [whole, rests]


@pytest.mark.parametrize(("stateful", "workers"), [(False, 0), (True, 0), (True, 2)])
def test_an_epoch_is_resumed_in_its_middle(run_ranks: Any, stateful: bool, workers: int) -> None:
    if stateful:
        pytest.importorskip("torchdata")
    sizes = [3, 0, 1, 0, 9, 2]
    for whole, rests in run_ranks(2, _resumed, sizes, 2, stateful, workers, timeout=300):
        assert _gathered(whole) == _expected(sizes)
        for taken, (rest, following) in enumerate(rests, 1):
            assert [step["gathered"] for step in rest] == [step["gathered"] for step in whole[taken:]]
            assert [step["end"] for step in rest] == [step["end"] for step in whole[taken:]]
            if not stateful:
                assert [step["own"] for step in rest] == [step["own"] for step in whole[taken:]]
            assert _gathered(following) == _expected(sizes)


def _shuffled(workers: int) -> list[Any]:
    dataset = _stream([4, 6, 2, 5]).shuffle(seed=3, buffer_size=3)
    loader = _prepared(dataset, 2, workers)
    epochs = [_epoch(loader) for _ in range(2)]
    dataset.set_epoch(0)  # the user's word stands
    epochs.append(_epoch(loader))
    return [_gathered(epoch) for epoch in epochs], [[step["own"] for step in epoch] for epoch in epochs]


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_are_shuffled_in_their_own_way(run_ranks: Any, workers: int) -> None:
    for gathered, orders in run_ranks(2, _shuffled, workers):
        assert gathered == [_expected([4, 6, 2, 5])] * 3
        assert orders[0] != orders[1]
        assert orders[2] == orders[0]


def _choosing() -> list[list[int]]:
    stream = _stream([2, 9, 4])
    others = datasets.interleave_datasets([_stream([2, 3]), _stream([4, 5])])
    return [_gathered(_epoch(_prepared(dataset, 2))) for dataset in (stream.take(10), stream.skip(4), others)]


def test_samples_chosen_by_their_place_in_the_stream_stay_the_same(run_ranks: Any) -> None:
    whole = _expected([2, 9, 4])
    others = sorted(row["x"] for row in datasets.interleave_datasets([_stream([2, 3]), _stream([4, 5])]))
    assert run_ranks(2, _choosing)[0] == [whole[:10], whole[4:], others]


def _failing() -> tuple[int, str]:
    def samples(shards: list[int]) -> Iterator[dict[str, int]]:
        for shard in shards:
            yield from ({"x": i} for i in range(4))
            if shard == 1:
                raise OSError("shard 1 ends too early")

    loader = _prepared(datasets.IterableDataset.from_generator(samples, gen_kwargs={"shards": [0, 1]}), 2)
    steps = 0
    try:
        for _ in loader:
            steps += 1
    except (OSError, RuntimeError) as error:
        return steps, str(error)
    return steps, ""


def test_a_failure_to_read_is_raised_on_all_ranks(run_ranks: Any) -> None:
    (steps, told), (also, own) = run_ranks(2, _failing)
    assert steps == also == 2
    assert "rank 1 failed to read its shards" in told
    assert "shard 1 ends too early" in own


def _left_early() -> list[int]:
    loader = _prepared(_stream([8, 12]), 2)
    for _ in loader:
        break
    return _gathered(_epoch(loader))


def test_a_loop_can_be_left_early_on_all_ranks(run_ranks: Any) -> None:
    assert run_ranks(2, _left_early) == [_expected([8, 12])] * 2


def _out_of_step() -> str:
    loader = _prepared(_stream([8, 12]), 2)
    if PartialState().process_index == 0:
        next(iter(loader))
    try:
        for _ in loader:
            pass
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_at_different_steps_are_noticed(run_ranks: Any) -> None:
    for told in run_ranks(2, _out_of_step):
        assert "the ranks are at different steps" in told
