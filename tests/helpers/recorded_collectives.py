"""Runs one rank of many in this process, and records its collectives.

torch's process groups of NCCL and gloo are replaced by `_RecordedGroup`, a Python process group without peers: it records
each call below torch.distributed, DistributedDataParallel's C++ reducer and DTensor, and completes it as if every peer
had sent the same. What rank 0 broadcasts is kept in a `Run` and replayed to the ranks that run after it, so that
objects and states arrive as they would.

With `rank_of(..., cuda=True)` the rank is on a host with eight simulated CUDA devices, and NCCL's rules are checked:

- a group of NCCL alone carries no CPU tensors, and no point-to-point messages, which open a communicator for each pair;
- objects travel over NCCL only once the rank has selected its device;
- a barrier names the device;
- a tensor on a device goes to no group of gloo alone.
"""

from __future__ import annotations

import datetime
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from accelerate.runtime import world
from accelerate.state import AcceleratorState, GradientState
from tests.helpers.simulated_devices import SimulatedMachine, simulated_cuda

HOST = 8  # devices and ranks of one host


class Group(NamedTuple):
    """A process group by what its members have in common: two ranks in parallel groups of one mesh compare equal."""

    backend: str
    size: int
    stride: int


class Recorded(NamedTuple):
    """A collective: the dtypes, shapes and kinds of device are those of its tensors, ``?`` for what C++ allocated."""

    operation: str
    group: Group
    tensors: tuple[tuple[str, tuple[int, ...], str], ...]


@dataclass
class Run:
    """The ranks of one run, one after the other; `broadcasts` is what the first of them sent."""

    size: int
    cuda: bool = True
    broadcasts: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)


