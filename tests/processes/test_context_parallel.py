"""Context parallelism on real ranks: attention over a cut sequence is attention, and what would go past it is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as by_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.strategies.parallel.context.ring_attention import (
    SequenceSharding,
    allgather_kv_attention,
    ring_attention,
)
from accelerate.utils import TorchContextParallelConfig

attention = functional.scaled_dot_product_attention


def _differences(length: int) -> dict[str, float]:
    """To attention over the whole sequence, forwards and backwards, for each way of sharing it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group, sharding = dist.group.WORLD, SequenceSharding.for_length(length, dist.get_world_size())
    found = {}
    for causal, heads, scale in itertools.product((True, False), (4, 2), (None, 0.3)):
        torch.manual_seed(1)
        whole = [
            torch.randn(2, count, length, 6, dtype=torch.float64, requires_grad=True) for count in (4, heads, heads)
        ]
        weights = torch.randn(2, 4, length, 6, dtype=torch.float64)
        shared = {"enable_gqa": heads != 4}
        expected = attention(*whole, is_causal=causal, scale=scale, **shared)
        (expected * weights).sum().backward()
        for way in ("gathered", "ring"):
            own = [sharding.shard(tensor.detach(), 2, rank).requires_grad_() for tensor in whole]
            how: dict[str, Any] = {"group": group, "sharding": sharding, "is_causal": causal, "scale": scale}
            result = (
                allgather_kv_attention(attention, *own, **how, **shared)
                if way == "gathered"
                else ring_attention(*own, **how)
            )
            (result * sharding.shard(weights, 2, rank)).sum().backward()
            pairs = [(result, expected), *((a.grad, b.grad) for a, b in zip(own, whole, strict=True))]
            worst = max(float((mine - sharding.shard(all_of, 2, rank)).abs().max()) for mine, all_of in pairs)
            found[f"{way}, causal={causal}, heads={heads}, scale={scale}, of {size}"] = worst
    return found


