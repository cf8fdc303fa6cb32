"""The communication hook that a handler describes; training with them is in tests/processes/test_training.py."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

from accelerate.settings.enums import DDPCommunicationHookType as Kind
from accelerate.settings.handlers import DistributedDataParallelKwargs
from accelerate.settings.plugins.comm_hooks import communication_hook

GROUP = object()


def test_nothing_to_register():
    assert communication_hook(Kind.NO, Kind.NO, {}, None) is None
    DistributedDataParallelKwargs().register_comm_hook(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("kind", "wrapper", "name"),
    [
        (Kind.FP16, Kind.NO, "allreduce_hook_in_float16"),
        (Kind.BF16, Kind.NO, "allreduce_hook_in_bfloat16"),
        (Kind.NO, Kind.BF16, "allreduce_hook_in_bfloat16"),
        (Kind.POWER_SGD, Kind.FP16, "powerSGD_hook_in_float16"),
        (Kind.POWER_SGD, Kind.NO, "powerSGD_hook"),
    ],
)
def test_what_is_registered(kind, wrapper, name):
    state, hook = communication_hook(kind, wrapper, {}, GROUP)
    assert hook.__name__ == name
    assert getattr(state, "process_group", state) is GROUP
    # torch refuses hooks with annotations other than its own, postponed ones included.
    bucket = inspect.signature(hook).parameters["bucket"].annotation
    assert bucket in (inspect.Parameter.empty, torch.distributed.GradBucket)


def test_options_of_power_sgd():
    options = {"matrix_approximation_rank": 2, "warm_start": False}
    state, _ = communication_hook(Kind.BATCHED_POWER_SGD, Kind.NO, options, GROUP)
    assert isinstance(state, PowerSGDState)
    assert (state.matrix_approximation_rank, state.warm_start, state.process_group) == (2, False, GROUP)
    state, _ = communication_hook(Kind.POWER_SGD, Kind.NO, {"process_group": None}, GROUP)
    assert state.process_group is None


def test_options_that_do_not_fit():
    with pytest.raises(
        ValueError, match="has 'rank', but the 'power_sgd' communication hook takes only .*matrix_approx"
    ):
        communication_hook(Kind.POWER_SGD, Kind.NO, {"rank": 2}, GROUP)
    for kind in (Kind.FP16, Kind.NO):
        with pytest.raises(ValueError, match=f"the '{kind.value}' communication hook takes no options"):
            communication_hook(kind, Kind.NO, {"matrix_approximation_rank": 2}, GROUP)


class Bucket:
    """As much of torch's GradBucket as a hook touches."""

    def __init__(self, gradients):
        self.gradients = gradients

    def buffer(self):
        return self.gradients

    def set_buffer(self, gradients):
        self.gradients = gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_wrapped_hook_sees_the_narrow_type_and_gradients_keep_theirs(dtype):
    from accelerate.settings.plugins.comm_hooks import _with_wire_dtype

    seen = []

    def hook(state, bucket):
        seen.append(bucket.buffer().dtype)
        done = torch.futures.Future()
        done.set_result(bucket.buffer() * 2)
        return done

    gradients = torch.tensor([1.0, 1 / 3])
    result = _with_wire_dtype(hook, str(dtype).removeprefix("torch."))(None, Bucket(gradients)).value()
    assert seen == [dtype]
    assert result.data_ptr() == gradients.data_ptr() and result.dtype is torch.float32
    assert torch.equal(result, (torch.tensor([1.0, 1 / 3]).to(dtype) * 2).float())
