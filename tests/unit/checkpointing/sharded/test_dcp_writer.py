"""Metadata of DCP folders: complete, or an error that names the tensor."""

from __future__ import annotations

import pytest
import torch

from accelerate.checkpointing.sharded.dcp_writer import WriteItem, WriteResult, build_metadata
from accelerate.checkpointing.sharded.shard_layout import Chunk

CHUNKS = [Chunk((0, 0), (1, 3)), Chunk((1, 0), (1, 3))]


def results(*chunks: Chunk) -> list[WriteResult]:
    items = [WriteItem((("model", "w"), ("model", "tied")), (2, 3), chunk) for chunk in chunks]
    return [WriteResult(item, torch.float32, "__0_0.distcp", 0, 9) for item in items]


def test_all_names_of_a_tensor_have_its_chunks_once() -> None:
    metadata = build_metadata(results(*CHUNKS, CHUNKS[0]))
    assert {name: len(value.chunks) for name, value in metadata.state_dict_metadata.items()} == {
        "model.w": 2,
        "model.tied": 2,
    }


def test_gaps_are_named() -> None:
    with pytest.raises(ValueError, match=r"model\.w overlap or do not cover the shape \[2, 3\]"):
        build_metadata(results(CHUNKS[0]))
