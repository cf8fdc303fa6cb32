"""Tensor parallelism on real ranks: who reads what, what is averaged and clipped with whom, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from accelerate import (
    Accelerator,
    DataLoaderConfiguration,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
    PartialState,
)
from accelerate.state import AcceleratorState
from accelerate.strategies.parallel import grad_sync
from accelerate.strategies.parallel.mesh import local_tensor
from accelerate.utils import (
    TorchTensorParallelConfig,
    TorchTensorParallelPlugin,
    avg_losses_across_data_parallel_group,
    get_model_tp_size,
    model_has_dtensor,
)
from tests.helpers.llama import Llama, Mlp

PLAN = {"gate_proj": "colwise", "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}


def _run(plan: Any = PLAN, **sizes: int) -> Accelerator:
    AcceleratorState._reset_state()
    handler = TorchTensorParallelConfig(plan=plan)
    return Accelerator(cpu=True, parallelism_config=ParallelismConfig(tp_handler=handler, **sizes))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(8))


def _who_reads_what() -> dict[str, Any]:
    """For each kind of loader, this rank's batches, and what all ranks' come to."""
    found: dict[str, Any] = {}
    kinds = {
        "plain": (list(range(8)), {}),
        "split": (list(range(8)), {"split_batches": True}),
        "sent": (list(range(8)), {"dispatch_batches": True}),
        "stream": (Stream(), {"dispatch_batches": False}),
        "sent stream": (Stream(), {}),
    }
    for name, (data, how) in kinds.items():
        AcceleratorState._reset_state()
        sizes = ParallelismConfig(dp_replicate_size=2, tp_size=2)
        config = DataLoaderConfiguration(**how)
        accelerator = Accelerator(cpu=True, parallelism_config=sizes, dataloader_config=config)
        loader = accelerator.prepare(DataLoader(data, batch_size=4 if name == "split" else 2))
        own, gathered = [], []
        for batch in loader:
            own.append(batch.tolist())
            gathered += accelerator.gather_for_metrics(batch).tolist()
        found[name] = own, gathered
    return found


def test_ranks_that_share_tensors_read_the_same(run_ranks):
    results = run_ranks(4, _who_reads_what)
    for rank, found in enumerate(results):
        for name, (own, gathered) in found.items():
            assert own == ([[0, 1], [4, 5]] if rank < 2 else [[2, 3], [6, 7]]), name
            assert gathered == list(range(8)), name


def _averaged_with_whom() -> dict[str, Any]:
    accelerator = _run(dp_replicate_size=2, tp_size=2)
    replica, rank = accelerator.data_parallel_rank, accelerator.process_index
    torch.manual_seed(rank)  # ranks start from the weights of rank 0
    plain = Mlp(4).double()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(plain, optimizer)
    torch.manual_seed(0)
    alone = Mlp(4).double()
    inputs = [torch.full((1, 4), float(number + 1), dtype=torch.float64) for number in range(2)]

    def gap(expected: nn.Module) -> float:
        pairs = zip(model.parameters(), expected.parameters(), strict=True)
        return max(float((mine.grad.full_tensor() - theirs.grad).abs().max()) for mine, theirs in pairs)

    with accelerator.no_sync(model):
        accelerator.backward(model(inputs[replica]).sum())
    alone(inputs[replica]).sum().backward()
    held = gap(alone)
    alone.zero_grad()
    model.zero_grad()
    for number in range(2):
        (alone(inputs[number]).sum() / 2).backward()
    with accelerator.no_sync(model):
        loss = model(inputs[replica]).sum()
    with accelerator.trigger_sync_in_backward(model):
        accelerator.backward(loss)
    together = gap(alone)
    norms = [float(accelerator.clip_grad_norm_(model.parameters(), 1e-3, kind)) for kind in (2, 1, float("inf"))]
    expected = [float(torch.nn.utils.get_total_norm([p.grad for p in alone.parameters()], 2))]
    torch.nn.utils.clip_grad_norm_(alone.parameters(), 1e-3)
    for kind in (1, float("inf")):
        expected.append(float(torch.nn.utils.clip_grad_norm_(alone.parameters(), 1e-3, kind)))
    optimizer.step()
    own = torch.tensor(float(replica))
    return {
        "held": held,
        "together": together,
        "norms": max(abs(a - b) for a, b in zip(norms, expected, strict=True)),
        "stepped": all(p in set(model.parameters()) for group in optimizer.param_groups for p in group["params"]),
        "mean": [
            float(accelerator.reduce(own, "mean")),
            *avg_losses_across_data_parallel_group([own, 2 * own]).tolist(),
        ],
        "drawn": accelerator.gather(torch.rand(1)).tolist(),
        "shared": (
            model_has_dtensor(model),
            get_model_tp_size(model),
            model_has_dtensor(alone),
            get_model_tp_size(alone),
        ),
    }


def test_gradients_are_averaged_over_replicas_only(run_ranks):
    for found in run_ranks(4, _averaged_with_whom):
        assert found["held"] < 1e-12 and found["together"] < 1e-12 and found["norms"] < 1e-12
        assert found["stepped"] and found["mean"] == [0.5, 0.5, 1.0]
        assert found["drawn"][0] == found["drawn"][1] and found["drawn"][2] == found["drawn"][3]
        assert found["shared"] == (True, 2, False, None)


class Branches(nn.Module):
    """One of its parts is out of use, or is used by some ranks only."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.some, self.never = (nn.Linear(2, 2, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        return self.used(x) + (self.some(x) if both else 0)


