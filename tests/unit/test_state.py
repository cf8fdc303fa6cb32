"""PartialState, AcceleratorState, GradientState on one process."""

from __future__ import annotations

import gc

import pytest
import torch

from accelerate.runtime import world
from accelerate.settings import env
from accelerate.settings.enums import DistributedType
from accelerate.settings.handlers import GradientAccumulationPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState, is_initialized


def test_a_lone_process():
    state = PartialState(cpu=True)
    assert repr(state) == (
        "Distributed environment: DistributedType.NO\nNum processes: 1\nProcess index: 0\n"
        "Local process index: 0\nDevice: cpu\n"
    )
    assert sorted(vars(state)) == PartialState._known_attributes
    assert state.is_main_process and state.is_local_main_process and state.is_last_process
    assert not state.use_distributed
    assert state.backend is None
    assert state.default_device == torch.device("cpu")


def test_instances_share_one_state_until_it_is_reset():
    first, second = PartialState(cpu=True), PartialState()
    assert first is not second and vars(first) is vars(second)
    PartialState._reset_state()
    assert not first.initialized and not world.is_joined()
    with pytest.raises(AttributeError, match="its state was reset"):
        _ = first.device
    PartialState(cpu=True)
    assert first.device == torch.device("cpu"), "an old instance shows the new state"


def test_decorators_run_a_function_on_the_right_process():
    state = PartialState(cpu=True)
    assert state.on_main_process(lambda: 1)() == 1
    assert state.on_main_process()(lambda: 1)() == 1
    assert state.on_local_main_process(lambda: 2)() == 2
    assert state.on_last_process(lambda: 3)() == 3
    assert state.on_process(process_index=0)(lambda: 4)() == 4
    assert state.on_process(process_index=1)(lambda: 4)() is None
    assert state.on_local_process(local_process_index=0)(lambda: 5)() == 5
    assert state.on_local_process(local_process_idx=1)(lambda: 5)() is None

    @state.on_main_process
    def named(a: int, *, b: int = 2) -> int:
        """Adds."""
        return a + b

    assert (named(1), named.__name__, named.__doc__) == (3, "named", "Adds.")


def test_print_and_first(capsys):
    state = PartialState(cpu=True)
    with state.main_process_first(), state.local_main_process_first():
        state.print("here", end="!")
    assert capsys.readouterr().out == "here!"


