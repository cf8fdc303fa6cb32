"""Names and shapes of weights: what a checkpoint lacks or has too much, tied names and what is no tensor left alone."""

from __future__ import annotations

import torch

from accelerate.checkpointing.sharded.compat import (
    compare_weights,
    compatible_entries,
    group_ties,
    missing_keys,
    tied_names,
)
from accelerate.checkpointing.sharded.shard_layout import LocalShard, full_layout
from accelerate.checkpointing.sharded.state_reader import lazy_tensor

W, V = torch.ones(2, 3), torch.ones(4)


def found(live: dict[str, object], saved: dict[str, object], *tied: list[str]) -> list[str]:
    return [str(one) for one in compare_weights("m", "Net", live, saved, tied_names(live), group_ties(tied))]


def test_everything_that_differs_is_told() -> None:
    live = {"a": W, "b": V, "c": torch.ones(1)}
    saved = {"a": W.T, "d": V, "c": "text"}
    assert found(live, saved) == [
        "m: missing: no 'b' of shape [4], which Net has",
        "m: extra: 'd' of shape [4], which Net does not have",
        "m: shape: 'a' is of shape [3, 2], and of shape [2, 3] in Net",
        "m: shape: 'c' is, and of shape [1] in Net",
    ]
    assert compatible_entries(live, saved) == {}
    assert list(compatible_entries(live, {**saved, "b": V})) == ["b"]


def test_one_name_of_a_tied_tensor_will_do() -> None:
    assert found({"a": W, "b": W}, {"b": W}) == []
    assert found({"a": W}, {"a": W, "b": W}, ["a", "b"]) == []
    assert found({"a": W}, {"a": W, "b": W}, ["b", "c"]) != []
    assert missing_keys({"a": W, "b": W}, {}, tied_names({"a": W, "b": W})) == ["a", "b"]


def test_what_ranks_hold_is_compared_by_the_whole_shape() -> None:
    shard = LocalShard(full_layout((2, 3), is_writer=True), torch.ones(0))
    assert found({"a": shard}, {"a": lazy_tensor(W)}) == []
    assert found({"a": shard}, {"a": lazy_tensor(V)}) == ["m: shape: 'a' is of shape [4], and of shape [2, 3] in Net"]


def test_what_a_module_keeps_besides_tensors_is_its_own_business() -> None:
    assert found({"a._extra_state": W, "_extra_state": None}, {"a._extra_state": V, "_extra_state": V}) == []
