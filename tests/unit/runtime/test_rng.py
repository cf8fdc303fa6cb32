"""Seeding one process, and errors for random generators that cannot be synchronized."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

from accelerate.runtime import rng
from accelerate.runtime.rng import set_seed, synchronize_rng_state, synchronize_rng_states
from accelerate.settings.enums import RNGType


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("seed", [0, 42, -1, 2**40, np.int64(7)])
def test_a_seed_decides_every_generator(seed: int) -> None:
    set_seed(seed)
    first = draw()
    assert draw() != first
    set_seed(seed)
    assert draw() == first
    set_seed(int(seed) + 1)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_device_specific_adds_the_rank_which_is_zero_here() -> None:
    set_seed(3, device_specific=True)
    assert torch.initial_seed() == 3


def test_deterministic() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        set_seed(3, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("before", "after"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_deterministic_cublas(before: str | None, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if before is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before)
    set_seed(3)
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == before
    try:
        set_seed(3, deterministic=True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == after
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("seed", [None, "3", 1.5])
def test_a_seed_is_an_integer(seed: object) -> None:
    with pytest.raises(TypeError, match="set_seed expects an integer"):
        set_seed(seed)  # type: ignore[arg-type]


def test_alone_nothing_is_synchronized_but_arguments_are_checked() -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    synchronize_rng_states(["torch", RNGType.GENERATOR], generator)
    synchronize_rng_states("torch")
    synchronize_rng_state(generator=generator)
    assert torch.equal(generator.get_state(), before)
    with pytest.raises(ValueError, match="unknown type of random generator 'zz': expected one of torch, cuda"):
        synchronize_rng_states(["zz"])
    with pytest.raises(ValueError, match="needs the generator"):
        synchronize_rng_state("generator")


def test_every_kind_of_device_has_a_row() -> None:
    from accelerate.runtime.devices import DEVICES

    assert {kind.value for kind in RNGType} - {"torch", "generator"} <= set(DEVICES)
    with pytest.raises(RuntimeError, match="cannot synchronize the random generator of 'npu'"):
        rng._device_module(RNGType.NPU)