@pytest.mark.parametrize(("rank", "local"), [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_ranks_of_two_machines(rank, local, capsys):
    state = PartialState(cpu=True)
    state.process_index, state.local_process_index, state.num_processes = rank, local, 4
    assert (state.is_main_process, state.is_local_main_process) == (rank == 0, local == 0)
    assert state.is_last_process == (rank == 3)
    runs = {
        "main": state.on_main_process(bool),
        "local main": state.on_local_main_process(bool),
        "last": state.on_last_process(bool),
        "process 2": state.on_process(bool, process_index=2),
        "local process 1": state.on_local_process(bool, local_process_index=1),
    }
    places = {"main": rank == 0, "local main": local == 0, "last": rank == 3, "process 2": rank == 2}
    assert {name: function() is not None for name, function in runs.items()} == {
        **places,
        "local process 1": local == 1,
    }
    state.print("here", end="")
    assert capsys.readouterr().out == ("here" if local == 0 else "")
    with state.split_between_processes([0, 1, 2, 3, 4], apply_padding=True) as part:
        assert part == [[0, 1], [2, 4], [3, 4], [4, 4]][rank]
    with state.split_between_processes([0, 1, 2, 3, 4]) as part:
        assert part == [[0, 1], [2], [3], [4]][rank]


def test_split_is_given_whole_to_a_lone_process():
    with PartialState(cpu=True).split_between_processes({"a": [1, 2]}) as part:
        assert part == {"a": [1, 2]}


def test_accelerator_state_adds_precision_and_answers_for_partial_state():
    state = AcceleratorState(mixed_precision="bf16", cpu=True)
    assert is_initialized()
    assert state.mixed_precision == "bf16"
    assert state.distributed_type is DistributedType.NO
    assert (state.num_processes, state.process_index, state.device.type) == (1, 0, "cpu")
    assert repr(state).endswith("\nMixed precision type: bf16\n")
    assert all(hasattr(state, name) for name in AcceleratorState._known_attributes)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = state.nonsense
    with state.split_between_processes([1]) as part:
        assert part == [1]


def test_debug_and_device_are_one_setting_wherever_they_are_set():
    partial, state = PartialState(cpu=True), AcceleratorState(cpu=True)
    partial.debug = True
    assert state.debug and world.current().debug
    state.debug = False
    assert not partial.debug and not world.current().debug
    state.device = torch.device("cpu", 0)
    assert partial.device == world.current().device == world.current().collectives.device == torch.device("cpu", 0)


def test_settings_of_a_run_do_not_change():
    AcceleratorState(mixed_precision="bf16", cpu=True)
    assert AcceleratorState().mixed_precision == "bf16"
    with pytest.raises(ValueError, match=r"mixed_precision='fp16'.*restart the kernel"):
        AcceleratorState(mixed_precision="fp16")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not is_initialized() and not PartialState().__dict__.get("_mixed_precision")


def test_precision_comes_from_the_argument_then_the_environment():
    env.publish({"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert AcceleratorState(cpu=True).mixed_precision == "bf16"
    AcceleratorState._reset_state(True)
    assert AcceleratorState(mixed_precision="no", cpu=True).mixed_precision == "no"
    AcceleratorState._reset_state(True)
    env.publish({"MIXED_PRECISION": "fp16"})
    assert AcceleratorState(cpu=True).mixed_precision == "bf16", "ACCELERATE_MIXED_PRECISION comes first"
    AcceleratorState._reset_state(True)
    env.publish({"ACCELERATE_MIXED_PRECISION": ""})
    assert AcceleratorState(cpu=True).mixed_precision == "fp16"
    AcceleratorState._reset_state(True)
    env.publish({"MIXED_PRECISION": "O2"})
    assert AcceleratorState(cpu=True).mixed_precision == "no", "another program's variable"
    AcceleratorState._reset_state(True)
    env.publish({"ACCELERATE_MIXED_PRECISION": "half"})
    with pytest.raises(ValueError, match="ACCELERATE_MIXED_PRECISION: expected one of .* found 'half'"):
        AcceleratorState(cpu=True)
    with pytest.raises(ValueError, match=r"mixed_precision='zz' is unknown: choose from \['no'"):
        AcceleratorState(mixed_precision="zz", cpu=True)


class Loader:
    end_of_dataloader = True
    remainder = 3


def test_gradient_state_follows_nested_loaders():
    state = GradientState()
    assert (state.in_dataloader, state.end_of_dataloader, state.remainder) == (False, False, -1)
    assert state.dataloader_references == [None]
    train, evaluation = Loader(), Loader()
    evaluation.remainder = 1
    state._add_dataloader(train)
    state._add_dataloader(evaluation)
    assert state.active_dataloader is evaluation and state.remainder == 1
    state._remove_dataloader(evaluation)
    assert state.active_dataloader is train and state.end_of_dataloader and state.remainder == 3
    state._remove_dataloader(train)
    assert not state.in_dataloader


def test_gradient_state_does_not_keep_loaders_alive():
    state = GradientState()
    loader, other = Loader(), Loader()
    state._add_dataloader(loader)
    del loader
    gc.collect()
    assert state.active_dataloader is None and state.remainder == -1
    state._remove_dataloader(other)
    assert state.dataloader_references == [None]


def test_gradient_state_takes_the_plugin():
    state = GradientState(GradientAccumulationPlugin(num_steps=3, sync_with_dataloader=False))
    assert (state.num_steps, state.sync_with_dataloader, state.adjust_scheduler) == (3, False, True)
    assert GradientState().num_steps == 3
    GradientState._reset_state()
    assert GradientState().num_steps == 1
