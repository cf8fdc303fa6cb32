"""Chunks of a tensor: tilings are recognized, in about linear time."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerate.checkpointing.sharded import shard_layout
from accelerate.checkpointing.sharded.shard_layout import flat_range_to_layout, is_tiled

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def chunks_in(draw: Any) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    shape = draw(shapes)
    some = []
    for _ in range(draw(st.integers(0, 4))):
        offsets = tuple(draw(st.integers(0, size)) for size in shape)
        some.append((offsets, tuple(draw(st.integers(0, size - at)) for size, at in zip(shape, offsets, strict=True))))
    return shape, some


@given(chunks_in())
def test_is_tiled_agrees_with_counting_elements(case: Any) -> None:
    shape, chunks = case
    counts = torch.zeros(shape, dtype=torch.int)
    for offsets, sizes in chunks:
        counts[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))] += 1
    assert is_tiled(shape, chunks) == bool((counts == 1).all())


@given(shapes, st.lists(st.integers(0, 64), max_size=5))
def test_flat_ranges_tile_the_tensor(shape: tuple[int, ...], cuts: list[int]) -> None:
    count = torch.Size(shape).numel()
    places = [0, *sorted(min(cut, count) for cut in cuts), count]
    layouts = [flat_range_to_layout(shape, start, stop, 0, True) for start, stop in itertools.pairwise(places)]
    chunks = [(chunk.offsets, chunk.sizes) for layout in layouts for chunk in layout.chunks]
    assert is_tiled(shape, chunks)
    filled = [chunk for chunk in chunks if torch.Size(chunk[1]).numel()]
    assert not filled or not is_tiled(shape, [*chunks, filled[0]])


@pytest.mark.parametrize("along", [0, 1])
def test_chunks_are_compared_with_few_others(along: int, monkeypatch: pytest.MonkeyPatch) -> None:
    count, compared, overlap = 3000, [0], shard_layout.overlap

    def counted(*args: Any) -> Any:
        compared[0] += 1
        return overlap(*args)

    monkeypatch.setattr(shard_layout, "overlap", counted)
    shape = (count, 5) if along == 0 else (5, count)
    chunks = [((at, 0), (1, 5)) if along == 0 else ((0, at), (5, 1)) for at in reversed(range(count))]
    assert is_tiled(shape, chunks) and compared[0] < 2 * count


@pytest.mark.parametrize("chunks", [[((0,), (2, 1))], [((-1, 0), (3, 2))], [((0, 0), (3, 1)), ((0, 1), (2, 2))]])
def test_chunks_outside_the_shape(chunks: Any) -> None:
    assert not is_tiled((2, 2), chunks)
