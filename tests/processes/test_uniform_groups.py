"""torch's foreach and fused kernels step models of which some parameters are DTensors and others are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig
from tests.helpers.llama import VOCABULARY, Llama
from tests.helpers.releases import FSDP2_ON_CPU

RunRanks = Callable[..., list[Any]]
WAYS: dict[str, dict[str, Any]] = {
    "tensor parallel": {"parallelism_config": ParallelismConfig(tp_size=2)},
    "FSDP 2, parts left whole": {
        "fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=2, ignored_modules=r"norm|layers\.1\.mlp")
    },
}


def stepped(way: str, **options: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Two steps of AdamW with all parameters in one group; weights, and the groups after them."""
    accelerator = Accelerator(cpu=True, **WAYS[way])
    torch.manual_seed(0)
    model: Any = Llama().double()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    model, optimizer = accelerator.prepare(model, optimizer)
    kinds = {isinstance(param, DTensor) for param in optimizer.param_groups[0]["params"]}
    assert kinds == {True, False}
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        accelerator.backward(model(torch.arange(8).remainder(VOCABULARY)[None]).square().mean())
        optimizer.step()
    groups = [{**group, "params": len(group["params"])} for group in optimizer.param_groups]
    return {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}, groups


@pytest.mark.parametrize("way", [pytest.param(way, marks=FSDP2_ON_CPU if "FSDP" in way else ()) for way in WAYS])
def test_kernels_over_lists_step_both_kinds(run_ranks: RunRanks, way: str) -> None:
    expected, (group,) = run_ranks(2, stepped, way)[0]
    assert group["params"] == len(list(Llama().parameters()))
    for options in ({"foreach": True}, {"fused": True}):
        found, groups = run_ranks(2, stepped, way, **options)[0]
        assert [each["params"] for each in groups] == [group["params"]]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


class CountingSGD(torch.optim.SGD):
    """Keeps a count in its groups, and fails at the third step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            if group["count"] == 3:
                raise RuntimeError("enough")
        return super().step(closure)


def counted() -> tuple[list[int], list[int]]:
    accelerator = Accelerator(cpu=True, **WAYS["tensor parallel"])
    model: Any = Llama()
    optimizer: Any = CountingSGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(torch.arange(8)[None]).sum())
    optimizer.step()
    optimizer.step()
    counts = [group["count"] for group in optimizer.param_groups]
    with pytest.raises(RuntimeError, match="enough"):
        optimizer.step()
    return counts, [len(group["params"]) for group in optimizer.param_groups]


def test_groups_are_what_they_were_after_a_step_and_after_one_that_fails(run_ranks: RunRanks) -> None:
    counts, lengths = run_ranks(2, counted)[0]
    assert counts == [2]
    assert lengths == [len(list(Llama().parameters()))]
