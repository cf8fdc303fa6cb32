"""Options of `Accelerator`'s methods that only several ranks show: each test fails if its option is ignored."""

from __future__ import annotations

import datetime
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from accelerate import (
    Accelerator,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    ParallelismConfig,
    PartialState,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
    prepare_pippy,
)
from accelerate.data_loader import DataLoaderDispatcher, prepare_data_loader
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, TorchTensorParallelConfig


def collectives() -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    ragged = torch.full((2, rank + 1), float(rank + 1))
    with accelerator.split_between_processes([1, 2, 3], apply_padding=True) as part:
        pass
    with PartialState().split_between_processes([1, 2, 3], apply_padding=True) as same:
        pass
    return {
        "mean": accelerator.reduce(torch.tensor(float(rank)), reduction="mean").item(),
        "scaled": accelerator.reduce(torch.tensor(1.0), scale=3.0).item(),
        "padded": accelerator.pad_across_processes(ragged, dim=1, pad_index=9, pad_first=True).tolist(),
        "objects": accelerator.gather_for_metrics([torch.ones(rank + 1)], use_gather_object=True),
        "parts": [part, same],
    }


def test_collectives_do_as_asked(run_ranks):
    first, second = run_ranks(2, collectives)
    assert first["mean"] == 0.5 and first["scaled"] == 6
    assert first["padded"] == [[9, 1]] * 2 and second["padded"] == [[2, 2]] * 2
    assert [len(tensor) for tensor in first["objects"]] == [1, 2]
    assert (first["parts"], second["parts"]) == ([[1, 2]] * 2, [[3, 3]] * 2)


def models() -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare_model(nn.Linear(1, 1), evaluation_mode=True)
    return {"plain": type(model) is nn.Linear}


def test_a_model_for_evaluation_gets_no_container(run_ranks):
    assert run_ranks(2, models) == [{"plain": True}] * 2


def updates(options: dict[str, Any]) -> int:
    accelerator = Accelerator(cpu=True, **options)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 + step)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    accelerator.backward(model(torch.ones(1, 1)).sum())
    optimizer.step()
    scheduler.step()
    return int(scheduler.get_last_lr()[0]) - 1


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 2),
        ({"schedule_per_update": True}, 1),
        ({"split_batches": True}, 1),
        ({"dataloader_config": DataLoaderConfiguration(split_batches=True)}, 1),
    ],
)
def test_a_schedule_moves_on_by_batches_or_updates(options, steps, run_ranks):
    assert run_ranks(2, updates, options) == [steps] * 2


def group(folder: Path) -> tuple[bool, float]:
    meeting = f"file://{folder / 'meeting'}"
    timeout = datetime.timedelta(seconds=77)
    handler = InitProcessGroupKwargs(backend="gloo", init_method=meeting, timeout=timeout)
    Accelerator(cpu=True, kwargs_handlers=[handler])
    # torch has no public way to read a group's timeout; the group is there, whatever its type says.
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    return (folder / "meeting").exists(), backend.options._timeout.total_seconds()


def test_a_group_is_joined_as_asked(run_ranks, tmp_path):
    assert run_ranks(2, group, tmp_path, join=False) == [(True, 77)] * 2


def left(kind: Any) -> tuple[bool, bool]:
    state = kind(cpu=True)
    some = dist.new_group([0, 1])
    state.destroy_process_group(some)
    return dist.is_initialized(), some in dist.distributed_c10d._world.pg_map


@pytest.mark.parametrize("kind", [PartialState, AcceleratorState])
def test_one_group_is_left(kind, run_ranks):
    assert run_ranks(2, left, kind) == [(True, False)] * 2


def replicated() -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    Accelerator(cpu=True)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    return [batch.tolist() for batch in DataLoaderDispatcher(range(4), torch_device_mesh=mesh, batch_size=2)]


def test_ranks_that_share_a_model_are_sent_the_same(run_ranks):
    assert run_ranks(2, replicated) == [[[0, 1], [2, 3]]] * 2


