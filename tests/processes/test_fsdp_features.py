"""What both versions of FSDP do besides training: number formats, parts left whole, several models, documented functions."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from accelerate import Accelerator, ParallelismConfig
from accelerate.precision.loss_scale import LossScaler
from accelerate.runtime.world import current
from accelerate.state import AcceleratorState
from accelerate.utils import (
    GradScalerKwargs,
    broadcast,
    compile_regions_fsdp2,
    fsdp2_apply_ac,
    fsdp2_load_full_state_dict,
    fsdp2_prepare_model,
    fsdp2_switch_optimizer_parameters,
    get_fsdp2_grad_scaler,
)
from tests.helpers.releases import FSDP2_ON_CPU, FSDP_VERSIONS, fsdp
from tests.helpers.sharding import Block, Tiny, plugin

both = pytest.mark.parametrize("version", [fsdp(1), fsdp(2)])


def _refused() -> tuple[str, bool]:
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin(2))
    model = nn.Sequential(Block(2))
    before = list(model.parameters())
    with pytest.raises(ValueError) as caught:
        accelerator.prepare(model)
    return str(caught.value), all(map(operator.is_, before, model.parameters()))


@pytest.mark.skipif(2 in FSDP_VERSIONS, reason="this release of torch runs fully_shard on the CPU")
def test_a_release_without_fsdp_2_on_the_cpu_is_refused(run_ranks):
    for message, unchanged in run_ranks(2, _refused):
        assert unchanged and "fsdp_version=2 on the CPU needs PyTorch 2.7" in message
        assert "update it, or use fsdp_version=1" in message


def flexible(version: int, **fields: Any) -> Any:
    """The version's plugin; of version 1, one that leaves parameters what they were."""
    return plugin(version, **{**({"use_orig_params": True} if version == 1 else {}), **fields})


# Number formats ------------------------------------------------------------------------------------------------------


def _formats(version: int, precision: str, policy: Any, dtype: torch.dtype) -> tuple[set[Any], set[Any], set[Any]]:
    """The formats of trained weights and outputs, of gradients, and inside a layer."""
    fields = {} if policy is None else {"mixed_precision_policy": policy}
    accelerator = Accelerator(cpu=True, mixed_precision=precision, fsdp_plugin=flexible(version, **fields))
    model = Tiny().to(dtype)  # a part of it frozen
    seen: set[torch.dtype] = set()
    model.layers[1].register_forward_hook(lambda *found: seen.add(found[2].dtype))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    out = model(torch.arange(8).view(2, 4))
    accelerator.backward(out.float().pow(2).mean())
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    trained = [param for param in model.parameters() if param.grad is not None]
    AcceleratorState._reset_state()
    return {param.dtype for param in trained}, {param.grad.dtype for param in trained}, seen


HALF, FLOAT = torch.bfloat16, torch.float32
# Mixed precision of the run, the plugin's policy for each version, the weights' format -> weights, inside a layer
FORMATS = [
    ("bf16", (None, None), HALF, FLOAT, HALF),
    ("fp16", (None, None), HALF, FLOAT, torch.float16),
    ("no", (None, None), HALF, HALF, HALF),  # the optimizer steps in it, as documented
    ("no", ("bf16", "bf16"), FLOAT, FLOAT, HALF),
    ("no", ({"param_dtype": "bf16", "reduce_dtype": "fp32"},) * 2, HALF, FLOAT, HALF),
    ("no", (MixedPrecision(HALF, FLOAT, FLOAT), MixedPrecisionPolicy(HALF, FLOAT)), FLOAT, FLOAT, HALF),
]


def _every_format(version: int) -> list[Any]:
    return [_formats(version, name, policies[version - 1], dtype) for name, policies, dtype, *_ in FORMATS]


@both
def test_formats_of_weights_and_inside(version, run_ranks):
    for results in run_ranks(2, _every_format, version):
        for (*_, weights, inside), found in zip(FORMATS, results, strict=True):
            assert found == ({weights}, {weights}, {inside})


