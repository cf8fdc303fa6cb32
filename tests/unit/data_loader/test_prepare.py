"""Recorded behavior of `prepare_data_loader` and samplers that needs no second process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from accelerate.data_loader import (
    BatchSamplerShard,
    IterableDatasetShard,
    SeedableRandomSampler,
    get_sampler,
    prepare_data_loader,
    skip_first_batches,
)

FACTS = json.loads((Path(__file__).parents[2] / "data" / "data_loader_behavior.json").read_text())


def _facts(name: str) -> list[Any]:
    found = [fact for fact in FACTS if fact["name"] == name]
    assert found, name
    return found


def _names(fact: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in fact["input"].items() if name != "n")


class Numbers(IterableDataset):
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))


@pytest.mark.parametrize("fact", _facts("BatchSamplerShard"), ids=_names)
def test_batch_sampler_shard(fact: dict[str, Any]) -> None:
    case = fact["input"]
    for n, recorded in fact["output"].items():
        batches = BatchSampler(SequentialSampler(range(int(n))), case["batch_size"], case["drop_last"])
        shards = [
            BatchSamplerShard(
                batches, case["P"], rank, split_batches=case["split_batches"], even_batches=case["even_batches"]
            )
            for rank in range(case["P"])
        ]
        ours = {
            "batches": [list(shard) for shard in shards],
            "len": [len(shard) for shard in shards],
            "total_length": shards[0].total_length,
        }
        # Decided difference: lengths are those of what comes, on each rank.
        assert ours == {**recorded, "len": [len(batches) for batches in recorded["batches"]]}, n


@pytest.mark.parametrize("fact", _facts("IterableDatasetShard"), ids=_names)
def test_iterable_dataset_shard(fact: dict[str, Any]) -> None:
    case = fact["input"]
    for n, recorded in fact["output"].items():
        shards = [
            IterableDatasetShard(
                Numbers(int(n)), case["batch_size"], case["drop_last"], case["P"], rank, case["split_batches"]
            )
            for rank in range(case["P"])
        ]
        assert [list(shard) for shard in shards] == recorded["items"], n
        # Decided difference: lengths are those of what comes.
        assert [len(shard) for shard in shards] == [len(items) for items in recorded["items"]], n


def test_batch_size_must_be_a_multiple_to_be_split() -> None:
    assert _facts("BatchSamplerShard.error")[0]["output"]["raises"] == "ValueError"
    with pytest.raises(ValueError, match="batch_size=3 and there are 2 processes"):
        BatchSamplerShard(BatchSampler(range(8), 3, False), num_processes=2, process_index=0, split_batches=True)
    assert _facts("IterableDatasetShard.error")[0]["output"]["raises"] == "ValueError"
    with pytest.raises(ValueError, match="batch_size=3 and there are 2 processes"):
        IterableDatasetShard(Numbers(8), batch_size=3, num_processes=2, split_batches=True)


def test_skip_first_batches_of_plain_loaders() -> None:
    kind, batches = _facts("skip_first_batches.iterable")[0]["output"]["tuple"]
    later = skip_first_batches(DataLoader(Numbers(10), batch_size=3), 2)
    assert type(later).__name__ == kind
    assert [batch.tolist() for batch in later] == batches
    unchanged = skip_first_batches(DataLoader(list(range(10)), batch_size=3), 0)
    assert [batch.tolist() for batch in unchanged] == _facts("skip_first_batches.zero")[0]["output"]


def test_seedable_sampler_without_a_seed_takes_torchs() -> None:
    recorded = _facts("SeedableRandomSampler.no_seed")[0]["output"]
    torch.manual_seed(0)
    sampler = SeedableRandomSampler(range(6))
    assert sampler.initial_seed == recorded["initial_seed"]
    assert list(sampler) == recorded["list"]


def test_prepared_with_a_seedable_sampler() -> None:
    recorded = _facts("prepare.seedable")[0]["output"]
    loader = prepare_data_loader(
        DataLoader(list(range(6)), batch_size=2, shuffle=True), use_seedable_sampler=True, data_seed=3
    )
    assert type(get_sampler(loader)).__name__ == recorded["sampler"]
    assert [[batch.tolist() for batch in loader] for _ in range(2)] == recorded["epochs"]
    loader.set_epoch(0)
    assert [batch.tolist() for batch in loader] == recorded["set_epoch0"]


@pytest.mark.parametrize(
    ("name", "dataset", "loader_arguments", "arguments"),
    [
        ("prepare_data_loader.no_batch", Numbers(4), {"batch_size": None}, {"split_batches": True}),
        ("prepare_data_loader.dispatch_indexed", [1, 2], {}, {"dispatch_batches": True, "put_on_device": False}),
        ("prepare_data_loader.split_mismatch", [1, 2, 3, 4], {"batch_size": 3}, {"split_batches": True}),
    ],
)
def test_invalid_arguments_are_rejected(
    name: str, dataset: Any, loader_arguments: dict[str, Any], arguments: dict[str, Any]
) -> None:
    assert _facts(name)[0]["output"]["raises"] == "ValueError"
    with pytest.raises(ValueError):
        prepare_data_loader(DataLoader(dataset, **loader_arguments), num_processes=2, process_index=0, **arguments)


def test_types_of_a_sharded_loader() -> None:
    for rank, (kind, sampler, batches, length) in enumerate(_facts("prepare_data_loader.sharded_types")[0]["output"]):
        loader = prepare_data_loader(DataLoader(list(range(9)), batch_size=2), num_processes=2, process_index=rank)
        assert type(loader).__name__ == kind
        assert type(loader.batch_sampler).__name__ == sampler
        assert len(loader) == length
        assert [batch.tolist() for batch in loader] == batches