def cut() -> list[Any]:
    def last_first(batch: torch.Tensor, rows: slice, process_index: int, num_processes: int) -> torch.Tensor:
        return batch.flip(0)[rows]

    loader = DataLoader(range(4), batch_size=2)  # type: ignore[arg-type,var-annotated]
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    first = accelerator.prepare_data_loader(loader, slice_fn_for_dispatch=last_first)
    options = {"put_on_device": True, "dispatch_batches": True}
    second = prepare_data_loader(loader, slice_fn_for_dispatch=last_first, **options)
    torch.manual_seed(accelerator.process_index)
    list(prepare_data_loader(loader, rng_types=["torch"]))
    drawn = torch.rand(1).item()
    return [[batch.tolist() for batch in first], [batch.tolist() for batch in second], drawn]


def test_batches_are_cut_and_random_states_shared_as_asked(run_ranks):
    first, second = run_ranks(2, cut)
    assert first[:2] == [[[3, 2]]] * 2 and second[:2] == [[[1, 0]]] * 2
    assert first[2] == second[2]


def accumulated() -> tuple[float, float]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = accelerator.prepare(nn.Linear(1, 1, bias=False))
    seen = []
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.full((1, 1), float(accelerator.process_index))).sum())
        seen.append(accelerator.unwrap_model(model).weight.grad.item())
    return seen[0], seen[1]


def test_gradients_of_models_that_accumulate_stay_local(run_ranks):
    assert run_ranks(2, accumulated) == [(0, 0.5), (0.5, 0.5)]


def container() -> tuple[int, bool]:
    handler = DistributedDataParallelKwargs(dim=1, broadcast_buffers=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the newest torch has another name for it
        model = Accelerator(cpu=True, kwargs_handlers=[handler]).prepare(nn.Linear(1, 1))
    return model.dim, model.broadcast_buffers


def test_the_container_is_made_as_asked(run_ranks):
    assert run_ranks(2, container) == [(1, False)] * 2


def cut_by_plan() -> tuple[int, ...]:
    handler = TorchTensorParallelConfig(plan={"0": "colwise"})
    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(tp_size=2, tp_handler=handler))
    return tuple(accelerator.prepare(nn.Sequential(nn.Linear(2, 4)))[0].weight.to_local().shape)


def test_tensors_are_cut_by_the_plan(run_ranks):
    assert run_ranks(2, cut_by_plan) == [(2, 2)] * 2


def piped(classes: list[str] | None) -> list[str]:
    PartialState(cpu=True)
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([inner])[0], nn.Linear(2, 2))
    inner.__class__ = Pair
    made = prepare_pippy(model, example_args=(torch.ones(2, 2),), no_split_module_classes=classes)
    return made.hf_split_points


class Pair(nn.Sequential):
    """Two layers that may have to stay together."""


@pytest.mark.parametrize(("classes", "split"), [(["Pair"], False), (None, True)])
def test_stages_do_not_begin_in_a_module_that_stays_whole(classes, split, run_ranks):
    assert [any("." in point for point in points) for points in run_ranks(2, piped, classes)] == [split] * 2


def read_by_the_first(folder: Path) -> list[float]:
    model = nn.Linear(1, 2, bias=False)
    place = folder / ("rank0.safetensors" if dist.get_rank() == 0 else "nothing")
    load_checkpoint_and_dispatch(model, place, broadcast_from_rank0=True)
    return model.weight.flatten().tolist()


def test_a_checkpoint_is_read_by_one_rank_if_asked(run_ranks, tmp_path):
    save_file({"weight": torch.ones(2, 1)}, tmp_path / "rank0.safetensors")
    assert run_ranks(2, read_by_the_first, tmp_path) == [[1, 1]] * 2


def loaded(folder: Path, whole: bool, load: Any) -> list[float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(1, 2, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    load(model, folder / f"rank{dist.get_rank()}.safetensors", full_state_dict=whole)
    return model.weight.full_tensor().flatten().tolist()  # type: ignore[operator]


@pytest.mark.parametrize("load", [load_checkpoint_in_model, load_checkpoint_and_dispatch])
def test_a_checkpoint_holds_a_shard_of_each_rank_or_the_whole(load, run_ranks, tmp_path):
    for rank in range(2):
        save_file({"weight": torch.full((1, 1), float(rank))}, tmp_path / f"rank{rank}.safetensors")
    assert run_ranks(2, loaded, tmp_path, whole=False, load=load) == [[0, 1]] * 2
