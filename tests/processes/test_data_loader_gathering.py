"""Acceptance, with real ranks: every sample gathered once and in order; the mesh; ranks that stopped early."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

from accelerate.data_loader import gather_for_metrics, prepare_data_loader
from accelerate.state import GradientState, PartialState
from tests.processes.data_loader_cases import go_through, observe, prepared


def _cases(ranks: int, count: int) -> list[dict[str, Any]]:
    """Cases over all that matters, the edges first: nothing, fewer samples than ranks, exactly full rounds."""
    draw = random.Random(ranks)
    cases = []
    for number in range(count):
        rows_per_rank, split = draw.randint(1, 4), draw.random() < 0.5
        full = rows_per_rank * ranks
        sizes = [0, 1, ranks - 1, full, full + 1, 2 * full - 1, 2 * full]
        cases.append(
            {
                "n": sizes[number] if number < len(sizes) else draw.randint(0, 50),
                "batch_size": full if split else rows_per_rank,
                "split_batches": split,
                "drop_last": draw.random() < 0.3,
                "even_batches": draw.random() < 0.5,
                "dispatch_batches": draw.random() < 0.4,
                "iterable": draw.random() < 0.4,
            }
        )
    return cases


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_sample_is_gathered_once_in_order(run_ranks: Any, ranks: int) -> None:
    cases = _cases(ranks, 120)
    by_rank = run_ranks(ranks, observe, cases, timeout=120)
    for number, case in enumerate(cases):
        full = case["batch_size"] * (1 if case["split_batches"] else ranks)
        expected = list(range(case["n"] - case["n"] % full if case["drop_last"] else case["n"]))
        gathered = [results[number]["gathered"] for results in by_rank]
        assert [row for step in gathered[0] for row in step] == expected, case
        for other in gathered[1:]:
            assert other == gathered[0][: len(other)], case
        if case["even_batches"]:
            assert all(other == gathered[0] for other in gathered), case


def _nested(even: bool) -> list[Any]:
    state = GradientState()
    loader = prepare_data_loader(
        DataLoader(list(range(7)), batch_size=2), put_on_device=True, even_batches=even, rng_types=["generator"]
    )
    results = []
    for batch in loader:
        tree = {"logits": batch[:, None].float().expand(-1, 2), "labels": (batch, [batch > 3])}
        found = gather_for_metrics(tree, state)
        texts = gather_for_metrics([f"row {row}" for row in batch.tolist()], state)
        results.append([found["logits"].tolist(), found["labels"][0].tolist(), found["labels"][1][0].tolist(), texts])
    outside = gather_for_metrics(torch.tensor([PartialState().process_index]), state)
    return [results, outside.tolist()]


@pytest.mark.parametrize("even", [True, False])
def test_trees_and_objects_are_gathered_alike(run_ranks: Any, even: bool) -> None:
    results = run_ranks(3, _nested, even)
    steps, outside = results[0]
    assert outside == [0, 1, 2]
    for number, rows in enumerate([[0, 1, 2, 3, 4, 5], [6]]):
        logits, labels, larger, texts = steps[number]
        assert labels == rows
        assert logits == [[float(row)] * 2 for row in rows]
        assert larger == [row > 3 for row in rows]
        assert texts == [f"row {row}" for row in rows]
    assert [len(result[0]) for result in results] == ([2, 2, 2] if even else [2, 1, 1])


def _repeated(cases: list[dict[str, Any]]) -> list[Any]:
    """For each case and step: rows of this rank, what is gathered of them, and of a value repeated to a full batch."""
    state, rank = GradientState(), PartialState().process_index
    results = []
    for case in cases:
        loader = prepared(case)
        steps = []
        for batch in loader:
            loss = torch.tensor(float(rank)).repeat(loader.full_rows)
            rows, losses = gather_for_metrics((batch, loss), state)
            objects = gather_for_metrics(loss.tolist(), state)
            assert objects == gather_for_metrics((batch, loss.tolist()), state)[1] == losses.tolist()
            steps.append((len(batch), rows.tolist(), losses.tolist()))
        results.append(steps)
    return results


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_value_repeated_to_a_full_batch_counts_as_often_as_there_are_samples(run_ranks: Any, ranks: int) -> None:
    cases = [case for case in _cases(ranks, 50) if not case["drop_last"]]
    by_rank = run_ranks(ranks, _repeated, cases, timeout=120)
    for number, case in enumerate(cases):
        for step, (_, rows, losses) in enumerate(by_rank[0][number]):
            held = [results[number][step][0] for results in by_rank if len(results[number]) > step]
            owners = [float(rank) for rank, count in enumerate(held) for _ in range(count)]
            assert losses == owners[: len(rows)], case


def _members() -> list[Any]:
    state, rank = GradientState(), PartialState().process_index
    loader = prepare_data_loader(DataLoader(list(range(7)), batch_size=2), put_on_device=True, rng_types=["generator"])
    results = []
    for batch in loader:
        ids = batch.tolist()
        names, tokens = [str(row) for row in ids], [[row, row] for row in ids]
        results.append(
            [
                gather_for_metrics((names, tokens), state),
                gather_for_metrics({"names": names, "pair": (tokens, [{"id": row} for row in ids])}, state),
                gather_for_metrics(tuple(names), state),
                gather_for_metrics(tokens, state),
                gather_for_metrics(tuple((name, row) for name, row in zip(names, ids, strict=True)), state),
                gather_for_metrics([names, tokens, names], state),
            ]
        )
        mixed = gather_for_metrics((batch, names, {"more": batch[:, None]}), state)
        assert [type(member) for member in mixed] == [torch.Tensor, list, dict]
        results[-1].append((mixed[0].tolist(), mixed[1], mixed[2]["more"].flatten().tolist()))
        for refused in ({"any": "thing"}, "word", 3):
            with pytest.raises(TypeError, match="list of objects|lists of objects"):
                gather_for_metrics(refused, state)
    outside = gather_for_metrics(([rank], [str(rank)]), state)
    return [results, outside]


@pytest.mark.parametrize("ranks", [2, 3])
def test_members_of_tuples_and_mappings_are_gathered_one_by_one(run_ranks: Any, ranks: int) -> None:
    for results, outside in run_ranks(ranks, _members):
        assert outside == (list(range(ranks)), [str(rank) for rank in range(ranks)])
        full = 2 * ranks
        for step, found in enumerate(results):
            ids = list(range(7))[step * full : (step + 1) * full]
            names, tokens = [str(row) for row in ids], [[row, row] for row in ids]
            assert found == [
                (names, tokens),
                {"names": names, "pair": (tokens, [{"id": row} for row in ids])},
                names,
                tokens,
                list(zip(names, ids, strict=True)),
                [names, tokens, names],
                (ids, names, ids),
            ]


def _varying(lengths: list[int], even: bool) -> Any:
    numbers = iter(range(1000))
    batches = [[next(numbers) for _ in range(length)] for length in lengths]
    plain: Any = DataLoader(list(range(sum(lengths))), batch_sampler=batches)  # type: ignore[arg-type]
    return go_through(prepare_data_loader(plain, put_on_device=True, even_batches=even))["gathered"]


@pytest.mark.parametrize("even", [True, False])
def test_batches_of_varying_sizes(run_ranks: Any, even: bool) -> None:
    lengths = [3, 1, 2, 2, 4, 1, 2, 3, 1, 1]
    gathered = run_ranks(3, _varying, lengths, even)[0]
    assert [row for step in gathered for row in step] == list(range(sum(lengths)))


class PreBatched:
    """Items that are batches, of one size."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> torch.Tensor:
        if index >= 5:
            raise IndexError(index)
        return torch.tensor([2 * index, 2 * index + 1])


