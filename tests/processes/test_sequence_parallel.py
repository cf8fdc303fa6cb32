"""Sequence parallelism on real ranks: heads exchanged for tokens are attention over the whole, and the rest is refused."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as draw
from torch import nn
from torch.nn import functional

from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.local_sgd import LocalSGD
from accelerate.state import AcceleratorState
from accelerate.strategies.parallel.context.ring_attention import SequenceSharding
from accelerate.strategies.parallel.context.ulysses import ulysses_attention
from accelerate.utils import DeepSpeedSequenceParallelConfig

attention = functional.scaled_dot_product_attention


def _part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's tokens."""
    sharding = SequenceSharding.for_length(tensor.shape[-2], dist.get_world_size(), contiguous=True)
    return sharding.shard(tensor, -2, dist.get_rank())


def _worst(
    batch: tuple[int, ...], heads: int, keys: int, tokens: int, widths: tuple[int, int], mask: str | None, **more: Any
) -> float:
    """The largest difference to attention on one rank: of results, and of gradients of queries, keys, values and mask."""
    length = tokens * dist.get_world_size()
    torch.manual_seed(1)
    shapes = [(heads, widths[0]), (keys, widths[0]), (keys, widths[1])]
    whole = [torch.randn(*batch, n, length, width, dtype=torch.float64, requires_grad=True) for n, width in shapes]
    weights = torch.randn(*batch, heads, length, widths[1], dtype=torch.float64)
    if mask == "keys":
        more["attn_mask"] = torch.rand(*batch, 1, 1, length) > 0.3
        more["attn_mask"][..., 0] = True
    elif mask is not None:
        size = (length, length) if mask == "all heads" else (*batch, heads, length, length)
        more["attn_mask"] = torch.randn(size, dtype=torch.float64, requires_grad=True)
    masks = [one for one in (more.get("attn_mask"),) if one is not None and one.requires_grad]
    if keys < heads:
        more["enable_gqa"] = True
    expected = attention(*whole, **more)
    (expected * weights).sum().backward()
    of_masks = [one.grad for one in masks]
    for one in masks:
        one.grad = None
    own = [_part(tensor.detach()).requires_grad_() for tensor in whole]
    result = ulysses_attention(attention, *own, group=dist.group.WORLD, **more)
    (result * _part(weights)).sum().backward()
    for one in masks:  # each rank has what its heads say of it
        dist.all_reduce(one.grad)
    pairs = [(result, _part(expected)), *((a.grad, _part(b.grad)) for a, b in zip(own, whole, strict=True))]
    pairs += [(one.grad, before) for one, before in zip(masks, of_masks, strict=True)]
    return max(float((mine - other).abs().max()) for mine, other in pairs)


@settings(max_examples=15, deadline=None)
@given(
    ranks=draw.sampled_from((2, 3)),
    keys=draw.integers(1, 3),
    shared=draw.integers(1, 2),
    batch=draw.sampled_from(((), (2,))),
    tokens=draw.integers(1, 3),
    widths=draw.sampled_from(((4, 4), (4, 6))),
    how=draw.sampled_from(({}, {"is_causal": True}, {"scale": 0.3})),
    mask=draw.sampled_from((None, None, "keys", "all heads", "each head")),
)
def test_exchanged_heads_are_attention(ranks, keys, shared, batch, tokens, widths, how, mask, rank_pool):
    heads = shared * math.lcm(keys, ranks)  # a rank has some heads of keys, or one with others, or one in part
    more = {} if mask is not None else how
    found = rank_pool.run(ranks, _worst, batch, heads, keys, tokens, widths, mask, **more)
    assert max(found) <= 1e-12, found


def _dropped() -> None:
    """Each rank drops out weights of its heads, as it would on its own with these."""
    torch.manual_seed(0)
    whole = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64)
    expected = []
    for own in whole.chunk(2, 2):
        torch.manual_seed(5)
        expected.append(attention(*own, dropout_p=0.5))
    torch.manual_seed(5)
    found = ulysses_attention(attention, *map(_part, whole), group=dist.group.WORLD, dropout_p=0.5)
    torch.testing.assert_close(found, _part(torch.cat(expected, 1)), rtol=0, atol=1e-12)


