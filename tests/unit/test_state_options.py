"""Options of the states, of logging and of errors that stand for a feature: each test fails if its option is ignored."""

from __future__ import annotations

import datetime
import logging

import pytest
from torch import nn

from accelerate import Accelerator, PartialState, load_checkpoint_in_model
from accelerate.logging import MultiProcessAdapter, get_logger
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    MegatronLMPlugin,
    TorchDynamoPlugin,
    TorchTensorParallelPlugin,
)
from tests.helpers.simulated_devices import simulated_cuda


def test_the_cpu_is_used_where_there_is_an_accelerator():
    with simulated_cuda(1):
        assert AcceleratorState(cpu=True).device.type == "cpu"


def test_a_state_holds_its_plugins():
    dynamo, tensors = TorchDynamoPlugin(backend="eager"), TorchTensorParallelPlugin()
    state = AcceleratorState(cpu=True, dynamo_plugin=dynamo, torch_tp_plugin=tensors)
    assert state.dynamo_plugin is dynamo and state.torch_tp_plugin is tensors


def test_a_state_holds_megatrons_plugin():
    plugin = MegatronLMPlugin()
    assert AcceleratorState(cpu=True, megatron_lm_plugin=plugin).megatron_lm_plugin is plugin


@pytest.mark.parametrize("kind", [PartialState, AcceleratorState])
def test_what_joins_a_group_is_checked(kind):
    with pytest.raises((TypeError, ValueError), match="no_such_option"):
        kind(cpu=True, no_such_option=1)


class JoinedError(Exception):
    """Stops where a group would be joined."""


@pytest.mark.parametrize(
    "options", [{"backend": "mpi"}, {"init_method": "file:///tmp/meeting"}, {"timeout": datetime.timedelta(seconds=7)}]
)
@pytest.mark.parametrize("kind", [PartialState, AcceleratorState, Accelerator])
def test_a_group_is_joined_as_asked(options, kind, monkeypatch):
    given: dict[str, object] = {}

    def join(**arguments: object) -> None:
        given.update(arguments)
        raise JoinedError

    monkeypatch.setattr("accelerate.runtime.world.join", join)
    made = {"kwargs_handlers": [InitProcessGroupKwargs(**options)]} if kind is Accelerator else options
    with pytest.raises(JoinedError):
        kind(cpu=True, **made)
    assert options.items() <= given.items()


def test_gradients_are_accumulated_as_the_plugin_says():
    assert GradientState(GradientAccumulationPlugin(num_steps=3)).num_steps == 3


@pytest.mark.parametrize("how", ["argument", "plugin", "state"])
def test_updates_take_as_many_batches_as_asked(how):
    plugin = GradientAccumulationPlugin(num_steps=2)
    options = {"gradient_accumulation_steps": 2} if how == "argument" else {"gradient_accumulation_plugin": plugin}
    accelerator, model, synchronized = Accelerator(cpu=True, **options), nn.Linear(1, 1), []
    for _ in range(4):
        with accelerator.accumulate(model):
            synchronized.append(accelerator.sync_gradients)
    assert synchronized == [False, True, False, True]


def test_an_offloaded_8_bit_weight_is_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="offload_8bit_bnb"):
        load_checkpoint_in_model(nn.Linear(1, 1), tmp_path, offload_8bit_bnb=True)


def test_messages_take_what_the_standard_logger_takes(caplog):
    PartialState(cpu=True)
    logger = MultiProcessAdapter(logging.getLogger("accelerate.options"), {"run": "first"})
    with caplog.at_level(logging.INFO, logger="accelerate.options"):
        logger.info("%s of %s", 1, 2, extra={"step": 3})
        logger.log(logging.INFO, "%s", 4, extra={"step": 5})
        logger.warning_once("%s", 6, extra={"step": 7})
    assert [record.getMessage() for record in caplog.records] == ["1 of 2", "4", "6"]
    assert [(record.run, record.step) for record in caplog.records] == [("first", 3), ("first", 5), ("first", 7)]


def test_a_logger_has_the_level_that_is_asked_for():
    assert get_logger("accelerate.level", log_level="DEBUG").logger.level == logging.DEBUG
