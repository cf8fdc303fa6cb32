"""What a rank does in the data loader's tests: go through prepared loaders, and report what it saw and gathered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from accelerate.data_loader import gather_for_metrics, prepare_data_loader
from accelerate.state import GradientState


class Counting(IterableDataset):
    """The numbers below `n`, of unknown length."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))


def go_through(loader: Any) -> dict[str, Any]:
    """One pass: batches with the signals that came with them, and what was gathered at each step."""
    state = GradientState()
    seen, gathered = [], []
    for batch in loader:
        seen.append([batch.tolist(), state.end_of_dataloader, state.remainder])
        gathered.append(gather_for_metrics(batch, state).tolist())
    assert not state.in_dataloader
    return {"batches": seen, "gathered": gathered}


def prepared(case: dict[str, Any]) -> Any:
    """The loader of a case: n, batch_size, drop_last, iterable, workers, and arguments of prepare_data_loader."""
    options = dict(case)
    n, batch_size = options.pop("n"), options.pop("batch_size")
    drop_last, workers = options.pop("drop_last", False), options.pop("workers", 0)
    dataset: Any = Counting(n) if options.pop("iterable", False) else list(range(n))
    loader = DataLoader(dataset, batch_size=batch_size, drop_last=drop_last, num_workers=workers)
    return prepare_data_loader(loader, put_on_device=True, rng_types=["generator"], **options)


def observe(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`go_through` for each case, on this rank."""
    results = []
    for case in cases:
        try:
            loader = prepared(case)
        except ValueError as error:
            results.append({"raises": type(error).__name__})
            continue
        result = go_through(loader)
        result["type"] = type(loader).__name__
        result["dataset"] = type(loader.dataset).__name__
        if not case.get("iterable"):
            result["len"] = len(loader)
            result["total_batch_size"] = loader.total_batch_size
            result["total_dataset_length"] = loader.total_dataset_length
        results.append(result)
    return results