def test_dropout_is_that_of_whole_sequences(run_ranks):
    run_ranks(2, _dropped)


# Blocks --------------------------------------------------------------------------------------------------------------


class Attend(nn.Module):
    """Attention of `heads` heads, and what goes to it as it comes."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4).double()
        self.heads = heads

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, causal: bool = False) -> torch.Tensor:
        split = self.inner(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(split, split, split, mask, is_causal=causal)
        return mixed.transpose(1, 2).flatten(-2)


class Configured(Attend):
    """A model that says of itself what transformers' do."""

    def __init__(self, heads: int, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = type("Config", (), {"num_attention_heads": heads, "_attn_implementation": attention})()

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x)


class Adapted(Configured):
    """A model that holds another and does not name what it hands on, as peft's do."""

    def __init__(self) -> None:
        super().__init__(2)
        self.base = Configured(2)

    def get_base_model(self) -> nn.Module:
        return self.base

    def forward(self, x: torch.Tensor, **more: Any) -> torch.Tensor:
        return self.base(x, **more)


def _accelerator(handler: DeepSpeedSequenceParallelConfig | None = None, **sizes: int) -> Accelerator:
    AcceleratorState._reset_state()
    return Accelerator(cpu=True, parallelism_config=ParallelismConfig(sp_handler=handler, **(sizes or {"sp_size": 2})))


def _masks() -> None:
    accelerator = _accelerator()
    assert accelerator.torch_device_mesh["sp"].size() == 2
    torch.manual_seed(0)
    model = accelerator.prepare(Attend())
    x = torch.randn(2, 8, 4, dtype=torch.float64)
    kept = torch.ones(2, 8, dtype=torch.bool)
    kept[1, 5:] = False
    triangle = torch.ones(8, 8, dtype=torch.bool).tril()
    masks = {"padding": kept[:, None, None], "padded and causal": kept[:, None, None] & triangle, "causal": triangle}
    given: dict[str, tuple[Any, ...]] = {name: (mask,) for name, mask in masks.items()}
    given |= {"added": (torch.zeros(8, 8).double().masked_fill(~triangle, -1e9),), "none": (), "flag": (None, True)}
    held = slice(0, 4) if accelerator.process_index == 0 else slice(4, 8)
    rows = x.clone()
    for name, arguments in given.items():
        expected = model(rows, *arguments)[:, held]
        with accelerator.maybe_context_parallel([x], [1]):
            assert torch.equal(x, rows[:, held])
            found = model(x, *arguments)
            if name == "causal":  # what a model makes of its own tokens
                torch.testing.assert_close(model(x, triangle[:4, :4]), found)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=name)
    assert torch.equal(x, rows)
    with accelerator.maybe_context_parallel([x], [1]), pytest.raises(ValueError) as caught:
        model(x, kept[:, None, None, :4] & triangle[:4, :4].logical_not())
    assert "(..., 8, 8) or (..., 1, 8) for 2 ranks with 4 tokens" in str(caught.value)
    assert "(2, 1, 4, 4). Leave masks out of buffers" in str(caught.value)


def test_masks_are_those_of_the_whole_sequence(run_ranks):
    run_ranks(2, _masks)


