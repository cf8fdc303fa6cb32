"""Autocast and gradient scaler as plain functions."""

from __future__ import annotations

import pytest
import torch

from accelerate.settings.enums import DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, get_grad_scaler, get_mixed_precision_context_manager


def dtype_inside(context):
    with context:
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_autocast_as_the_run_is_set_up():
    AcceleratorState(mixed_precision="bf16", cpu=True)
    assert dtype_inside(get_mixed_precision_context_manager(native_amp=True)) is torch.bfloat16
    assert dtype_inside(get_mixed_precision_context_manager()) is torch.float32
    off = AutocastKwargs(enabled=False)
    assert dtype_inside(get_mixed_precision_context_manager(native_amp=True, autocast_kwargs=off)) is torch.float32


@pytest.mark.parametrize("kind", [None, DistributedType.NO, DistributedType.MULTI_CPU])
def test_a_scaler(kind):
    scaler = get_grad_scaler(kind, init_scale=8.0)
    assert type(scaler) is torch.amp.GradScaler and scaler.get_scale() == 8.0


def test_a_scaler_for_sharded_gradients():
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    assert ShardedGradScaler in type(get_grad_scaler(DistributedType.FSDP, process_group=object())).__mro__
