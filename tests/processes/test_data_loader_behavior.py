"""The recorded behaviors of prepared loaders on two and three ranks, against ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from accelerate.data_loader import gather_for_metrics, prepare_data_loader, skip_first_batches
from accelerate.state import GradientState, PartialState
from tests.processes.data_loader_cases import observe

FACTS = json.loads((Path(__file__).parents[1] / "data" / "data_loader_behavior.json").read_text())

NAMES = ("prepare_dataloader.map", "prepare_dataloader.iterable")


def _case(fact: dict[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in fact["input"].items() if name != "P"}
    return {**options, "iterable": fact["name"].endswith("iterable")}


def _is_sharded_stream(fact: dict[str, Any]) -> bool:
    return fact["name"].endswith("iterable") and fact["input"].get("dispatch_batches") is False


@pytest.mark.parametrize("ranks", [2, 3])
def test_prepared_loaders_give_what_was_recorded(run_ranks: Any, ranks: int) -> None:
    facts = [fact for fact in FACTS if fact["name"] in NAMES and fact["input"]["P"] == ranks]
    assert len(facts) >= 9
    by_rank = run_ranks(ranks, observe, [_case(fact) for fact in facts])
    for number, fact in enumerate(facts):
        ours = [results[number] for results in by_rank]
        if "all_ranks" in fact["output"]:
            assert ours == [fact["output"]["all_ranks"]] * ranks, fact["input"]
            continue
        for rank, recorded in enumerate(fact["output"]["per_rank"]):
            _compare(fact, recorded, ours[rank])


def _compare(fact: dict[str, Any], recorded: dict[str, Any], ours: dict[str, Any]) -> None:
    case = fact["input"]
    if "len" in recorded:  # decided difference: of what comes, on each rank
        recorded = {**recorded, "len": len(recorded["batches[batch,end,remainder]"])}
    for name in ("type", "len", "total_batch_size", "total_dataset_length"):
        if name in recorded:
            assert ours[name] == recorded[name], (case, name)
    if "dataset" in recorded and _is_sharded_stream(fact):
        assert ours["dataset"] == recorded["dataset"], case
    batches, gathered = recorded["batches[batch,end,remainder]"], recorded["gather_for_metrics"]
    if _is_sharded_stream(fact):
        # Decided difference: the record gathers the samples that were repeated to fill the last round a second time.
        # Every sample is to come once, so the last step says how many there are (`remainder`), and gathering leaves out
        # the rest.
        rest = case["n"] % len(gathered[0])
        batches = [*batches[:-1], [*batches[-1][:2], rest or -1]]
        gathered = [*gathered[:-1], gathered[-1][: rest or None]]
    assert ours["batches"] == batches, case
    if case.get("even_batches") is False and not fact["name"].endswith("iterable"):
        # Decided difference: there gathering was not possible, here it is exact (rank 0 has every sample).
        step, everything = recorded["total_batch_size"], list(range(case["n"]))
        gathered = [everything[place * step : (place + 1) * step] for place in range(len(batches))]
    assert ours["gathered"] == gathered, case


def _gather_objects(n: int) -> list[Any]:
    state = GradientState()
    rank = PartialState().process_index
    loader = prepare_data_loader(DataLoader(list(range(n)), batch_size=1), put_on_device=True)
    return [
        [
            gather_for_metrics([batch.item()], state, use_gather_object=True),
            gather_for_metrics(batch, state).tolist(),
            gather_for_metrics([f"r{rank}"], state),
        ]
        for batch in loader
    ]


def test_gathered_objects(run_ranks: Any) -> None:
    (fact,) = [fact for fact in FACTS if fact["name"] == "gather_for_metrics.objects"]
    ranks = fact["input"]["P"]
    assert run_ranks(ranks, _gather_objects, 5) == [fact["output"]["all_ranks"]] * ranks


def _skip(n: int) -> dict[str, Any]:
    loader = prepare_data_loader(DataLoader(list(range(n)), batch_size=2), put_on_device=True)
    later = skip_first_batches(loader, 1)
    return {
        "type": type(later).__name__,
        "batches": [batch.tolist() for batch in later],
        "then full": [batch.tolist() for batch in loader],
        "end": GradientState().end_of_dataloader,
    }


def test_skipped_batches(run_ranks: Any) -> None:
    (fact,) = [fact for fact in FACTS if fact["name"] == "skip_first_batches"]
    assert run_ranks(fact["input"]["P"], _skip, 12) == fact["output"]["per_rank"]


def _shuffle(same_seed: bool) -> list[list[Any]]:
    rank = PartialState().process_index
    results = []
    for workers in (0, 1):
        torch.manual_seed(0 if same_seed else rank)
        plain = DataLoader(list(range(12)), batch_size=2, shuffle=True, num_workers=workers)
        loader = prepare_data_loader(plain, put_on_device=True, rng_types=["generator"])
        results += [[row for batch in loader for row in batch.tolist()] for _ in range(2)]
    return results


@pytest.mark.parametrize("same_seed", [True, False])
def test_shuffled_shards_divide_the_data(run_ranks: Any, same_seed: bool) -> None:
    # Decided difference: the record has shards that overlap where the ranks' seeds differ. The generator is documented
    # to be the same on all ranks, so they divide the data.
    (fact,) = [fact for fact in FACTS if fact["name"] == "shuffle_default_sync"]
    assert fact["output"]["all_ranks"] == {"disjoint+complete": False}
    by_rank = run_ranks(fact["input"]["P"], _shuffle, same_seed)
    epochs = [[row for epochs in by_rank for row in epochs[number]] for number in range(4)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1], "each epoch has an order of its own"
