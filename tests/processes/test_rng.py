"""Random states over real ranks: alike after synchronizing, apart after a device-specific seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from accelerate.runtime import world
from accelerate.runtime.collectives import gather
from accelerate.runtime.rng import set_seed, synchronize_rng_state, synchronize_rng_states
from accelerate.settings.enums import RNGType
from tests.helpers.behaviors import outputs, per_rank

RunRanks = Callable[..., list[Any]]


def synchronized() -> list[Any]:
    here = world.join(cpu=True)
    torch.manual_seed(here.rank)
    synchronize_rng_states(["torch"])
    drawn = torch.rand(())
    return [bool((gather(drawn) == drawn).all()), round(float(drawn), 5)]


def everything_else() -> list[Any]:
    here = world.join(cpu=True)
    generator = torch.Generator().manual_seed(100 + here.rank)
    torch.manual_seed(here.rank)
    expected = torch.rand(2, generator=torch.Generator().manual_seed(100))
    synchronize_rng_states([RNGType.GENERATOR, "torch"], generator)
    assert torch.equal(torch.rand(2, generator=generator), expected)
    generator.manual_seed(here.rank)
    synchronize_rng_state(generator=generator)  # None means the generator that is given
    alike = gather(torch.rand(1, generator=generator))
    assert bool((alike == alike[0]).all())
    try:
        synchronize_rng_state("xpu")
    except RuntimeError as error:
        assert "this process sees no such device" in str(error)
    else:
        raise AssertionError("there is no XPU here")
    set_seed(3, device_specific=True)
    return [torch.initial_seed()]


@pytest.mark.parametrize("size", [2, 3])
def test_states_are_rank_zeros(run_ranks: RunRanks, size: int) -> None:
    expected = per_rank(outputs("synchronize_rng_states", P=size)[0], size)
    assert run_ranks(size, synchronized) == expected
    assert run_ranks(size, synchronized, env={"ACCELERATE_DEBUG_MODE": "1"}) == expected


def test_device_specific_seeds(run_ranks: RunRanks) -> None:
    observed = per_rank(outputs("set_seed.device_specific", P=3)[0], 3)
    assert run_ranks(3, everything_else) == [[seed] for _, seed in observed]