def _without_batch_size(even: bool) -> Any:
    plain: Any = DataLoader(PreBatched(), batch_size=None)
    return go_through(prepare_data_loader(plain, put_on_device=True, even_batches=even))["gathered"]


@pytest.mark.parametrize("even", [True, False])
def test_items_that_are_batches(run_ranks: Any, even: bool) -> None:
    assert run_ranks(2, _without_batch_size, even)[0] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def _with_workers(dispatch: bool) -> Any:
    cases = {"n": 13, "batch_size": 2, "workers": 2, "dispatch_batches": dispatch}
    loader = prepared(cases)
    return [go_through(loader)["gathered"] for _ in range(2)]


@pytest.mark.parametrize("dispatch", [True, False])
def test_worker_processes(run_ranks: Any, dispatch: bool) -> None:
    for result in run_ranks(2, _with_workers, dispatch):
        assert [[row for step in epoch for row in step] for epoch in result] == [list(range(13))] * 2


def _on_a_mesh(names: tuple[str, ...], shape: tuple[int, ...], dispatch: bool) -> Any:
    PartialState(cpu=True)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    loader = prepare_data_loader(
        DataLoader(list(range(9)), batch_size=2), put_on_device=True, torch_device_mesh=mesh, dispatch_batches=dispatch
    )
    return go_through(loader)


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize(
    ("names", "shape", "parts"),
    [
        (("dp_shard", "tp"), (2, 2), [0, 0, 1, 1]),
        (("tp", "dp_replicate"), (2, 2), [0, 1, 0, 1]),
        (("dp_replicate", "dp_shard"), (2, 2), [0, 1, 2, 3]),
        (("tp",), (4,), [0, 0, 0, 0]),
    ],
)
def test_ranks_that_share_a_model_share_their_data(
    run_ranks: Any, names: Any, shape: Any, parts: list[int], dispatch: bool
) -> None:
    results = run_ranks(4, _on_a_mesh, names, shape, dispatch)
    for rank, result in enumerate(results):
        assert result["batches"][0][0] == [2 * parts[rank], 2 * parts[rank] + 1]
        assert [row for step in result["gathered"] for row in step] == list(range(9))


def _raises_on_rank_1() -> tuple[list[int], str]:
    class Broken(list):
        def __getitem__(self, index: Any) -> int:
            if PartialState().process_index == 1 and index >= 6:
                raise OSError(f"sample {index} cannot be read")
            return index

    loader = prepare_data_loader(DataLoader(Broken(range(8)), batch_size=2), put_on_device=True)
    seen: list[int] = []
    try:
        for batch in loader:
            seen += batch.tolist()
    except OSError as error:
        return seen, str(error)
    return seen, ""


def test_a_dataset_that_raises_on_one_rank_raises_there(run_ranks: Any) -> None:
    # Reading needs nobody else, so the other rank is not held up; that the run then ends is the launcher's doing.
    assert run_ranks(2, _raises_on_rank_1) == [([0, 1, 4, 5], ""), ([2, 3], "sample 6 cannot be read")]
