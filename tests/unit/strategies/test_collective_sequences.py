"""Every rank calls the same collectives in the same order, as NCCL needs them, at sizes no test machine has processes for.

`CASES` is the list. Ranks 0, 1 and last of 8, and the first and last of 64, run one after the other in this process, each
on simulated CUDA devices, and NCCL's rules are checked.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from accelerate import Accelerator, DataLoaderConfiguration, ParallelismConfig
from accelerate.checkpointing.sharded import dcp_writer, gathering
from accelerate.local_sgd import LocalSGD
from accelerate.runtime import world
from accelerate.runtime.collective_backend import TorchCollectives
from accelerate.settings import env
from accelerate.utils import (
    ProjectConfiguration,
    broadcast,
    broadcast_object_list,
    gather_object,
    set_seed,
    synchronize_rng_states,
)
from tests.helpers.llama import Llama
from tests.helpers.recorded_collectives import Recorded, Run, rank_of
from tests.helpers.sharding import Block, plugin

Case = Callable[[int, Path], None]


def _step(accelerator: Accelerator, save: Path | None = None, load: bool = True) -> None:
    """Trains a step on a model of blocks, and saves and loads in the folder, if given."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(Block(64), Block(64))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.ones(2, 64, device=accelerator.device)).sum())
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if save is not None:
        _save_and_load(accelerator, save, load)
    accelerator.wait_for_everyone()


def _save_and_load(accelerator: Accelerator, folder: Path, load: bool) -> None:
    # Ranks that run one by one have no peers whose shards would complete theirs.
    with mock.patch.object(gathering, "check_tiled"), mock.patch.object(dcp_writer, "check_tiled"):
        accelerator.save_state(str(folder))
        if load:
            for rank in range(1, accelerator.num_processes):  # the ranks that run in earnest never meet
                shutil.copyfile(folder / "random_states_0.pkl", folder / f"random_states_{rank}.pkl")
            accelerator.load_state(str(folder))


def _of_blocks(save: bool = False, load: bool = True, **options: Any) -> Case:
    def case(size: int, folder: Path) -> None:
        made = {name: value(size) if callable(value) else value for name, value in options.items()}
        _step(Accelerator(**made), folder / "saved" if save else None, load)

    return case