def _refused() -> None:
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    accelerator = _accelerator()
    share = accelerator.maybe_context_parallel
    model = accelerator.prepare(Attend(1))
    message = r"sp_size=2 does not divide 1 heads, 1 = 0 x 2 \+ 1: choose a sp_size that does"
    with pytest.raises(ValueError, match=message), share([x], [1]):
        model(x)
    message = r"7 tokens cannot be cut into 2 equal parts \(sp_size=2\).*multiple of 2\.$"
    with pytest.raises(ValueError, match=message), share([torch.ones(7)], [0]):
        raise AssertionError("the block must not be entered")
    with pytest.raises(
        ValueError, match=r"Configured cannot divide.*does not divide num_attention_heads 3, 3 = 1 x 2 \+ 1"
    ):
        accelerator.prepare(Configured(3))
    with pytest.raises(ValueError, match="Configured has attn_implementation='eager'.*attn_implementation='sdpa'"):
        accelerator.prepare(Configured(4, "eager"))
    counting = accelerator.prepare(Configured(2))
    with share([x], [1]):
        counting(x, torch.arange(3))
        with pytest.raises(ValueError, match="Configured got no position_ids and would count them from 0"):
            counting(x)
        with pytest.raises(ValueError, match="Adapted got no position_ids"):
            accelerator.prepare(Adapted())(x)
    plain = accelerator.unwrap_model(model)
    for copied in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):  # hooks are no hindrance
        assert torch.equal(copied.inner.weight, plain.inner.weight)
    with pytest.raises(ValueError, match="deepspeed_ulysses_dl_adapter needs DeepSpeed.*maybe_context_parallel"):
        accelerator.deepspeed_ulysses_dl_adapter([], model)
    with pytest.raises(NotImplementedError, match="share its tensors or sequences"):
        LocalSGD(accelerator, model, 2)

    fixed = DeepSpeedSequenceParallelConfig(sp_seq_length=8, sp_seq_length_is_variable=False)
    share = _accelerator(fixed).maybe_context_parallel
    message = "sp_seq_length=8 with sp_seq_length_is_variable=False.*this batch has 6 tokens"
    with pytest.raises(ValueError, match=message), share([x], [1]):
        raise AssertionError("the block must not be entered")
    with share([torch.ones(8)], [0]):
        pass
    AcceleratorState._reset_state()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    with pytest.raises(ValueError, match="sp_size=2: with fully sharded training it needs version 2"):
        Accelerator(cpu=True, fsdp_plugin=plugin, parallelism_config=ParallelismConfig(sp_size=2))


def test_what_cannot_be_shared_is_refused(run_ranks):
    run_ranks(2, _refused)


def _data() -> tuple[list[int], list[int], float]:
    """What a rank reads, what is gathered for metrics, and the mean of a loss."""
    accelerator = _accelerator(dp_replicate_size=2, sp_size=2)
    loader = accelerator.prepare(torch.utils.data.DataLoader(torch.arange(6), batch_size=1))
    read, gathered = [], []
    for batch in loader:
        read += batch.tolist()
        gathered += accelerator.gather_for_metrics(batch).tolist()
    with pytest.raises(ValueError, match="sp_size=2 does not divide num_attention_heads 6 / tp_size 2 = 3, 3 = 1 x 2"):
        _accelerator(tp_size=2, sp_size=2).prepare(Configured(6))
    return read, gathered, float(accelerator.reduce(torch.tensor(float(sum(read))), "mean"))


def test_ranks_that_share_sequences_read_the_same(run_ranks):
    found = run_ranks(4, _data)
    assert [read for read, _, _ in found] == [[0, 2, 4], [0, 2, 4], [1, 3, 5], [1, 3, 5]]
    assert all(gathered == list(range(6)) and mean == 7.5 for _, gathered, mean in found)


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        ({"sp_attn_implementation": "flash_attention_2"}, "'flash_attention_2' needs DeepSpeed.*Set 'sdpa'"),
        (
            {"sp_seq_length": 9, "sp_seq_length_is_variable": False},
            r"sp_size=2 does not divide sp_seq_length=9, 9 = 4 x 2 \+ 1",
        ),
    ],
)
def test_details_are_looked_at_before_the_run_is_joined(handler, message):
    sizes = ParallelismConfig(sp_size=2, sp_handler=DeepSpeedSequenceParallelConfig(**handler))
    with pytest.raises(ValueError, match=message):
        Accelerator(cpu=True, parallelism_config=sizes)
    assert not AcceleratorState._shared_state