OPTIMIZERS: dict[str, Any] = {
    "AdamW": torch.optim.AdamW,
    "fused AdamW": functools.partial(torch.optim.AdamW, fused=True),
    "foreach AdamW": functools.partial(torch.optim.AdamW, foreach=True),
    "SGD": torch.optim.SGD,
    "fused SGD": functools.partial(torch.optim.SGD, fused=True),
}


class Overflow(NamedTuple):
    """A step in which the gradients of the last rows overflow, and one after it.

    Attributes:
        finite: Whether this rank's own gradients of the first step were finite.
        skipped: Whether the steps were skipped.
        scales: The loss scale before the first step and after each.
        weights: The whole weight before the first step and after each.
    """

    finite: bool
    skipped: list[bool]
    scales: list[float]
    weights: list[torch.Tensor]


def _overflow(version: int, optimizer: str, clip: bool, fields: dict[str, Any], sizes: dict[str, int]) -> Overflow:
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="fp16",
        fsdp_plugin=flexible(version, transformer_cls_names_to_wrap=[], auto_wrap_policy=None, **fields),
        parallelism_config=ParallelismConfig(**sizes) if sizes else None,
        kwargs_handlers=[GradScalerKwargs(init_scale=1024.0)],
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4, bias=False))
    model._tp_plan = {"0": "colwise_gather_output"}
    model, stepping = accelerator.prepare(model, OPTIMIZERS[optimizer](model.parameters(), lr=0.1))
    weights, scales, skipped = [_whole(accelerator, model)], [accelerator.scaler.get_scale()], []
    for last in (float("inf"), 1.0):
        # Every rank sees all rows overflow or none: which gradients do is a matter of who holds the last row.
        accelerator.backward((model(torch.ones(3, 2)) * torch.tensor([0.5, 0.5, 0.5, last])).sum())
        if last > 1:
            gradients = [local(param.grad) for param in model.parameters() if param.grad is not None]
            finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
        if clip:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        stepping.step()
        skipped.append(stepping.step_was_skipped)
        stepping.zero_grad()
        weights.append(_whole(accelerator, model))
        scales.append(accelerator.scaler.get_scale())
    return Overflow(finite, skipped, scales, weights)


def _whole(accelerator: Accelerator, model: nn.Module) -> torch.Tensor:
    weight = accelerator.get_state_dict(model).get("0.weight")
    whole = torch.empty(4, 2) if weight is None else weight.clone()
    return broadcast(whole)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_overflow(results: list[Overflow]) -> None:
    """One shard alone overflowed: all ranks skipped that step, halved the scale, and took the next."""
    assert {result.finite for result in results} == {True, False}, "only some ranks' shards overflow"
    for result in results:
        assert result.skipped == [True, False]
        assert result.scales == [1024.0, 512.0, 512.0]
        before, skipped, after = result.weights
        assert torch.equal(before, skipped) and bool(after.isfinite().all())
        assert bool((after != before).all()) and torch.equal(after, results[0].weights[2])


@pytest.mark.parametrize(
    ("version", "optimizer", "clip"),
    [
        *(fsdp(version, optimizer, False) for version in (1, 2) for optimizer in OPTIMIZERS),
        *(fsdp(version, "fused AdamW", True) for version in (1, 2)),
    ],
)
def test_ranks_agree_on_an_overflow(version, optimizer, clip, run_ranks):
    if (version, optimizer) == (2, "fused SGD"):
        pytest.skip("torch's DTensor has no fused SGD")
    check_overflow(run_ranks(2, _overflow, version, optimizer, clip, {}, {}))


@pytest.mark.parametrize("optimizer", ["AdamW", "fused AdamW"])
@pytest.mark.parametrize(
    ("version", "fields", "sizes"),
    [
        (1, {"use_orig_params": False}, {}),
        (1, {"sharding_strategy": "HYBRID_SHARD"}, {"dp_replicate_size": 2, "dp_shard_size": 2}),
        fsdp(2, {}, {"dp_replicate_size": 2, "dp_shard_size": 2}),
        fsdp(2, {}, {"tp_size": 2, "dp_shard_size": 2}),
        fsdp(2, {"cpu_offload": True}, {}),
    ],
)
def test_ranks_agree_on_an_overflow_however_parameters_are_sharded(version, fields, sizes, optimizer, run_ranks):
    check_overflow(run_ranks(4 if sizes else 2, _overflow, version, optimizer, False, fields, sizes))