class _Recorder:
    """The collectives of one rank, and the rules that they broke."""

    def __init__(self, run: Run, machine: SimulatedMachine | None) -> None:
        self.run = run
        self.machine = machine
        self.found: list[Recorded] = []
        self.broken: list[str] = []
        self.groups: Counter[Any] = Counter()
        self.in_objects = 0

    def add(self, operation: str, group: Group, tensors: list[torch.Tensor]) -> None:
        self.check(operation, group, tensors)
        if self.in_objects or operation in ("send", "recv"):  # sizes of pickles, and partners, differ between ranks
            return
        # numpy and C++ allocate for gloo without a mark.
        kinds = ["cpu" if group.backend == "gloo" and self.kind(each) == "?" else self.kind(each) for each in tensors]
        described = tuple((str(t.dtype), tuple(t.shape), kind) for t, kind in zip(tensors, kinds, strict=True))
        self.found.append(Recorded(operation, group, described))

    def check(self, operation: str, group: Group, tensors: list[torch.Tensor]) -> None:
        kinds = {self.kind(tensor) for tensor in tensors}
        if group.backend == "nccl" and "cpu" in kinds:
            self.broken.append(f"{operation} of a CPU tensor over NCCL")
        if "cpu:gloo" not in group.backend and group.backend != "nccl" and "cuda" in kinds:
            self.broken.append(f"{operation} of a CUDA tensor over {group.backend}")
        if "nccl" in group.backend and operation in ("send", "recv") and "cpu" not in kinds:
            self.broken.append(f"{operation} over NCCL")

    def kind(self, tensor: torch.Tensor) -> str:
        if self.machine is None:
            return tensor.device.type
        return getattr(tensor.untyped_storage(), "simulated_device", SimpleNamespace(type="?")).type

    def objects(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch's collective of objects, recorded as one, without what depends on the size of pickles."""

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            given = kwargs.get("group") or next((each for each in args if isinstance(each, dist.ProcessGroup)), None)
            group: Any = given if given is not None else dist.group.WORLD
            self.found.append(Recorded(function.__name__, group.key, ()))
            selected = self.machine is None or any(call[0] == "set_device" for call in self.machine.calls)
            if "nccl" in group.key.backend and not selected:
                self.broken.append(f"{function.__name__} over NCCL before the device was set")
            self.in_objects += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.in_objects -= 1

        return recorded


_recorder: _Recorder | None = None


def _done(result: Any) -> Any:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(result)
    # No public name makes a finished work.
    return vars(torch._C._distributed_c10d)["_create_work_from_future"](future)


@contextmanager
def _unmarked() -> Iterator[None]:
    """Copies between ranks, whose simulated devices differ."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def _name(op: Any) -> str:
    return next((name for name in ("SUM", "AVG", "MAX", "MIN") if op == getattr(dist.ReduceOp, name)), "other")


# Untyped: torch's overloads have a second form for callers, which never reaches a subclass.
_ProcessGroup: Any = dist.ProcessGroup


class _RecordedGroup(_ProcessGroup):
    """A process group without peers. Methods bear torch's names, those of before 2.13 included."""

    Options = SimpleNamespace

    def __init__(
        self, store: Any, rank: int, size: int, options: Any = None, timeout: Any = None, **later: Any
    ) -> None:
        super().__init__(rank, size)
        assert _recorder is not None
        self._recorder = _recorder
        self._rank, self._size = rank, size
        self.options = SimpleNamespace()

    @property
    def key(self) -> Group:
        """What is recorded of the group."""
        ranks = dist.get_process_group_ranks(self)
        config = str(dist.get_backend_config(self))
        backend = config if len({pair.split(":")[1] for pair in config.split(",")}) > 1 else dist.get_backend(self)
        return Group(backend, self._size, ranks[1] - ranks[0] if len(ranks) > 1 else 0)

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    getRank, getSize = rank, size

    @property
    def _device_types(self) -> list[torch.device]:
        kinds = {"nccl": ["cuda"], "gloo": ["cpu"]}.get(self.key.backend, ["cuda", "cpu"])
        return [torch.device(kind) for kind in kinds]

    @property
    def group_name(self) -> Any:
        return distributed_c10d._world.pg_names[self]

    def getBackendName(self) -> str:
        return "recorded"  # DistributedDataParallel reads options of one called gloo

    def _set_sequence_number_for_group(self) -> None: ...
    def shutdown(self) -> None: ...
    def abort(self) -> None: ...

    def _record(self, operation: str, tensors: Any, result: Any = None) -> Any:
        self._recorder.add(operation, self.key, tree_leaves(tensors))
        return _done(result if result is not None else tensors)

    # Collectives, each as if all ranks had sent the same ---------------------------------------------------------------

    @torch.no_grad()
    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Any:
        op = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
        for tensor in tensors:
            if op == dist.ReduceOp.SUM:
                tensor.mul_(self._size)
        return self._record(f"allreduce {_name(op)}", tensors)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Any:
        return self._record("reduce", tensors)

    @torch.no_grad()
    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> Any:
        source, ranks = opts.rootRank, tuple(dist.get_process_group_ranks(self))
        for tensor in tensors:
            self._recorder.groups[self.key, ranks] += 1
            name = (self.key, ranks, self._recorder.groups[self.key, ranks])
            if source == self._rank:
                with _unmarked():
                    self._recorder.run.broadcasts[name] = tensor.detach().clone()
            elif (sent := self._recorder.run.broadcasts.get(name)) is not None and sent.shape == tensor.shape:
                with _unmarked():
                    tensor.detach().copy_(sent)
        return self._record(f"broadcast from {source}", tensors)

    @torch.no_grad()
    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> Any:
        for received, sent in zip(outputs, inputs, strict=True):
            for each in received:
                each.copy_(sent)
        return self._record("allgather", inputs, outputs)

    @torch.no_grad()
    def all_gather_single(self, output: torch.Tensor, sent: torch.Tensor, opts: Any = None) -> Any:
        if output.numel():
            output.view(self._size, -1).copy_(sent.reshape(1, -1).expand(self._size, -1))
        return self._record("all_gather_single", [sent], output)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return [self.all_gather_single(*pair) for pair in zip(outputs, inputs, strict=True)][-1]

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    @torch.no_grad()
    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        for received, sent in zip(outputs, inputs, strict=True):
            received.copy_(sent[self._rank])
        return self._record(f"reduce_scatter {_name(getattr(opts, 'reduceOp', dist.ReduceOp.SUM))}", outputs)

    @torch.no_grad()
    def reduce_scatter_single(self, output: torch.Tensor, sent: torch.Tensor, opts: Any = None) -> Any:
        output.view(-1).copy_(sent.reshape(self._size, -1)[self._rank])
        return self._record(
            f"reduce_scatter_single {_name(getattr(opts, 'reduceOp', dist.ReduceOp.SUM))}", [output], output
        )

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return [self.reduce_scatter_single(*pair, opts) for pair in zip(outputs, inputs, strict=True)][-1]

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    @torch.no_grad()
    def all_to_all_single(self, output: Any, sent: Any, come: Any = None, to: Any = None, opts: Any = None) -> Any:
        if output.shape == sent.shape:
            output.copy_(sent)
        else:
            output.zero_()
        return self._record("all_to_all_single", [sent], output)

    alltoall_base = all_to_all_single

    @torch.no_grad()
    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        for received, sent in zip(outputs, inputs, strict=True):
            received.copy_(sent) if received.shape == sent.shape else received.zero_()
        return self._record("alltoall", inputs, outputs)

    @torch.no_grad()
    def gather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        for received in outputs:
            for each in received:
                each.copy_(inputs[0])
        return self._record(f"gather to {opts.rootRank}", inputs)

    @torch.no_grad()
    def scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        if inputs:
            outputs[0].copy_(inputs[0][self._rank])
        return self._record(f"scatter from {opts.rootRank}", outputs)

    def send(self, tensors: Any, rank: int, tag: int = 0) -> Any:
        return self._record("send", tensors)

    def recv(self, tensors: Any, rank: int, tag: int = 0) -> Any:
        return self._record("recv", tensors)

    def barrier(self, opts: Any = None) -> Any:
        if self.key.backend == "nccl" and not opts.device_ids:
            self._recorder.broken.append("barrier over NCCL without a device")
        return self._record("barrier", [], [])


_OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")


@contextmanager
def rank_of(run: Run, rank: int) -> Iterator[_Recorder]:
    """Makes this process rank `rank` of a run, and gives its recorder.

    Raises:
        AssertionError: on leaving, if one of NCCL's rules was broken.
    """
    global _recorder
    variables = {
        "RANK": str(rank), "WORLD_SIZE": str(run.size), "LOCAL_RANK": str(rank % HOST), "LOCAL_WORLD_SIZE": str(HOST),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": str(not run.cuda),
    }  # fmt: skip
    with ExitStack() as stack:
        machine = stack.enter_context(simulated_cuda(HOST)) if run.cuda else None
        recorder = _recorder = _Recorder(run, machine)
        for name in ("ProcessGroupNCCL", "ProcessGroupGloo"):
            stack.enter_context(mock.patch.object(distributed_c10d, name, _RecordedGroup, create=True))
        for module in (dist, distributed_c10d):
            stack.enter_context(mock.patch.object(module, "is_nccl_available", lambda: True))
            for name in _OBJECTS:
                stack.enter_context(mock.patch.object(module, name, recorder.objects(getattr(module, name))))
        limit = datetime.timedelta(minutes=10)
        stack.enter_context(mock.patch.object(distributed_c10d, "default_pg_nccl_timeout", limit))
        stack.enter_context(
            mock.patch("accelerate.runtime.cluster.rendezvous.init_store", lambda *args: dist.HashStore())
        )
        stack.enter_context(mock.patch.dict("os.environ", variables))
        try:
            yield recorder
            assert not recorder.broken, recorder.broken
        finally:
            world.leave()
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            _recorder = None
            _forget_meshes()


def _forget_meshes() -> None:
    """Clears what DTensor caches by mesh: that of the next rank equals the one whose group is gone."""
    import torch.distributed.tensor.debug as debug

    for name in (
        "_clear_sharding_prop_cache",
        "_clear_fast_path_sharding_prop_cache",
        "_clear_python_sharding_prop_cache",
    ):
        getattr(debug, name, lambda: None)()
