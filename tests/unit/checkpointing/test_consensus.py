"""Steps that all ranks take: errors on one are errors on all, and debug mode finds calls that only some make."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accelerate.checkpointing import SaveError
from accelerate.checkpointing.consensus import check_called_by_all_ranks, run_on_all_ranks
from accelerate.runtime.collective_backend import Collectives


class Pair(Collectives):
    """Two ranks, of which the other sends `reply`."""

    def __init__(self, reply: Any) -> None:
        super().__init__(torch.device("cpu"), rank=0, size=2)
        self.reply = reply

    def all_gather_object(self, obj: Any) -> list[Any]:
        return [obj, self.reply]


def test_an_error_of_another_rank_is_raised() -> None:
    assert run_on_all_ranks(Pair((None, 2)), "counting", lambda: 1, SaveError) == [1, 2]
    with pytest.raises(SaveError, match="counting failed: on rank 1: OSError: full"):
        run_on_all_ranks(Pair(("OSError: full", None)), "counting", lambda: 1, SaveError)


class Flags:
    is_main_process = True
    process_index = 0


def saved(ranks: Collectives) -> None:
    def save_state() -> None:
        check_called_by_all_ranks(ranks, "save_state")

    save_state()


def test_calls_that_only_some_ranks_make_are_rejected() -> None:
    accelerator, ranks = Flags(), Pair((None, None))
    saved(ranks)
    with pytest.raises(RuntimeError, match=r"save_state is called under `if accelerator\.is_main_process`"):
        if accelerator.is_main_process:
            saved(ranks)
    with pytest.raises(RuntimeError, match="only some processes call it"):
        if accelerator.process_index == 0:
            saved(ranks)
    if accelerator.is_main_process:
        saved(Collectives(torch.device("cpu")))