class Largest(TorchDispatchMode):
    """Records the most elements of a tensor that an operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [tensor.numel() for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]
        self.found = max([self.found, *made])
        return out


def _memory(way: str, length: int) -> tuple[int, int]:
    """The elements of the largest tensor in a forward and backward of two heads, and what is saved for the latter."""
    group, sharding = dist.group.WORLD, SequenceSharding.for_length(length, dist.get_world_size())
    own = [
        torch.randn(1, heads, length // sharding.ranks, 4, requires_grad=True)
        for heads in ((2, 1, 1) if way == "gathered" else (2, 2, 2))
    ]
    how: dict[str, Any] = {"group": group, "sharding": sharding, "is_causal": True}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with Largest() as largest, saved_tensors_hooks(note, lambda tensor: tensor):
        result = (
            allgather_kv_attention(attention, *own, **how, enable_gqa=True)
            if way == "gathered"
            else ring_attention(*own, **how)
        )
        kept = sum(saved.values())
        result.sum().backward()
    return largest.found, kept


@pytest.mark.parametrize("way", ["gathered", "ring"])
def test_memory_does_not_grow_with_the_square_of_the_length(way, run_ranks):
    for (small, kept), (large, more) in zip(
        run_ranks(2, _memory, way, 2048), run_ranks(2, _memory, way, 8192), strict=True
    ):
        assert large <= 2 * 256 * 8192 and large <= 4.1 * small
        assert more <= 4.1 * kept


@pytest.mark.parametrize(("ranks", "length"), [(2, 8), (2, 6), (2, 1048), (3, 12), (3, 9), (3, 789)])
def test_shared_attention_is_attention(ranks, length, run_ranks):
    for found in run_ranks(ranks, _differences, length):
        assert len(found) == 16 and max(found.values()) < 1e-12, found


# The block -----------------------------------------------------------------------------------------------------------


class Attend(nn.Module):
    """One head of attention; how it is reached differs."""

    def __init__(self, way: str = "module", dropout: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4).double()
        self.way, self.dropout = way, dropout

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        heads = self.inner(x)[:, None]
        other = heads if keys is None else keys[:, None]
        if self.way == "own":
            return (heads @ heads.mT).softmax(-1) @ heads
        if mask is not None:
            return functional.scaled_dot_product_attention(heads, other, other, mask)
        return functional.scaled_dot_product_attention(heads, other, other, dropout_p=self.dropout, is_causal=True)


class ByName(Attend):
    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return by_name(x[:, None], x[:, None], x[:, None], is_causal=True)


def _accelerator(method: str = "allgather") -> Accelerator:
    handler = TorchContextParallelConfig(method)
    return Accelerator(cpu=True, parallelism_config=ParallelismConfig(cp_size=2, cp_handler=handler))


def _cut_and_whole_again() -> None:
    accelerator = _accelerator()
    rows = torch.arange(18).view(2, 9)
    tokens, truths, positions = rows[:, :-1], rows[:, 1:], torch.arange(8).expand(2, -1)
    before = [tensor.clone() for tensor in (tokens, truths, positions)]
    rank = accelerator.context_parallel_rank
    held = [0, 1, 6, 7] if rank == 0 else [2, 3, 4, 5]
    with pytest.raises(KeyError), accelerator.maybe_context_parallel([tokens, truths, positions], [1, -1, 1], {truths}):
        assert positions.tolist() == [held, held]
        assert tokens.tolist() == before[0][:, held].tolist() and truths.tolist() == before[1][:, held].tolist()
        assert functional.scaled_dot_product_attention is not attention
        raise KeyError
    assert functional.scaled_dot_product_attention is attention
    assert torch.equal(tokens, before[0]) and torch.equal(positions, before[2])
    assert torch.equal(truths, before[1][:, held])  # need not be whole again
    assert rows.tolist() == torch.arange(18).view(2, 9).tolist()


def test_buffers_are_cut_in_the_block(run_ranks):
    run_ranks(2, _cut_and_whole_again)


def _refusals() -> None:
    accelerator = _accelerator()
    x = torch.randn(2, 8, 4, dtype=torch.float64)
    share = accelerator.maybe_context_parallel
    cases: list[tuple[Any, str]] = [
        (([x], None), "buffers has 1 tensors, buffer_seq_dims 0 numbers"),
        (([x[:, :7]], [1]), r"7 tokens cannot be cut into 2 equal parts \(cp_size=2\)"),
        (([x, x[:, :4]], [1, 1]), r"different lengths \[4, 8\]"),
        (([x], [3]), "names dimension 3 of a tensor of shape"),
        (([x.clone().requires_grad_()], [1]), "found a tensor that requires gradients"),
        (([[1, 2]], [0]), "found list"),
        (([x], [1], {x.clone()}), "not among buffers"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message), share(*arguments):
            raise AssertionError("the block must not be entered")
        assert x.shape == (2, 8, 4)

    model = accelerator.prepare(Attend())
    padded = torch.ones(4, 4, dtype=torch.bool).tril()
    padded[:, 0] = False
    with share([x], [1]):
        with pytest.raises(ValueError, match="not this mask"):
            model(x, padded)
        with pytest.raises(ValueError, match="found 4 queries and 5 keys"):
            model(x, None, torch.randn(2, 5, 4, dtype=torch.float64))
        expected = model(x)
        # What a model makes of its part, and of positions that jump from one chunk to the next.
        apart = torch.ones(4, 4, dtype=torch.bool).tril()
        assert torch.equal(model(x, apart), expected)
        apart[2:, :2] = False
        assert torch.equal(model(x, torch.zeros(4, 4).masked_fill(~apart, -1e9).double()), expected)
    mine = {0: [0, 1, 6, 7], 1: [2, 3, 4, 5]}[accelerator.process_index]
    torch.testing.assert_close(expected, model(x)[:, :, mine], rtol=0, atol=1e-12)

    escaping = accelerator.prepare(ByName())
    with pytest.raises(ValueError, match=r"ByName.forward \(as 'by_name'\) refers to the function"), share([x], [1]):
        escaping(x)
    assert x.shape == (2, 8, 4)


def test_what_cannot_be_shared_is_refused(run_ranks):
    run_ranks(2, _refusals)


def _goes_another_way() -> tuple[str, float, str]:
    """What is said of a model with attention of its own, and what dropping out in attention comes to."""
    x = torch.randn(2, 8, 4, dtype=torch.float64)
    accelerator = _accelerator()
    own = accelerator.prepare(Attend("own"))
    with (
        pytest.raises(RuntimeError, match="did not go through") as caught,
        accelerator.maybe_context_parallel([x], [1]),
    ):
        own(x)
    model = accelerator.prepare(Attend(dropout=0.5))
    with accelerator.maybe_context_parallel([x], [1]):
        dropped = float((model(x) - model(x)).abs().max())
    AcceleratorState._reset_state()
    accelerator = _accelerator("alltoall")
    model = accelerator.prepare(Attend(dropout=0.5))
    with pytest.raises(ValueError) as refused, accelerator.maybe_context_parallel([x], [1]):
        model(x)
    return str(caught.value), dropped, str(refused.value)


def test_attention_of_another_kind_is_noticed(run_ranks):
    for said, dropped, refused in run_ranks(2, _goes_another_way):
        assert "attn_implementation='sdpa'" in said and dropped > 0
        assert "drops out 0.5 of its weights, which cp_comm_strategy='alltoall' cannot" in refused
