"""Which chunks of a sequence each rank has: arithmetic, and no process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as draw

from accelerate.strategies.parallel.context.ring_attention import SequenceSharding


@given(ranks=draw.integers(1, 6), chunks=draw.integers(1, 8), dim=draw.integers(-2, 1))
def test_the_parts_are_the_whole(ranks, chunks, dim):
    length = ranks * chunks
    sharding = SequenceSharding.for_length(length, ranks)
    whole = torch.arange(3 * length).view(3, length) if dim in (1, -1) else torch.arange(3 * length).view(length, 3)
    parts = [sharding.shard(whole, dim, rank) for rank in range(ranks)]
    assert {part.shape[dim] for part in parts} == {chunks}
    assert torch.equal(sharding.unshard(parts, dim), whole)
    assert sorted(number for rank in range(ranks) for number in sharding.chunks_of_rank(rank)) == list(
        range(sharding.num_chunks)
    )


def test_each_rank_has_as_much_to_do_under_a_causal_mask():
    sharding = SequenceSharding.for_length(24, 3)
    assert sharding.head_tail and [sharding.chunks_of_rank(rank) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert len({sum(number + 1 for number in sharding.chunks_of_rank(rank)) for rank in range(3)}) == 1
    assert not SequenceSharding.for_length(9, 3).head_tail


def test_what_cannot_be_cut_is_told_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"10 tokens cannot be cut into 4 equal parts.*10 = 2 x 4 \+ 2: pad it"):
        SequenceSharding.for_length(10, 4)
    with pytest.raises(ValueError, match=r"\(sp_size=2\), since 7 = 3 x 2 \+ 1: pad it to a multiple of 2\.$"):
        SequenceSharding.for_length(7, 2, setting="sp_size", contiguous=True)


def test_pieces_in_order():
    sharding = SequenceSharding.for_length(8, 2, contiguous=True)
    assert sharding.shard(torch.arange(8), 0, 1).tolist() == [4, 5, 6, 7] and not sharding.head_tail
