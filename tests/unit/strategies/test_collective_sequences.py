"""Every rank of a strategy calls the same collectives in the same order, at sizes that no test machine has processes for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from tests.helpers.recorded_collectives import Recorded, rank_of
from tests.helpers.sharding import Block, plugin


def step(rank: int, size: int, version: int, sizes: dict[str, int]) -> list[Recorded]:
    """What one rank calls: preparing, a step with clipping, gathering, waiting."""
    try:
        with rank_of(rank, size) as found:
            torch.manual_seed(0)
            options: dict[str, Any] = {
                "fsdp_plugin": plugin(version, **({"use_orig_params": True} if version == 1 else {}))
            }
            if sizes:
                options["parallelism_config"] = ParallelismConfig(**sizes)
            accelerator = Accelerator(cpu=True, **options)
            model = nn.Sequential(Block(64), Block(64))
            model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            accelerator.backward(model(torch.ones(2, 64)).sum())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            accelerator.gather(torch.ones(2))
            accelerator.reduce(torch.ones(2))
            accelerator.wait_for_everyone()
            return list(found)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.mark.parametrize(("version", "replicas"), [(1, 1), (2, 1), (2, 4)], ids=["FSDP 1", "FSDP 2", "HSDP"])
@pytest.mark.parametrize("size", [8, 64])
def test_ranks_call_the_same_collectives(size, version, replicas):
    sizes = {"dp_replicate_size": replicas, "dp_shard_size": size // replicas} if replicas > 1 else {}
    first, second, last = (step(rank, size, version, sizes) for rank in (0, 1, size - 1))
    assert first == second == last
    names = {name for name, *_ in first}
    assert any("allgather" in name or "all_gather" in name for name in names), names
    assert any("reduce" in name for name in names), names