def _of_llama(dimension: str, save: bool = False) -> Case:
    """Trains a step of a language model with ranks that share it, or its sequences, by two, and saves it both ways."""

    def case(size: int, folder: Path) -> None:
        sizes = {f"{dimension}_size": 2, "dp_replicate_size": size // 2}
        accelerator = Accelerator(parallelism_config=ParallelismConfig(**sizes))
        torch.manual_seed(0)
        with mock.patch(
            "tests.helpers.llama.VOCABULARY", 12
        ):  # shared evenly, so that shapes do not depend on the rank
            model: Any = Llama()
        rows = torch.randint(0, 11, (size * 2, 9))
        loader: Any = DataLoader(TensorDataset(rows[:, :-1].clone(), rows[:, 1:].clone()), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
        for tokens, truths in loader:
            positions = torch.arange(8, device=accelerator.device)
            with accelerator.maybe_context_parallel([tokens, truths, positions], [1, 1, 0]):
                guesses = model(tokens, positions)
                accelerator.backward(functional.cross_entropy(guesses.flatten(0, 1), truths.flatten()))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            break
        if save:
            _save_and_load(accelerator, folder / "saved", load=dimension != "tp")
        accelerator.wait_for_everyone()

    return case


def _tensors(size: int, folder: Path) -> None:
    accelerator = Accelerator()
    for dtype in (torch.float32, torch.int64, torch.bool, torch.bfloat16):
        tensor = torch.ones(3, 2, device=accelerator.device, dtype=dtype)
        accelerator.gather({"a": tensor, "b": [tensor[0, 0]]})
        accelerator.pad_across_processes(tensor, dim=1)
    accelerator.reduce(torch.ones(2, device=accelerator.device), "mean")
    accelerator.set_trigger()
    assert accelerator.check_trigger()
    accelerator.wait_for_everyone()


def _tensors_elsewhere(size: int, folder: Path) -> None:
    """Communicates tensors of the CPU, with shapes checked first."""
    accelerator = Accelerator()
    for debug in (False, True):
        world.set_debug(debug)
        for communicate in (accelerator.gather, accelerator.reduce, accelerator.pad_across_processes, broadcast):
            communicate(torch.ones(2))
        accelerator.gather_for_metrics(torch.ones(2))


def _turns(size: int, folder: Path) -> None:
    accelerator = Accelerator()
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        set_seed(1, device_specific=True)
    synchronize_rng_states(["torch", "cuda"])
    with accelerator.split_between_processes(list(range(size + 1)), apply_padding=True):
        accelerator.wait_for_everyone()


def _local_sgd(size: int, folder: Path) -> None:
    accelerator = Accelerator()
    model: Any = nn.Linear(4, 4)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2) as local:
        for _ in range(4):
            accelerator.backward(model(torch.ones(2, 4, device=accelerator.device)).sum())
            optimizer.step()
            local.step()


def _accumulated(size: int, folder: Path) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model: Any = nn.Linear(4, 4)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        with accelerator.accumulate(model):
            loss = model(torch.ones(2, 4, device=accelerator.device)).sum()
            accelerator.backward(loss, num_items=8)
            optimizer.step()


class _Stream(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([{"tensor": torch.ones(2), "text": "x"}] * 50)


def _stream(size: int, folder: Path) -> None:
    accelerator = Accelerator()
    for batch in accelerator.prepare(DataLoader(_Stream(), batch_size=2)):
        accelerator.gather_for_metrics(batch["tensor"])


def _objects(size: int, folder: Path) -> None:
    accelerator = Accelerator()
    assert gather_object([accelerator.process_index]) == [accelerator.process_index] * size
    assert broadcast_object_list([accelerator.process_index]) == [0]
    accelerator.gather_for_metrics([accelerator.process_index])


def _metrics(dispatch: bool) -> Case:
    def case(size: int, folder: Path) -> None:
        config = DataLoaderConfiguration(dispatch_batches=dispatch)
        accelerator = Accelerator(dataloader_config=config)
        rows = torch.arange(4 * size + 3.0)  # the last batch is padded
        seen = 0
        for (batch,) in accelerator.prepare(DataLoader(TensorDataset(rows), batch_size=2)):
            assert batch.device == accelerator.device
            seen += accelerator.gather_for_metrics(batch).numel()
        assert seen == len(rows)

    return case


def _saved_by_number(size: int, folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of the rank before
    config = ProjectConfiguration(project_dir=str(folder), automatic_checkpoint_naming=True, total_limit=1)
    accelerator = Accelerator(project_config=config)
    for _ in range(2):
        _step(accelerator)
        accelerator.save_state()


def _saved_asynchronously(size: int, folder: Path) -> None:
    accelerator = Accelerator()
    _step(accelerator)
    accelerator.save_state(str(folder / "saved"), asynchronous=True)
    accelerator.wait_for_checkpoint()


def _mesh(size: int) -> ParallelismConfig:
    return ParallelismConfig(dp_replicate_size=4, dp_shard_size=size // 4)


CASES: dict[str, Case] = {
    "tensors": _tensors,
    "tensors of the CPU": _tensors_elsewhere,
    "objects": _objects,
    "turns": _turns,
    "metrics": _metrics(dispatch=False),
    "dispatched": _metrics(dispatch=True),
    "dispatched stream": _stream,
    "DDP": _of_blocks(),
    "DDP, accumulated": _accumulated,
    "local SGD": _local_sgd,
    "DDP in fp16": _of_blocks(mixed_precision="fp16"),
    "DDP, saved": _of_blocks(save=True),
    "DDP, saved by number": _saved_by_number,
    "DDP, saved asynchronously": _saved_asynchronously,
    "FSDP 1": _of_blocks(fsdp_plugin=lambda size: plugin(1, use_orig_params=True)),
    "FSDP 1, saved whole": _of_blocks(
        True, False, fsdp_plugin=lambda size: plugin(1, use_orig_params=True, state_dict_type="FULL_STATE_DICT")
    ),
    "FSDP 1, saved in shards": _of_blocks(
        True, False, fsdp_plugin=lambda size: plugin(1, use_orig_params=True, state_dict_type="SHARDED_STATE_DICT")
    ),
    "FSDP 2": _of_blocks(fsdp_plugin=lambda size: plugin(2)),
    "FSDP 2, saved whole": _of_blocks(
        True, True, fsdp_plugin=lambda size: plugin(2, state_dict_type="FULL_STATE_DICT")
    ),
    "FSDP 2, saved in shards": _of_blocks(
        True, False, fsdp_plugin=lambda size: plugin(2, state_dict_type="SHARDED_STATE_DICT")
    ),
    "FSDP 1, offloaded": _of_blocks(fsdp_plugin=lambda size: plugin(1, use_orig_params=True, cpu_offload=True)),
    "FSDP 2, offloaded": _of_blocks(fsdp_plugin=lambda size: plugin(2, cpu_offload=True)),
    "FSDP 2, offloaded, saved whole": _of_blocks(
        True, False, fsdp_plugin=lambda size: plugin(2, cpu_offload=True, state_dict_type="FULL_STATE_DICT")
    ),
    "FSDP 2 in fp16": _of_blocks(mixed_precision="fp16", fsdp_plugin=lambda size: plugin(2)),
    "HSDP": _of_blocks(fsdp_plugin=lambda size: plugin(2), parallelism_config=_mesh),
    "tensor parallel": _of_llama("tp"),
    "context parallel": _of_llama("cp"),
    "sequence parallel": _of_llama("sp"),
    "tensor parallel, saved": _of_llama("tp", save=True),
    "context parallel, saved": _of_llama("cp", save=True),
    "sequence parallel, saved": _of_llama("sp", save=True),
}


def _recorded(case: Case, size: int, folder: Path) -> list[list[Recorded]]:
    """Returns the collectives of ranks 0, 1 and last; at the larger size, of the first and the last."""
    run, found = Run(size), []
    for rank in (0, 1, size - 1) if size == 8 else (0, size - 1):
        with rank_of(run, rank) as recorder:
            case(size, folder)
            found.append(list(recorder.found))
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [8, 64])
def test_ranks_call_the_same_collectives(size: int, name: str, tmp_path: Path) -> None:
    first, *others = _recorded(CASES[name], size, tmp_path)
    assert first
    assert all(other == first for other in others)


def _joined(size: int, folder: Path) -> None:
    accelerator = Accelerator()
    model: Any = nn.Linear(4, 4)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with accelerator.join_uneven_inputs([model]):
        for _ in range(2):
            accelerator.backward(model(torch.ones(2, 4, device=accelerator.device)).sum())
            optimizer.step()


def test_ranks_join_uneven_inputs(tmp_path: Path) -> None:
    runs = _recorded(_joined, 8, tmp_path)
    # The rank that ended last sends its model; each of these has no peers, and takes itself for that one.
    assert [run.pop().operation for run in runs] == ["broadcast from 0", "broadcast from 1", "broadcast from 7"]
    assert len(runs[0]) > 8 and runs[0] == runs[1] == runs[2]


def _cpu_tensor(size: int, folder: Path) -> None:
    dist.all_reduce(torch.ones(2, device="cpu" if Accelerator() else None))


def _point_to_point(size: int, folder: Path) -> None:
    dist.send(torch.ones(2, device=Accelerator().device), 2)


def _barrier_without_device(size: int, folder: Path) -> None:
    Accelerator()
    dist.barrier()


def _cuda_tensor_over_gloo(size: int, folder: Path) -> None:
    device = Accelerator().device
    dist.broadcast(torch.ones(2, device=device), 0, group=dist.new_group(backend="gloo"))


def _objects_before_device(size: int, folder: Path) -> None:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=env.integer("RANK", 0), world_size=size)
    dist.all_gather_object([None] * size, "x")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (_cpu_tensor, "of a CPU tensor over NCCL"),
        (_point_to_point, "send over NCCL"),
        (_barrier_without_device, "barrier over NCCL without a device"),
        (_cuda_tensor_over_gloo, "of a CUDA tensor over gloo"),
        (_objects_before_device, "before the device was set"),
    ],
)
def test_a_broken_rule_is_found(case: Case, message: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=message):
        _recorded(case, 8, tmp_path)


@pytest.mark.parametrize("name", ["tensors", "DDP", "FSDP 2", "DDP, saved"])
def test_a_collective_that_one_rank_leaves_out_is_found(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    barrier = TorchCollectives.barrier
    monkeypatch.setattr(TorchCollectives, "barrier", lambda self: None if self.rank == 1 else barrier(self))
    first, second, last = _recorded(CASES[name], 8, tmp_path)
    assert first == last
    assert first != second