def _some_ranks_only() -> tuple[Any, ...]:
    accelerator = _run({"used": "colwise_rep", "some": "colwise_rep"}, dp_replicate_size=2, tp_size=2)
    model = accelerator.prepare(Branches())
    accelerator.backward(model(torch.ones(1, 2), accelerator.data_parallel_rank == 0).sum())
    grads = {name: param.grad for name, param in model.named_parameters()}
    return tuple(None if grad is None else _full(grad).tolist() for grad in grads.values())


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_parts_in_use_on_some_ranks_only(run_ranks):
    assert run_ranks(4, _some_ranks_only) == [([[1, 1], [1, 1]], [[0.5, 0.5], [0.5, 0.5]], None)] * 4


class Checkpointed(nn.Module):
    """Layers that are recomputed in backwards inside the backward; one of them is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, self.layers[1]):
            x = checkpoint(layer, x, use_reentrant=True)
        return self.layers[2](x)


def _fail(_: torch.Tensor) -> None:
    raise ArithmeticError


def _overlapped() -> list[Any]:
    """When what is sent in a backward, and whether gradients are right then, after one that failed, and in nested ones."""
    accelerator = _run(dp_replicate_size=2, tp_size=2)
    replica = accelerator.data_parallel_rank
    model, alone = Mlp(4).double(), Mlp(4).double()
    alone.load_state_dict(model.state_dict())
    events: list[str] = []
    all_reduce, tolist, size = dist.all_reduce, torch.Tensor.tolist, grad_sync._BUCKET_BYTES

    def sending(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        events.append("sent")
        return all_reduce(tensor, *args, **kwargs)

    def looking(tensor: torch.Tensor) -> Any:
        events.append("looked")
        return tolist(tensor)

    def gap(mine: nn.Module, expected: nn.Module) -> float:
        pairs = zip(mine.parameters(), expected.parameters(), strict=True)
        return max(float((_full(a.grad) - b.grad).abs().max()) for a, b in pairs)

    def compare(model: nn.Module, alone: nn.Module) -> float:
        model.zero_grad()
        alone.zero_grad()
        for number in range(2):
            (alone(torch.full((1, 4), number + 1.0, dtype=torch.float64, requires_grad=True)).sum() / 2).backward()
        inputs = torch.full((1, 4), replica + 1.0, dtype=torch.float64, requires_grad=True)
        inputs.register_hook(lambda _: events.append("reached the input"))
        accelerator.backward(model(inputs).sum())
        return gap(model, alone)

    try:
        grad_sync._BUCKET_BYTES = 1
        dist.all_reduce, torch.Tensor.tolist = sending, looking
        model = accelerator.prepare(model)
        events.clear()
        found: list[Any] = [compare(model, alone)]
        seen, events[:] = list(events), []
        inputs = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
        inputs.register_hook(_fail)
        with pytest.raises(ArithmeticError):
            accelerator.backward(model(inputs).sum())
        found.append(compare(model, alone))
        handler = TorchTensorParallelConfig(plan={"layers.0": "colwise_rep", "layers.1": "colwise_rep"})
        accelerator.strategy.config.parallelism_config.tp_handler = handler
        nested, alone = Checkpointed().double(), Checkpointed().double()
        alone.load_state_dict(nested.state_dict())
        nested = accelerator.prepare(nested)
        found += [compare(nested, alone), compare(nested, alone)]
    finally:
        grad_sync._BUCKET_BYTES, dist.all_reduce, torch.Tensor.tolist = size, all_reduce, tolist
    return [seen, *found]


def test_gradients_are_sent_while_the_backward_runs(run_ranks):
    for rank, (seen, *gaps) in enumerate(run_ranks(4, _overlapped)):
        assert max(gaps) < 1e-12, (rank, gaps)
        assert seen.count("sent") >= 3 and seen.index("sent") < seen.index("reached the input")
        assert "looked" not in seen


# Memory --------------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Records the most bytes that tensors made by operations have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        # Not references to tensors, with which torch 2.6 crashes once a DTensor is made of one.
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        with torch.no_grad():  # else a view of the local part
            made = [local_tensor(tensor) for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]
        for storage in [tensor.untyped_storage() for tensor in made if not tensor.is_meta]:
            self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.live())
        return out

    def live(self) -> int:
        """The bytes that are held now."""
        return sum(nbytes for storage, nbytes in self._made.values() if not storage.expired())


def _moved() -> tuple[int, int, int, int]:
    """What a rank that has no weights holds after `prepare` and at its peak, the bytes of the model, and of a tensor."""
    accelerator = _run(None, tp_size=2)
    with torch.device("cpu" if accelerator.is_main_process else "meta"):
        model = Llama(width=64, layers=6)
    whole = sum(param.nbytes for param in model.parameters())
    largest = max(param.nbytes for param in model.parameters())
    frozen = [name for name, param in model.named_parameters() if not param.requires_grad]
    norm = model.norm.weight
    with Allocations() as allocations:
        model = accelerator.prepare(model)
    assert model.lm_head.weight is model.embed_tokens.weight and model.norm.weight is norm
    assert frozen == [name for name, param in model.named_parameters() if not param.requires_grad]
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return allocations.live(), allocations.peak, whole, largest


def test_no_rank_but_the_first_holds_more_than_its_shards_and_a_few_tensors(run_ranks):
    _, (held, peak, whole, largest) = run_ranks(2, _moved)
    assert 0.45 * whole < held < 0.55 * whole  # the norms are whole, everything else is cut in two
    assert peak <= held + 3 * largest  # gloo's thread holds a tensor that it has received for a moment longer


# What is refused -----------------------------------------------------------------------------------------------------


def _refusals() -> None:
    layers = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    cases: list[tuple[Any, nn.Module, str]] = [
        (None, nn.Linear(2, 2), "Linear has no plan for tensor parallelism"),
        ({"layers.*.up": "colwise"}, Mlp(4), r"names 'layers.\*.up', but Mlp has no such module"),
        ({"up_proj": "sideways"}, Mlp(4), "has 'sideways' for 'up_proj': choose from colwise"),
        ({"0": "colwise"}, nn.Sequential(nn.Linear(2, 5)), r"0 cannot be sharded over 2 ranks .*5 = 2 x 2 \+ 1"),
        ({"lm_head": "colwise_rep"}, Llama(), "different shardings .*embed_tokens.weight: unsharded"),
        ({"lm_head": "rowwise", "embed_tokens": "embedding_rowwise"}, Llama(), "lm_head.weight: along dimension 1"),
        (layers, Mlp(4).to("meta"), "'gate_proj.weight' is on the meta device of rank 0 and holds no values"),
    ]
    for plan, model, message in cases:
        before = list(model.parameters())
        accelerator = _run(plan, tp_size=2)
        with pytest.raises(ValueError, match=message):
            accelerator.prepare(model)
        assert all(a is b for a, b in zip(model.parameters(), before, strict=True))

    accelerator = _run(layers, tp_size=2)
    model = Mlp(4)
    stepped = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    stepped.step()
    with pytest.raises(ValueError, match="has stepped already"):
        accelerator.prepare(model, stepped)
    with pytest.raises(ValueError, match="holds parameters of a model that has not been prepared"):
        accelerator.prepare(torch.optim.AdamW(Mlp(4).parameters()))
    with pytest.raises(ValueError, match="join_uneven_inputs does not work"), accelerator.join_uneven_inputs([model]):
        pass
    AcceleratorState._reset_state()
    with pytest.raises(ValueError, match="fp16"):
        Accelerator(cpu=True, mixed_precision="fp16", parallelism_config=ParallelismConfig(tp_size=2))


def test_what_cannot_be_shared_is_refused_and_nothing_changed(run_ranks):
    run_ranks(2, _refusals)


def _impossible(**sizes: int) -> list[str]:
    said = []
    with pytest.raises(ValueError) as caught:
        Accelerator(cpu=True, parallelism_config=ParallelismConfig(**sizes))
    said.append(str(caught.value))
    for version, given in ((1, {"dp_shard_size": 1, "tp_size": 2}), (1, {"cp_size": 2}), (2, {"dp_replicate_size": 2})):
        AcceleratorState._reset_state()
        with pytest.raises(ValueError) as caught:
            plugin = FullyShardedDataParallelPlugin(fsdp_version=version)
            Accelerator(cpu=True, fsdp_plugin=plugin, parallelism_config=ParallelismConfig(**given))
        said.append(str(caught.value))
    return said


def test_an_impossible_mesh_is_one_clear_error(run_ranks):
    for product, first, second, alone in run_ranks(2, _impossible, dp_replicate_size=2, tp_size=2):
        assert "dp_replicate_size 2 x tp_size 2 = 4 ranks, but 2 processes take part" in product
        assert "tp_size=2" in first and "cp_size=2" in second and "it needs version 2" in first + second
        assert "dp_shard_size, cp_size, sp_size or tp_size above 1" in alone


# Models that come with shared tensors --------------------------------------------------------------------------------


def _shared_before() -> tuple[float, str]:
    accelerator = _run(None, dp_replicate_size=2, tp_size=2)
    torch.manual_seed(0)
    alone, model = Mlp(4), Mlp(4)
    model.load_state_dict(alone.state_dict())
    plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    parallelize_module(model, accelerator.torch_device_mesh["tp"], plan)
    with torch.no_grad():  # replicas start from the weights of the first
        for param in model.parameters():
            param.add_(accelerator.data_parallel_rank)
    model = accelerator.prepare(model)
    gap = float((model(torch.ones(1, 4)) - alone(torch.ones(1, 4))).abs().max())
    elsewhere = parallelize_module(Mlp(4), init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)), plan)
    with pytest.raises(ValueError, match="not the dimension 'tp' of this run's mesh") as caught:
        accelerator.prepare(elsewhere)
    return gap, str(caught.value)


def test_a_model_that_comes_with_shared_tensors_is_taken_as_it_is(run_ranks):
    for gap, said in run_ranks(4, _shared_before):
        assert gap < 1e-6 and "(tp_size=2): load it unsharded" in said


def _older_plugin() -> list[tuple[int, int, str]]:
    PartialState(cpu=True)
    given = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "tp"))
    found = []
    for mesh in (None, given):
        AcceleratorState._reset_state()
        plugin = TorchTensorParallelPlugin(tp_size=4 if mesh is None else 2, torch_device_mesh=mesh)
        accelerator = Accelerator(cpu=True, torch_tp_plugin=plugin)
        ranks = accelerator.strategy.data_shard()
        found.append((accelerator.torch_device_mesh["tp"].size(), ranks.count, type(accelerator.strategy).__name__))
    AcceleratorState._reset_state()
    with pytest.raises(ValueError, match="tp_size=4 and torch_device_mesh=.* needs a dimension 'tp' of that size"):
        Accelerator(cpu=True, torch_tp_plugin=TorchTensorParallelPlugin(tp_size=4, torch_device_mesh=given))
    return found


def test_the_older_plugin_asks_for_the_same(run_ranks):
    assert run_ranks(4, _older_plugin) == [[(4, 1, "TensorParallelStrategy"), (2, 2, "TensorParallelStrategy")]] * 4
