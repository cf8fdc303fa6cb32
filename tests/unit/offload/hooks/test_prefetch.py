"""Reading ahead: the order is learned, a wrong guess is forgotten, errors come up where the weights are used."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import time
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import accelerate
from accelerate.hooks import AlignDevicesHook, align_module_device, remove_hook_from_submodules
from accelerate.offload.hooks.prefetch import AccessPredictor, Prefetcher
from accelerate.offload.io.mmap_reader import ReadInterruptedError, Stop
from tests.helpers.nets import Net

CPU = torch.device("cpu")


# Which comes next ------------------------------------------------------------------------------------------------------


def use(order: AccessPredictor, *numbers: int, finish: bool = True) -> None:
    for number in numbers:
        order.record(number)
    if finish:
        order.finish()


def guessed(order: AccessPredictor, count: int = 4) -> list[int]:
    return list(islice(order.predictions(), count))


def test_before_anything_is_known_units_come_in_the_order_of_their_numbers() -> None:
    order = AccessPredictor()
    assert guessed(order) == []
    order.record(3)
    assert guessed(order) == [4, 5, 6, 7]


def test_the_order_is_learned_with_its_end() -> None:
    order = AccessPredictor()
    use(order, 0, 2, 1)
    order.record(0)
    assert guessed(order) == [2, 1]


def test_a_unit_used_twice_is_told_apart_by_what_came_before() -> None:
    order = AccessPredictor()
    use(order, 0, 1, 0, 2)
    order.record(0)
    assert guessed(order) == [1, 0, 2]
    use(order, 1, 0, finish=False)
    assert guessed(order) == [2]


def test_the_branch_taken_last_is_the_next_guess() -> None:
    order = AccessPredictor()
    use(order, 0, 1, 3)
    use(order, 0, 2, 3)
    order.record(0)
    assert guessed(order, 1) == [2]
    order.record(1)
    assert guessed(order) == [3]  # back on a known way


def test_an_unfinished_forward_is_no_end() -> None:
    order = AccessPredictor()
    use(order, 0, 1, 2)
    use(order, 0, finish=False)
    order.finish(completed=False)
    order.record(0)
    assert guessed(order) == [1, 2]


# Reading ---------------------------------------------------------------------------------------------------------------


class Shelf:
    """A unit whose reading the test holds up, lets go on, or has fail."""

    device = None

    def __init__(self, number: int, size: int = 1) -> None:
        self.number = number
        self.size = size
        self.began, self.go_on, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.version = 0
        self.stopped = False
        self.near = False
        self.reader: Any = None

    def is_resident(self) -> bool:
        return self.near

    def loader(self) -> Any:
        return self.reader

    def sources(self) -> list[object]:
        return [self.version]

    def read(self, stop: Stop) -> dict[str, torch.Tensor]:
        self.began.set()
        try:
            assert self.go_on.wait(60)
            if stop():
                self.stopped = True
                raise ReadInterruptedError
            if self.error is not None:
                raise self.error
            return {"weight": torch.tensor(self.number)}
        finally:
            self.ended.set()


@pytest.fixture
def shelves() -> Iterator[list[Shelf]]:
    made = [Shelf(number) for number in range(4)]
    yield made
    for shelf in made:
        shelf.go_on.set()


def over(shelves: list[Shelf]) -> Prefetcher:
    reader = Prefetcher()
    for shelf in shelves:
        reader.register(shelf)
    return reader


def test_the_next_one_is_read_while_this_one_is_used(shelves: list[Shelf]) -> None:
    reader = over(shelves)
    assert reader.take(shelves[0]) is None  # nobody could know
    assert shelves[1].began.wait(60)
    shelves[1].go_on.set()
    assert reader.take(shelves[1]) == {"weight": torch.tensor(1)}


def test_what_is_at_hand_is_read_at_once_without_a_thread(shelves: list[Shelf]) -> None:
    reader = over(shelves)
    for shelf in shelves:
        shelf.near = True
        shelf.go_on.set()
    assert reader.take(shelves[0]) is None  # read by who asked
    threads = set(threading.enumerate())
    assert all(shelf.ended.is_set() for shelf in shelves[1:])
    assert reader.take(shelves[1]) == {"weight": torch.tensor(1)}
    shelves[2].version += 1
    assert reader.take(shelves[2]) is None  # it has changed since
    reader.finish()
    # Of its own: threads of other tests may end meanwhile.
    assert not reader._here and not set(threading.enumerate()) - threads

    shelves[1].near = False
    shelves[1].go_on.clear()
    shelves[1].began.clear()
    assert reader.take(shelves[0]) is None
    assert shelves[1].began.wait(60)  # in a thread
    shelves[1].go_on.set()
    assert reader.take(shelves[1]) == {"weight": torch.tensor(1)}


def test_an_error_at_hand_comes_up_where_the_weights_are_used(shelves: list[Shelf]) -> None:
    reader = over(shelves)
    for shelf in shelves:
        shelf.near = True
        shelf.go_on.set()
    shelves[1].error = RuntimeError("unreadable")
    assert reader.take(shelves[0]) is None
    assert reader.take(shelves[1]) is None  # read now: raised there


class Slow:
    """A loader with something to do at leisure, until it is stopped."""

    slow = True

    def __init__(self) -> None:
        self.began, self.stopped = threading.Event(), threading.Event()

    def remap_huge_pages(self, stop: Stop) -> None:
        self.began.set()
        while not stop():
            time.sleep(0.001)
        self.stopped.set()


def test_leisure_ends_when_something_is_to_be_read(shelves: list[Shelf]) -> None:
    reader, loader = over(shelves), Slow()
    for shelf in shelves:
        shelf.near, shelf.reader = True, loader
        shelf.go_on.set()
    reader.take(shelves[0])
    reader.finish(completed=False)
    assert not loader.began.is_set()
    for shelf in shelves:
        reader.take(shelf)
    reader.finish()
    assert loader.began.wait(60) and not loader.stopped.is_set()
    shelves[1].near = False
    reader.take(shelves[0])
    assert loader.stopped.wait(60)


def test_no_more_waits_than_there_is_room_for(shelves: list[Shelf]) -> None:
    for shelf in shelves:
        shelf.size = 1 << 30
        shelf.go_on.set()
    reader = over(shelves)
    reader.take(shelves[0])
    assert shelves[1].ended.wait(60)
    assert reader._jobs.keys() == {1}
    for shelf in shelves:
        shelf.size = 1
    reader.take(shelves[1])
    assert reader._jobs.keys() == {2, 3}  # small ones go together


def test_a_wrong_guess_is_given_up(shelves: list[Shelf]) -> None:
    reader = over(shelves)
    reader.take(shelves[0])
    assert shelves[1].began.wait(60)
    assert reader.take(shelves[2]) is None
    shelves[1].go_on.set()
    assert shelves[1].ended.wait(60) and shelves[1].stopped
    shelves[3].go_on.set()
    assert shelves[3].ended.wait(60)
    assert reader.take(shelves[3]) == {"weight": torch.tensor(3)}


def test_an_error_comes_up_where_the_weights_are_used_and_nowhere_else(shelves: list[Shelf]) -> None:
    reader = over(shelves)
    shelves[1].error = OSError("the disk is gone")
    for shelf in shelves:
        shelf.go_on.set()
    reader.take(shelves[0])
    assert shelves[1].ended.wait(60)
    reader.take(shelves[2])  # another branch
    reader.finish()
    reader._order = AccessPredictor()
    reader.take(shelves[0])
    shelves[1].ended.wait(60)
    while not reader._jobs[1].future.done():
        pass
    with pytest.raises(OSError, match="the disk is gone"):
        reader.take(shelves[1])


def test_what_has_changed_since_is_not_handed_out(shelves: list[Shelf]) -> None:
    reader = over(shelves)
    shelves[1].go_on.set()
    reader.take(shelves[0])
    assert shelves[1].ended.wait(60)
    shelves[1].version = 1
    assert reader.take(shelves[1]) is None


def test_what_nobody_waits_for_any_more_is_not_kept(shelves: list[Shelf]) -> None:
    reader = over(shelves)
    reader.take(shelves[0])
    assert shelves[1].began.wait(60)
    reader.finish()
    assert not reader._jobs
    shelves[1].go_on.set()
    assert shelves[1].ended.wait(60) and shelves[1].stopped
    assert not shelves[2].began.is_set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_reads_for_itself(shelves: list[Shelf]) -> None:
    reader = over(shelves)
    reader.take(shelves[0])
    assert shelves[1].began.wait(60)
    child = os.fork()
    if child == 0:
        shelves[1].go_on.set()
        os._exit(0 if reader.take(shelves[1]) is None else 1)
    assert os.waitpid(child, 0)[1] == 0


# Models ----------------------------------------------------------------------------------------------------------------


def on_disk(folder: Path, net: nn.Module, **options: Any) -> nn.Module:
    accelerate.Accelerator(cpu=True).save_model(net, folder, max_shard_size="2KB")
    with accelerate.init_empty_weights():
        empty = copy.deepcopy(net).to("meta")
    where = {name: "disk" for name, _ in net.named_children()}
    return accelerate.load_checkpoint_and_dispatch(empty, folder, device_map=where, **options).eval()


def reader_of(model: nn.Module) -> Prefetcher:
    found = [
        part._hf_hook.prefetcher
        for part in model.modules()
        if isinstance(getattr(part, "_hf_hook", 0), AlignDevicesHook)
    ]
    assert found[0] is not None and all(one is found[0] for one in found if one is not None)
    return found[0]


@pytest.fixture
def net() -> nn.Module:
    return Net().eval()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_outputs_are_those_of_the_resident_model(tmp_path: Path, net: nn.Module, mode: Any) -> None:
    model, x = on_disk(tmp_path, net), torch.randn(3, 4)
    with mode():
        expected = net(x)
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert not reader_of(model)._jobs
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_switch(tmp_path: Path, net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 4)
    hooks = lambda model: [part._hf_hook for part in model.modules() if hasattr(part, "_hf_hook")]  # noqa: E731
    off = on_disk(tmp_path, net, prefetch=False)
    assert all(hook.prefetcher is None for hook in hooks(off))
    monkeypatch.setenv("ACCELERATE_OFFLOAD_PREFETCH", "0")
    by_environment = on_disk(tmp_path, net)
    assert all(hook.prefetcher is None for hook in hooks(by_environment))
    assert reader_of(on_disk(tmp_path, net, prefetch=True))
    with torch.no_grad():
        assert torch.equal(off(x), net(x)) and torch.equal(by_environment(x), net(x))


def test_weights_in_memory_that_are_used_there_need_no_reader(net: nn.Module) -> None:
    model = accelerate.cpu_offload(net, CPU)
    assert all(part._hf_hook.prefetcher is None for part in model.modules() if hasattr(part, "_hf_hook"))


def test_a_forward_that_fails_and_the_next_one(tmp_path: Path, net: nn.Module) -> None:
    model, x = on_disk(tmp_path, net), torch.randn(3, 4)
    model(x)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5))
    assert not reader_of(model)._jobs
    with torch.no_grad():
        assert torch.equal(model(x), net(x))


def test_a_file_cut_short_is_an_error_in_the_forward(tmp_path: Path) -> None:
    large = nn.Sequential(nn.Linear(4, 8000), nn.Linear(8000, 4))  # small weights are kept once they were read
    model, x = on_disk(tmp_path, large), torch.randn(3, 4)
    model(x)
    for file in tmp_path.glob("*.safetensors"):
        os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(RuntimeError, match="truncated"):
        model(x)


def test_files_may_go_once_they_were_read(tmp_path: Path, net: nn.Module) -> None:
    model, x = on_disk(tmp_path, net), torch.randn(3, 4)
    expected = model(x)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert torch.equal(model(x), expected)


def test_what_is_written_to_a_weight_stays_with_it(tmp_path: Path, net: nn.Module) -> None:
    model, x = on_disk(tmp_path, net), torch.randn(3, 4)
    with align_module_device(model.emb), torch.no_grad():
        weight = model.emb.weight
        weight.zero_()
    assert torch.equal(model(x), net(x))
    assert not weight.any()  # its memory was not taken away from who still has it


def test_weights_that_are_exchanged_between_forwards(tmp_path: Path, net: nn.Module) -> None:
    model, x = on_disk(tmp_path, net), torch.randn(3, 4)
    model(x)
    weights = model.head._hf_hook.weights_map.dataset
    weights.state_dict["head.bias"] = torch.zeros(4)
    with torch.no_grad():
        net.head.bias.zero_()
        assert torch.equal(model(x), net(x))


def test_copies_read_for_themselves_and_nothing_outlives_its_model(tmp_path: Path) -> None:
    model, x = accelerate.disk_offload(Net().eval(), tmp_path, CPU), torch.randn(3, 4)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        assert reader_of(other) is not reader_of(model)
    gone = weakref.ref(reader_of(model))
    handed_out = model.head._hf_hook
    del model, other
    gc.collect()
    assert gone() is handed_out.prefetcher  # and nothing else keeps it
    del handed_out
    gc.collect()
    assert gone() is None


def test_hooks_that_come_off_in_the_middle(tmp_path: Path, net: nn.Module) -> None:
    x = torch.randn(3, 4)
    model = accelerate.disk_offload(copy.deepcopy(net), tmp_path, CPU)
    with torch.no_grad():
        assert torch.equal(model(x), net(x))
        remove_hook_from_submodules(model.layers[1])
        assert torch.equal(model(x), net(x))
        remove_hook_from_submodules(model)
        assert torch.equal(model(x), net(x))


class Branching(nn.Module):
    """Calls one block twice, and another one or not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor, detour: bool) -> torch.Tensor:
        x = self.first(x)
        x = self.second(x) if detour else x
        out: torch.Tensor = self.first(self.third(x))
        return out


def test_blocks_called_twice_and_branches(tmp_path: Path) -> None:
    net = Branching()
    model = on_disk(tmp_path, net)
    for detour in (True, False, False, True):
        x = torch.randn(2, 4)
        with torch.no_grad():
            assert torch.equal(model(x, detour), net(x, detour))


def test_a_compiled_model_breaks_off_at_its_hooks(tmp_path: Path, net: nn.Module) -> None:
    model, x = on_disk(tmp_path, net), torch.randn(3, 4)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(x), net(x))
    torch._dynamo.reset()
