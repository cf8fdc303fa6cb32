"""Comparison of weights by name and shape: missing and extra keys, tied tensors, values other than tensors."""

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


def test_all_differences_are_listed() -> None:
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


def test_one_name_of_a_tied_tensor_suffices() -> None:
    assert found({"a": W, "b": W}, {"b": W}) == []
    assert found({"a": W}, {"a": W, "b": W}, ["a", "b"]) == []
    assert found({"a": W}, {"a": W, "b": W}, ["b", "c"]) != []
    assert missing_keys({"a": W, "b": W}, {}, tied_names({"a": W, "b": W})) == ["a", "b"]


def test_local_shards_are_compared_by_full_shape() -> None:
    shard = LocalShard(full_layout((2, 3), is_writer=True), torch.ones(0))
    assert found({"a": shard}, {"a": lazy_tensor(W)}) == []
    assert found({"a": shard}, {"a": lazy_tensor(V)}) == ["m: shape: 'a' is of shape [4], and of shape [2, 3] in Net"]


def test_extra_state_is_not_compared() -> None:
    assert found({"a._extra_state": W, "_extra_state": None}, {"a._extra_state": V, "_extra_state": V}) == []
