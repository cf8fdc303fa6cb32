"""Joining and leaving a run on real processes."""

from __future__ import annotations

import datetime
import importlib
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.runtime import devices, world
from accelerate.settings import env
from accelerate.settings.enums import DistributedType
from accelerate.state import AcceleratorState, PartialState
from tests.helpers.releases import FSDP2_ON_CPU


def taken_up() -> tuple[object, ...]:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    state = PartialState(cpu=True)
    found = (state.process_index, state.num_processes, state.backend, state.distributed_type)
    PartialState._reset_state()
    again = PartialState(cpu=True)
    return (*found, again.process_index == state.process_index, dist.is_initialized())


def test_a_group_that_is_there_is_taken_up(run_ranks):
    for rank, found in enumerate(run_ranks(2, taken_up, join=False)):
        assert found == (rank, 2, "gloo", DistributedType.MULTI_CPU, True, True)


def left_and_joined_again() -> list[int]:
    sums = []
    for _ in range(2):
        state = PartialState(cpu=True, timeout=datetime.timedelta(seconds=20))
        sums.append(int(world.current().collectives.all_reduce(torch.tensor(state.process_index + 1))))
        state.destroy_process_group()
        assert not dist.is_initialized() and not world.is_joined()
        PartialState._reset_state()
    return sums


def test_a_run_can_be_left_and_joined_again(run_ranks):
    assert run_ranks(3, left_and_joined_again, join=False) == [[6, 6]] * 3


class PretendedCuda(devices.DeviceKind):
    """A machine with a GPU for each rank, whose backend carries nothing."""

    def count(self) -> int:
        return 8

    def set_device(self, device: torch.device) -> None:
        pass


def joined_with_offload(made_before: bool, fields: dict[str, Any]) -> tuple[str, str | None, str, list[float]]:
    """The group's backends, that of the state, and of a group of some ranks; a sum over CPU tensors, if there can be one."""
    # torch's own stand-in for NCCL, which has no public name: importing it registers the backend "fake".
    importlib.import_module("torch.testing._internal.distributed.fake_pg")
    kind = PretendedCuda("cuda", DistributedType.MULTI_GPU, ("fake",))
    with mock.patch.object(devices, "default_kind", lambda: kind):
        if made_before:
            PartialState(timeout=datetime.timedelta(seconds=20))
        state = AcceleratorState(
            fsdp_plugin=FullyShardedDataParallelPlugin(**fields) if fields else None,
            **({} if made_before else {"timeout": datetime.timedelta(seconds=20)}),
        )
        some = dist.new_group([0, 1])
        summed = torch.ones(1)
        if "gloo" in dist.get_backend_config():
            dist.all_reduce(summed, group=some)
            current = world.current().collectives
            current.barrier()
            assert current.all_gather_object(state.process_index) == [0, 1]
        return dist.get_backend_config(), state.backend, dist.get_backend_config(some), summed.tolist()


BOTH = ("cuda:fake,cpu:gloo", "fake", "cuda:fake,cpu:gloo", [2.0])
VARIABLES = {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}


@pytest.mark.parametrize(
    ("made_before", "fields", "env", "both"),
    [
        (False, {"fsdp_version": 2, "cpu_offload": True}, {}, True),
        (False, {"fsdp_version": 1, "cpu_offload": True}, {}, True),
        (False, {}, VARIABLES, True),
        (True, {}, VARIABLES, True),
        (False, {"fsdp_version": 2, "cpu_offload": False}, {}, False),
        (True, {"fsdp_version": 2, "cpu_offload": True}, {}, False),  # the group is there, and stays
        (False, {}, {}, False),
    ],
)
def test_offloaded_parameters_need_gloo_besides(made_before, fields, env, both, run_ranks):
    for found in run_ranks(2, joined_with_offload, made_before, fields, join=False, env=env):
        assert (found == BOTH) if both else ("gloo" not in found[0] and found[1] == "fake")


def offloaded_in_fp16() -> str:
    importlib.import_module("torch.testing._internal.distributed.fake_pg")
    kind = PretendedCuda("cuda", DistributedType.MULTI_GPU, ("fake",))
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=True)
    with mock.patch.object(devices, "default_kind", lambda: kind):
        PartialState(backend="cuda:fake", timeout=datetime.timedelta(seconds=20))
        with warnings.catch_warnings(), pytest.raises(ValueError, match="cpu:gloo") as raised:
            warnings.simplefilter("ignore")  # torch's, of a scaler without a GPU
            Accelerator(mixed_precision="fp16", fsdp_plugin=plugin)
        PartialState().destroy_process_group()
    return str(raised.value)


def test_a_group_without_gloo_is_refused_where_fp16_needs_it(run_ranks):
    for message in run_ranks(2, offloaded_in_fp16, join=False):
        assert "backend='cuda:fake,cpu:gloo'" in message and "--fsdp_offload_params" in message


