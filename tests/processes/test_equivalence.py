"""Training is the same however a run is distributed: one table of rows, each beside one plain process.

`pytest -s tests/processes/test_equivalence.py` prints the largest difference of each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from accelerate.utils import GradientAccumulationPlugin, TorchContextParallelConfig, TorchDynamoPlugin
from tests.helpers.llama import STEPS, train
from tests.helpers.releases import FSDP2_ON_CPU


@dataclass(frozen=True)
class Row:
    """One way of distributing: how many ranks, and the arguments of `train`.

    Attributes:
        fsdp: Fields of the FSDP plugin; None: no plugin.
        sizes: Of the device mesh.
        more: Further arguments of `train`.
        within: The largest difference that is allowed, in weights and norms.
    """

    ranks: int = 2
    fsdp: dict[str, Any] | None = None
    sizes: dict[str, Any] | None = None
    more: dict[str, Any] = field(default_factory=dict)
    within: float = 1e-10

    @property
    def fsdp_2(self) -> bool:
        return self.fsdp is not None and self.fsdp["fsdp_version"] == 2


def _one(ranks: int = 2, sizes: dict[str, int] | None = None, more: dict[str, Any] | None = None, **fields: Any) -> Row:
    """A row of FSDP 1, with parameters as they were unless it says otherwise."""
    return Row(ranks, {"fsdp_version": 1, **_BY_LAYER, "use_orig_params": True, **fields}, sizes, more or {})


def _two(ranks: int = 2, sizes: dict[str, int] | None = None, more: dict[str, Any] | None = None, **fields: Any) -> Row:
    """A row of FSDP 2."""
    return Row(ranks, {"fsdp_version": 2, **_BY_LAYER, **fields}, sizes, more or {})


_BY_LAYER = {"auto_wrap_policy": "transformer_based_wrap"}  # which layers, the model says itself
_BY_SIZE = {"auto_wrap_policy": "size_based_wrap", "min_num_params": 150}
_2X2 = {"dp_replicate_size": 2, "dp_shard_size": 2}
_RECOMPUTED = {"activation_checkpointing": True}
_REGIONS = {"dynamo_plugin": TorchDynamoPlugin(backend="eager", use_regional_compilation=True)}
_WHOLE = r"norm|layers\.1\.mlp"
_EACH = {
    "gradient_accumulation_steps": 1,
    "gradient_accumulation_plugin": GradientAccumulationPlugin(2, sync_each_batch=True),
}

ROWS: dict[str, Row] = {
    "DDP": Row(2),
    "FSDP 1, one rank": _one(1),
    "FSDP 1, FULL_SHARD": _one(),
    "FSDP 1, SHARD_GRAD_OP": _one(sharding_strategy="SHARD_GRAD_OP"),
    "FSDP 1, NO_SHARD": _one(sharding_strategy="NO_SHARD"),
    "FSDP 1, HYBRID_SHARD on one machine": _one(sharding_strategy="HYBRID_SHARD"),
    "FSDP 1, HYBRID_SHARD 2x2": _one(4, _2X2, sharding_strategy="HYBRID_SHARD"),
    "FSDP 1, HYBRID_SHARD_ZERO2 2x2": _one(4, _2X2, sharding_strategy="HYBRID_SHARD_ZERO2"),
    "FSDP 1, offloaded": _one(cpu_offload=True),
    "FSDP 1, recomputed": _one(**_RECOMPUTED),
    "FSDP 1, recomputed and offloaded": _one(**_RECOMPUTED, activation_checkpointing_offload=True),
    "FSDP 1, by size": _one(**_BY_SIZE),
    "FSDP 1, as one unit": _one(auto_wrap_policy="no_wrap"),
    "FSDP 1, gathered ahead": _one(forward_prefetch=True, backward_prefetch="BACKWARD_POST"),
    "FSDP 1, nothing ahead": _one(backward_prefetch="NO_PREFETCH"),
    "FSDP 1, compiled": _one(more={"dynamo_backend": "eager"}),
    "FSDP 1, the exact mean": _one(more={"items": True}),
    "FSDP 1, optimizer made after": _one(more={"late": True, **_EACH}),
    "FSDP 1, parts left whole": _one(ignored_modules=_WHOLE),
    "FSDP 1, weights on rank 0 only": _one(more={"lacking": True}, cpu_ram_efficient_loading=True),
    "FSDP 2, one rank": _two(1),
    "FSDP 2": _two(),
    "FSDP 2, kept after the forward": _two(reshard_after_forward=False),
    "FSDP 2, offloaded": _two(cpu_offload=True),
    "FSDP 2, kept and offloaded": _two(reshard_after_forward=False, cpu_offload=True),
    "FSDP 2, recomputed": _two(**_RECOMPUTED),
    "FSDP 2, recomputed and offloaded": _two(**_RECOMPUTED, activation_checkpointing_offload=True, cpu_offload=True),
    "FSDP 2, by size": _two(**_BY_SIZE),
    "FSDP 2, as one unit": _two(auto_wrap_policy="no_wrap"),
    "FSDP 2, compiled": _two(more={"dynamo_backend": "eager"}),
    "FSDP 2, layers compiled": _two(more=_REGIONS),
    "FSDP 2, the exact mean": _two(more={"items": True}),
    "FSDP 2, optimizer made after": _two(more={"late": True, **_EACH}),
    "FSDP 2, parts left whole": _two(ignored_modules=_WHOLE),
    "FSDP 2, weights on rank 0 only": _two(more={"lacking": True}, cpu_ram_efficient_loading=True),
    "HSDP 2x2": _two(4, _2X2),
    "TP 2": Row(2, sizes={"tp_size": 2}),
    "TP 2, weights on rank 0 only": Row(2, sizes={"tp_size": 2}, more={"lacking": True}),
    "TP 2, optimizer made after": Row(2, sizes={"tp_size": 2}, more={"late": True}),
    "replicas x TP 2x2, the exact mean": Row(4, sizes={"dp_replicate_size": 2, "tp_size": 2}, more={"items": True}),
    "FSDP 2 over TP 2": _two(2, {"tp_size": 2}, more={"lacking": True}, cpu_ram_efficient_loading=True),
    "FSDP 2 over replicas x TP 2x2": _two(4, {"dp_replicate_size": 2, "tp_size": 2}),
    "FSDP 2 x TP 2x2": _two(4, {"dp_shard_size": 2, "tp_size": 2}),
    "CP 2": Row(2, sizes={"cp_size": 2}),
    "CP 2, in a ring": Row(2, sizes={"cp_size": 2, "cp_handler": TorchContextParallelConfig("alltoall")}),
    "replicas x CP 2x2, the exact mean": Row(4, sizes={"dp_replicate_size": 2, "cp_size": 2}, more={"items": True}),
    "CP x TP 2x2": Row(4, sizes={"cp_size": 2, "tp_size": 2}),
    "FSDP 2 over CP 2": _two(2, {"cp_size": 2}),
    "FSDP 2 x CP 2x2": _two(4, {"dp_shard_size": 2, "cp_size": 2}),
    "SP 2": Row(2, sizes={"sp_size": 2}),
    "SP 2, compiled": Row(2, sizes={"sp_size": 2}, more={"dynamo_backend": "eager"}),
    "SP 4": Row(4, sizes={"sp_size": 4}),
    "replicas x SP 2x2, the exact mean": Row(4, sizes={"dp_replicate_size": 2, "sp_size": 2}, more={"items": True}),
    "SP x TP 2x2": Row(4, sizes={"sp_size": 2, "tp_size": 2}),
    "FSDP 2 over SP 2": _two(2, {"sp_size": 2}),
    "FSDP 2 x SP 2x2": _two(4, {"dp_shard_size": 2, "sp_size": 2}),
}
# Steps that are not those of the others: what is compared with what else.
CLIPPED = {"FSDP 1": _one(more={"clip_value": True}), "FSDP 2": _two(more={"clip_value": True})}


@pytest.fixture(scope="module")
def differences() -> Iterator[dict[str, float]]:
    """Filled by the tests, and printed when they are through."""
    found: dict[str, float] = {}
    yield found
    print("\n\nlargest difference to one plain process, in weights and norms")
    for name, value in found.items():
        print(f"  {name:40} {value:.1e}")


@pytest.fixture(scope="module")
def alone(rank_pool) -> Any:
    """What one plain process comes to."""
    state, norms = rank_pool.run(1, train)[0]
    assert len(norms) == STEPS and max(norms) > 0.5  # clipping has something to do
    return state, norms


def difference(results: list[Any], expected: Any) -> float:
    """The largest one, in the weights of rank 0 and the norms of every rank."""
    state, norms = expected
    found = results[0][0]
    assert found.keys() == state.keys()
    weights = max(float((found[name] - value).abs().max()) for name, value in state.items())
    return max(weights, *(abs(one - other) for result in results for one, other in zip(result[1], norms, strict=True)))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=FSDP2_ON_CPU if row.fsdp_2 else ()) for name, row in ROWS.items()]
)
def test_training_is_the_same(name, run_ranks, alone, differences):
    row = ROWS[name]
    differences[name] = difference(run_ranks(row.ranks, train, row.fsdp, row.sizes, **row.more), alone)
    assert differences[name] <= row.within


@pytest.mark.parametrize("row", [CLIPPED["FSDP 1"], pytest.param(CLIPPED["FSDP 2"], marks=FSDP2_ON_CPU)], ids=CLIPPED)
def test_clipping_values_is_the_same(row, run_ranks):
    expected = run_ranks(1, train, clip_value=True)[0]
    assert difference(run_ranks(row.ranks, train, row.fsdp, row.sizes, **row.more), expected) <= row.within