class OffloadedScaler(LossScaler):
    """Finds overflows where gradients would be that are offloaded from the device of the loss."""

    def _unscale_grads_(self, *args: Any) -> dict[torch.device, torch.Tensor]:
        return dict.fromkeys([torch.device("meta")], *super()._unscale_grads_(*args).values())


def _offloaded() -> tuple[float, float]:
    here = current()
    scaler = OffloadedScaler("cpu", init_scale=4.0)
    scaler.peers = here.collectives
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale(weight * (float("inf") if here.rank else 1.0)).backward()
    scaler.step(optimizer)
    return weight.item(), scaler.get_scale()


def test_ranks_agree_on_an_overflow_of_offloaded_gradients(run_ranks):
    assert run_ranks(2, _offloaded) == [(0.0, 2.0)] * 2


class Adapted(nn.Module):
    """A weight in eight bits that is not trained, with an adapter in bf16 that is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(0, 255, (5, 5), dtype=torch.uint8), requires_grad=False)
        self.down, self.up = nn.Linear(5, 2, dtype=HALF), nn.Linear(2, 5, dtype=HALF)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) / 1000) + self.up(self.down(x))


def _adapters(precision: str) -> tuple[list[torch.dtype], bool, bool]:
    accelerator = Accelerator(
        cpu=True, mixed_precision=precision, fsdp_plugin=plugin(2, transformer_cls_names_to_wrap=["Adapted"])
    )
    torch.manual_seed(accelerator.process_index)
    model = nn.Sequential(Adapted(), Adapted())
    before = model[0].weight.detach().clone()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    first = model[0].up.weight.to_local().clone()
    for _ in range(2):
        accelerator.backward(model(torch.ones(2, 5, dtype=HALF)).float().pow(2).sum())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    state = accelerator.get_state_dict(model)
    kept = not state or torch.equal(state["0.weight"], before)
    return (
        [model[0].weight.dtype, model[0].up.weight.dtype],
        kept,
        not torch.equal(first, model[0].up.weight.to_local()),
    )


@FSDP2_ON_CPU
def test_eight_bits_beside_adapters(run_ranks):
    assert run_ranks(2, _adapters, "no") == [([torch.uint8, HALF], True, True)] * 2
    assert run_ranks(2, _adapters, "bf16") == [([torch.uint8, FLOAT], True, True)] * 2


# Models and units ----------------------------------------------------------------------------------------------------


def _several() -> list[bool]:
    """Two models trained together, one that only evaluates, and one that is asked for its state after an evaluation."""
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin(2))
    torch.manual_seed(3)
    first, second, fixed = (nn.Sequential(Block(4), Block(4)).double() for _ in range(3))
    inputs = torch.rand(2, 4, dtype=torch.double)
    second(first(inputs)).pow(2).sum().backward()
    both = [*first.parameters(), *second.parameters()]
    gradients = [param.grad for param in both]
    norms = [float(nn.utils.get_total_norm(gradients, kind)) for kind in (2, float("inf"), 1)]
    for param in both:
        param.grad = None
    expected = [value.clone() for value in first.state_dict().values()]
    answer = fixed(inputs)
    optimizer = torch.optim.AdamW(both)
    first, second, optimizer = accelerator.prepare(first, second, optimizer)
    fixed = accelerator.prepare_model(fixed.requires_grad_(False), evaluation_mode=True)
    for one, other in zip(first, list(first)[1:], strict=False):  # as one tells version 2 what to gather ahead
        one.set_modules_to_forward_prefetch([other])
        other.set_modules_to_backward_prefetch([one])
    with torch.no_grad():
        first(inputs)
    state = accelerator.get_state_dict(first)
    same = not state or all(map(torch.equal, state.values(), expected))
    with accelerator.no_sync(first), accelerator.no_sync(second):
        loss = second(first(inputs)).pow(2).sum() + fixed(inputs).sum()
        with accelerator.trigger_sync_in_backward(first), accelerator.trigger_sync_in_backward(second):
            accelerator.backward(loss)
    params = [*first.parameters(), *second.parameters()]
    found = [float(accelerator.clip_grad_norm_(params, 1e9, kind)) for kind in (2, float("inf"), 1)]
    optimizer.step()
    sharded = all(isinstance(param, DTensor) for param in params)
    inner = accelerator.unwrap_model(first)
    return [
        same,
        found == pytest.approx(norms, rel=1e-10),
        sharded,
        isinstance(inner, nn.Sequential),
        torch.allclose(fixed(inputs), answer, atol=1e-12),
    ]


@FSDP2_ON_CPU
def test_several_models(run_ranks):
    assert run_ranks(2, _several) == [[True] * 5] * 2


def _computed(version: int, checkpointing: bool) -> list[int]:
    """How often each of two units computes in a step."""
    accelerator = Accelerator(cpu=True, fsdp_plugin=flexible(version, activation_checkpointing=checkpointing))
    model = nn.Sequential(Block(4), Block(4))
    calls = [0, 0]

    def count(place: int) -> None:
        calls[place] += 1

    for place, block in enumerate(model):
        block.up.register_forward_hook(lambda *_, place=place: count(place))
    model = accelerator.prepare(model)
    accelerator.backward(model(torch.ones(2, 4)).sum())
    return calls


@both
def test_units_are_recomputed_if_asked_for(version, run_ranks):
    assert run_ranks(2, _computed, version, True) == [[2, 2]] * 2
    assert run_ranks(2, _computed, version, False) == [[1, 1]] * 2


def _made_by_a_function() -> tuple[list[float], bool]:
    """No rank has weights: rank 0 makes them, the others receive them; the optimizer was there before."""

    def initialize(module: nn.Module) -> None:
        module.to_empty(device="cpu", recurse=False)
        for param in module.parameters(recurse=False):
            nn.init.constant_(param, 0.5 + current().rank)

    accelerator = Accelerator(cpu=True, fsdp_plugin=flexible(1, param_init_fn=initialize))
    with torch.device("meta"):
        model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    inner = accelerator.unwrap_model(model)
    state = accelerator.get_state_dict(model)
    values = sorted({value for tensor in state.values() for value in tensor.flatten().tolist()})
    return values, inner.head.weight is inner.embedding.weight


def test_weights_made_by_a_function(run_ranks):
    assert run_ranks(2, _made_by_a_function) == [([0.5], True), ([], True)]


# Documented functions --------------------------------------------------------------------------------------------------


def _by_hand() -> list[bool]:
    """A model sharded, loaded, compiled and stepped with the functions for that."""
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin(2, activation_checkpointing=True))
    torch.manual_seed(5)
    full = Tiny().state_dict()
    tokens = torch.arange(8).view(2, 4)
    expected = Tiny()
    expected.load_state_dict(full)
    model = Tiny()
    checked = fsdp2_apply_ac(accelerator, model) is model
    calls: list[int] = []
    model.layers[0].up.register_forward_hook(lambda *_: calls.append(1))
    model(tokens).sum().backward()
    recomputed = len(calls) == 2
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = dict(model.named_parameters())
    model = compile_regions_fsdp2(fsdp2_prepare_model(accelerator, model), backend="eager")
    fsdp2_switch_optimizer_parameters(
        optimizer, {before[name].data_ptr(): param for name, param in model.named_parameters()}
    )
    fsdp2_load_full_state_dict(accelerator, model, full if accelerator.is_main_process else {})
    same = torch.allclose(model(tokens), expected(tokens), atol=1e-6)
    with pytest.raises(ValueError, match=r"missing: no 'embedding.weight'(.|\n)*extra: 'nobody'"):
        fsdp2_load_full_state_dict(accelerator, model, {"nobody": torch.ones(1)})
    with pytest.raises(KeyError, match="not in the mapping"):
        fsdp2_switch_optimizer_parameters(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1), {})
    scaler = get_fsdp2_grad_scaler(init_scale=4.0)
    stepped = optimizer.param_groups[0]["params"] == list(model.parameters())
    return [checked, recomputed, same, stepped, scaler.get_scale() == 4.0]


@FSDP2_ON_CPU
def test_documented_functions(run_ranks):
    assert run_ranks(2, _by_hand) == [[True] * 5] * 2