def joined_through_mpi() -> tuple[int, int, int]:
    names = {"RANK": "RANK", "WORLD_SIZE": "SIZE", "LOCAL_RANK": "LOCAL_RANK", "LOCAL_WORLD_SIZE": "LOCAL_SIZE"}
    env.publish({f"OMPI_COMM_WORLD_{short}": env.get(name) for name, short in names.items()})
    env.publish(dict.fromkeys(names))
    state = PartialState(cpu=True, timeout=datetime.timedelta(seconds=20))
    env.publish({f"OMPI_COMM_WORLD_{short}": None for short in names.values()})
    return state.process_index, state.num_processes, int(env.get("RANK") or -1)


def test_mpi_variables_are_enough(run_ranks):
    assert run_ranks(2, joined_through_mpi, join=False) == [(0, 2, 0), (1, 2, 1)]


def one_who_stays_away() -> str:
    rank = env.integer("RANK", -1)
    if rank == 1:
        return "away"
    with pytest.raises(RuntimeError, match="waited 2 s for rank 1 to join") as caught:
        PartialState(cpu=True, timeout=datetime.timedelta(seconds=2))
    return str(caught.value)


def test_a_rank_that_stays_away_is_named_by_the_others(run_ranks):
    first, away, third = run_ranks(3, one_who_stays_away, join=False)
    assert away == "away"
    assert first.startswith("rank 0 of 3") and third.startswith("rank 2 of 3")


def made_by_the_first(folder: str, locally: bool) -> bool:
    """Whether what the first process makes in its block was there in this one's; two processes a machine."""
    state = PartialState(cpu=True)
    rank = state.process_index
    state.local_process_index = rank % 2
    made = Path(folder, f"{rank // 2 if locally else 0}")
    with state.local_main_process_first() if locally else state.main_process_first():
        if rank == 0 or (locally and state.is_local_main_process):
            time.sleep(0.3)  # so that others which do not wait come too early
            made.touch()
        return made.exists()


@pytest.mark.parametrize("locally", [False, True])
def test_the_first_process_is_through_before_the_others_begin(run_ranks, tmp_path, locally):
    assert run_ranks(4, made_by_the_first, str(tmp_path), locally) == [True] * 4


def made_before_all_go_on(folder: str) -> bool:
    state = PartialState(cpu=True)
    made = Path(folder, "made")
    if state.is_last_process:
        time.sleep(0.3)
        made.touch()
    state.wait_for_everyone()
    return made.exists()


def test_everyone_waits_for_the_last(run_ranks, tmp_path):
    assert run_ranks(3, made_before_all_go_on, str(tmp_path)) == [True] * 3


FIRST_FAILS_IN_BLOCK = """
import accelerate.state as s
state = s.PartialState(cpu=True)
try:
    with state.main_process_first():
        if state.is_main_process:
            raise KeyError("download")
except KeyError:
    pass
state.wait_for_everyone()
print("done", state.process_index)
"""


def test_an_exception_of_the_first_does_not_leave_the_others_waiting(tmp_path):
    outputs = run_script(FIRST_FAILS_IN_BLOCK, tmp_path)
    assert [out.strip() for out, _ in outputs] == ["done 0", "done 1"]
    assert [code for _, code in outputs] == [0, 0]


ENDS = """
import atexit, glob
def threads_of_groups():
    names = [open(path).read() for path in glob.glob("/proc/self/task/*/comm")]
    print(sum("gloo_runloop" in name for name in names))
atexit.register(threads_of_groups)
import torch
from accelerate.accelerator import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
accelerator = Accelerator(cpu=True, fsdp_plugin={plugin})
model = torch.nn.Linear(4, 4)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
for _ in range(5):
    accelerator.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    optimizer.zero_grad()
group = torch.distributed.group.WORLD
atexit.register(print, "bye")
{goodbye}
"""


@pytest.mark.parametrize(
    ("plugin", "goodbye"),
    [
        ("None", ""),
        ("None", "accelerator.end_training()"),
        ("FullyShardedDataParallelPlugin(fsdp_version=1)", ""),
        pytest.param("FullyShardedDataParallelPlugin(fsdp_version=2)", "", marks=FSDP2_ON_CPU),
    ],
)
def test_a_script_that_just_ends_leaves_cleanly(tmp_path, plugin, goodbye):
    # A group that outlives its leaving still has threads while the interpreter ends, and aborts it now and then.
    outputs = run_script(ENDS.format(plugin=plugin, goodbye=goodbye), tmp_path)
    assert outputs == [("bye\n0\n", 0), ("bye\n0\n", 0)]


def run_script(text: str, folder) -> list[tuple[str, int]]:
    """Runs a script on two processes as torchrun would start them, without its agent."""
    script = folder / "script.py"
    script.write_text(text)
    port = free_port()
    children = []
    for rank in range(2):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        environment |= {name: str(value) for name, value in place.items()}
        children.append(
            subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)
        )
    return [(child.communicate(timeout=60)[0], child.returncode) for child in children]


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
