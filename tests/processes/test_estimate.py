"""What `accelerate estimate-memory` says of a rank, beside what real ranks hold: equal to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accelerate import Accelerator
from accelerate.commands.estimate.sharding import Sharding, rank_memory
from accelerate.commands.estimate.step import trace_units
from accelerate.strategies.fsdp_base import find_units
from tests.helpers.releases import fsdp
from tests.helpers.sharding import Tiny, plugin

PARTS = ("weights", "gradients", "optimizer")


class Model(Tiny):
    """The small language model, as the estimator calls one."""

    main_input_name = "input_ids"

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids)


def _stored(tensors: Any) -> int:
    local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def _held(version: int, fields: dict[str, Any]) -> dict[str, int]:
    """Bytes of storage behind what this rank holds at the end of a backward."""
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin(version, **fields))
    model = Model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(torch.zeros(2, 3, dtype=torch.long)).sum())
    gradients = _stored(param.grad for param in model.parameters() if param.grad is not None)
    optimizer.step()
    states = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    return dict(zip(PARTS, (_stored((*model.parameters(), *model.buffers())), gradients, _stored(states)), strict=True))


@pytest.mark.parametrize("version, fields", [fsdp(1, {"use_orig_params": True}), fsdp(2, {})])
def test_a_rank_holds_what_is_estimated(run_ranks: Any, version: int, fields: dict[str, Any]) -> None:
    def choose(model: Any) -> Any:
        mine = plugin(version, **fields)
        mine.set_auto_wrap_policy(model)
        return find_units(model, mine.auto_wrap_policy)

    with torch.device("meta"):
        empty = Model()
    step = trace_units(empty, 2, 3, units=choose)
    for rank, held in enumerate(run_ranks(2, _held, version, fields)):
        guess = rank_memory(step, Sharding(ranks=2, version=version), rank)
        assert held == {part: getattr(guess, part) for part in PARTS}, rank
