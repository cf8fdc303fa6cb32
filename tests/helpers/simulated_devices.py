"""Simulates a machine with N CUDA devices on a CPU build of torch, while torch's own Python code runs.

`simulated_cuda(count)` replaces what lies below torch's Python: the functions of the driver (count, current device,
streams, memory), and the memory of tensors. ``torch.cuda.set_device``, ``Stream``, ``Event``, ``get_device_properties``,
``autocast``, ``GradScaler``, ``DataLoader(pin_memory=True)``, ``torch.load`` and so on are torch's, with their checks of
arguments.

Tensors keep CPU memory. A storage that belongs to a device is marked with it, so views, parameters and detached tensors
report that device. A TorchFunctionMode moves and creates tensors, marks results, and rejects operations over several
devices; a TorchDispatchMode marks what is made below Python: in backward passes, by DTensor, by flash attention. Left out:
kernels that differ from the CPU's, asynchrony (copies are done when they return), what C++ allocates by itself (DDP's
buckets), and NCCL.

Private names of torch are used here because the simulation stands below its public interface; tests use public ones only.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 1 << 30
CPU = torch.device("cpu")
# Untyped: descriptors of their classes are used as functions.
_Tensor: Any = torch.Tensor
_C: Any = torch._C


class SimulatedMachine:
    """A machine with CUDA devices.

    Attributes:
        count: Number of devices; may be changed to simulate ``CUDA_VISIBLE_DEVICES``.
        current: Index of the current device.
        capability: Compute capability of each device.
        total: Bytes of memory of each device.
        free: Free bytes by device.
        calls: What the driver was asked to do: ``("set_device", 1)``, ``("record_stream", device, stream)`` ...
    """

    def __init__(self, count: int, memory: int, capability: tuple[int, int]) -> None:
        self.count = count
        self.current = 0
        self.capability = capability
        self.total = memory
        self.free = [memory - index * GIB for index in range(count)]
        self.calls: list[tuple[Any, ...]] = []
        self.streams = 0
        self.stream_of: dict[int, int] = {}
        self.generators = tuple(torch.Generator() for _ in range(count))

    # The driver -------------------------------------------------------------------------------------------------------

    def check(self, index: int) -> int:
        """Returns `index`, and raises the driver's error for a device that does not exist."""
        if not 0 <= index < self.count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return index

    def select(self, index: int) -> int:
        """Makes a device the current one and returns the one before; negative changes nothing."""
        before = self.current
        if index >= 0:
            self.current = self.check(index)
        return before

    def set_device(self, index: int) -> None:
        """``cudaSetDevice``."""
        self.calls.append(("set_device", self.check(index)))
        self.current = index

    def properties(self, index: int) -> SimpleNamespace:
        """``cudaGetDeviceProperties``."""
        major, minor = self.capability
        return SimpleNamespace(
            name=f"Simulated GPU {self.check(index)}", major=major, minor=minor, total_memory=self.total,
            multi_processor_count=100, is_integrated=0, pci_domain_id=0, pci_bus_id=index, pci_device_id=0,
        )  # fmt: skip

    def memory(self, index: int) -> tuple[int, int]:
        """``cudaMemGetInfo``."""
        return self.free[self.check(index)], self.total

    def use_stream(self, *, stream_id: int, device_index: int, device_type: int) -> None:
        """Makes a stream, and its device, the current one."""
        self.current = self.check(device_index)
        self.stream_of[device_index] = stream_id

    def device(self, wanted: Any) -> torch.device:
        """Returns the device an argument stands for, with an index.

        Raises:
            RuntimeError: for a CUDA device that does not exist.
        """
        found = torch.device("cuda", wanted) if isinstance(wanted, int) else torch.device(wanted)
        if found.type != "cuda":
            return found if found.type != "cpu" else CPU
        if not self.count:
            raise RuntimeError("Found no NVIDIA driver on your system.")
        return torch.device("cuda", self.check(self.current if found.index is None else found.index))


# Storages ---------------------------------------------------------------------------------------------------------------


def _storage(tensor: torch.Tensor) -> Any:
    try:
        return getattr(tensor, "_local_tensor", tensor).untyped_storage()  # of a DTensor
    except (RuntimeError, NotImplementedError):  # sparse
        return None


def _device_of(tensor: torch.Tensor) -> torch.device:
    """Where a tensor seems to be; called below the mode."""
    real = _C.TensorBase.device.__get__(tensor)
    return getattr(_storage(tensor), "simulated_device", CPU) if real.type == "cpu" else real


def _devices(tensors: list[torch.Tensor]) -> list[torch.device]:
    """The devices of tensors; scalars on the CPU go with any."""
    real = [tensor for tensor in tensors if not _C.TensorBase.is_meta.__get__(tensor)]
    return list(dict.fromkeys(_device_of(t) for t in real if t.ndim or _device_of(t).type != "cpu"))


def _mark(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    _storage(tensor).simulated_device = device  # the CPU as well: what C++ allocates has no mark
    return tensor


def _storage_device(storage: Any) -> torch.device:
    return getattr(storage, "simulated_device", None) or _C.StorageBase.device.__get__(storage)


def _storage_to(storage: Any, device: torch.device, non_blocking: bool = False) -> Any:
    if _storage_device(storage) == device:
        return storage
    copied = torch.UntypedStorage(storage.nbytes()).copy_(storage, non_blocking)
    if device.type == "cuda":
        copied.simulated_device = device
    return copied


# Tensors ----------------------------------------------------------------------------------------------------------------


class _Devices(TorchFunctionMode):
    """Makes tensors report, keep and check simulated devices."""

    def __init__(self, machine: SimulatedMachine) -> None:
        super().__init__()
        self._machine = machine
        self._special: dict[Any, Callable[..., Any]] = {
            torch.device: self._device,
            functional.scaled_dot_product_attention: self._attention,
            _Tensor.grad.__get__: self._grad,
            _Tensor.to: self._to,
            _Tensor.cpu: lambda tensor, *args, **kwargs: self._to(tensor, CPU),
            _Tensor.cuda: lambda tensor, device=None, *args, **kwargs: self._to(
                tensor, "cuda" if device is None else device
            ),
            _Tensor.numpy: self._numpy,
            _Tensor.__array__: self._numpy,
            _Tensor.is_pinned: lambda tensor, *args: getattr(_storage(tensor), "simulated_pin", False),
            _Tensor.pin_memory: self._pin,
            _Tensor.backward: self._backward,
        }
        # Operands may be on several devices, and results share no rule.
        self._mixed = {_Tensor.copy_, _Tensor.data.__set__, _Tensor.__getitem__, _Tensor.__setitem__, _Tensor.set_}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = self._special.get(func)
        return special(*args, **kwargs) if special is not None else self._call(func, args, kwargs)

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Tensor)]
        wanted, pinned = kwargs.get("device"), kwargs.get("pin_memory", False)
        if wanted is not None:
            wanted = self._machine.device(wanted)
            if func in (torch.as_tensor, torch.asarray) and isinstance(args[0], _Tensor):
                return self._to(args[0], wanted, kwargs.get("dtype"))
            kwargs = {**kwargs, "device": CPU if wanted.type == "cuda" else wanted}
        if pinned:
            kwargs = {**kwargs, "pin_memory": False}
        there = self._common(func, given) if wanted is None else wanted
        result = func(*args, **kwargs)
        before = {storage._cdata for tensor in given if (storage := _storage(tensor)) is not None}
        for made in tree_leaves(result):
            storage = _storage(made) if isinstance(made, _Tensor) and not made.is_meta else None
            if storage is not None and storage._cdata not in before and not hasattr(storage, "simulated_device"):
                _mark(made, there)
                if pinned:
                    storage.simulated_pin = True
        return result

    def _common(self, func: Any, tensors: list[torch.Tensor]) -> torch.device:
        """The device of an operation over tensors; scalars on the CPU go with any."""
        found = _devices(tensors)
        if len(found) > 1 and func not in self._mixed and not getattr(func, "__name__", "").startswith("_"):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} ({func})")
        return found[0] if found else CPU

    def _device(self, *args: Any, **kwargs: Any) -> torch.device:
        return (
            torch.device("cuda", *args)
            if len(args) == 1 and isinstance(args[0], int)
            else torch.device(*args, **kwargs)
        )

    def _to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        copy = kwargs.pop("copy", False)
        if isinstance(kwargs.get("other", args[0] if args else None), _Tensor):
            other = kwargs.pop("other", None)
            other, *rest = args if other is None else (other, *args)
            args = (_device_of(other), other.dtype, *rest)
        device, dtype, _, layout = _C._nn._parse_to(*args, **kwargs)
        here = _device_of(tensor)
        there = here if device is None else self._machine.device(device)
        options = {} if layout is None else {"memory_format": layout}
        if "meta" in (here.type, there.type):
            real = CPU if there.type == "cuda" else there
            return _Tensor.to(tensor, real, dtype or tensor.dtype, copy=copy, **options)
        moved = _Tensor.to(tensor, CPU, dtype or tensor.dtype, copy=copy or there != here, **options)
        return moved if moved is tensor else _mark(moved, there)

    def _cuda(self, tensor: torch.Tensor, device: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._to(tensor, "cuda" if device is None else device)

    def _attention(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(query, "_local_tensor") and query.device.type == "cuda":  # whose handlers are for CUDA's kernels
            causal, scale = kwargs.get("is_causal", False), kwargs.get("scale")
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)[0]
        return self._call(functional.scaled_dot_product_attention, (query, key, value, *args), kwargs)

    def _grad(self, tensor: torch.Tensor) -> torch.Tensor | None:
        grad = _Tensor.grad.__get__(tensor)
        if grad is not None and _device_of(grad) != _device_of(tensor):
            _mark(grad, _device_of(tensor))
        return grad

    def _numpy(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if (device := _device_of(tensor)).type == "cuda":
            raise TypeError(f"can't convert {device} device type tensor to numpy. Use Tensor.cpu() first.")
        return _Tensor.numpy(tensor, *args, **kwargs)

    def _pin(self, tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        if (device := _device_of(tensor)).type == "cuda":
            raise RuntimeError(f"cannot pin 'torch.{device.type}.FloatTensor' only dense CPU tensors can be pinned")
        self._machine.calls.append(("pin_memory",))
        pinned = tensor.clone()
        _storage(pinned).simulated_pin = True
        return pinned

    def _backward(self, tensor: torch.Tensor, gradient: Any = None, *args: Any, **kwargs: Any) -> None:
        with self:  # hooks and recomputation run below it
            torch.autograd.backward(tensor, gradient, *args, **kwargs)


def _flash(
    query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, *rest: Any, scale: Any = None
) -> Any:
    """CUDA's flash attention, by the CPU's: the values, log-sum-exps, and the rest of its nine outputs."""
    given = {"scale": scale}
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout, causal, **given)
    seed = torch.zeros((), dtype=torch.int64)
    return out, sums, None, None, query.shape[2], key.shape[2], seed, seed.clone(), None


def _flash_backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, sums: Any, *rest: Any, scale: Any = None
) -> Any:
    """The backward of `_flash`; `rest` holds its cumulative lengths, dropout and whether it was causal."""
    dropout, causal = rest[4:6]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, sums, dropout, causal, scale=scale
    )


# The CPU has no kernels of these names.
_KERNELS: dict[str, Callable[..., Any]] = {
    "aten._scaled_dot_product_flash_attention.default": _flash,
    "aten._scaled_dot_product_flash_attention_backward.default": _flash_backward,
}


class _Marks(TorchDispatchMode):
    """Marks results below torch's Python: in backward passes, in DTensor's local operations, in the compiler."""

    def __init__(self, machine: SimulatedMachine) -> None:
        super().__init__()
        self._machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # its own handler comes back with local tensors
        wanted = kwargs.get("device")
        if wanted is not None:
            wanted = self._machine.device(wanted)
            kwargs = {**kwargs, "device": CPU if wanted.type == "cuda" else wanted}
        there = wanted if wanted is not None and wanted.type == "cuda" else self._of_marked(args, kwargs)
        with _C.DisableTorchFunction():  # an operator asks `_Devices` again
            result = _KERNELS.get(str(func), func)(*args, **kwargs)
        if func is torch.ops.aten.copy_.default:  # over devices
            return result
        for made in tree_leaves(result):
            storage = _storage(made) if isinstance(made, _Tensor) and not made.is_meta else None
            if storage is not None and there is not None and not hasattr(storage, "simulated_device"):
                _mark(made, there)
        return result

    @staticmethod
    def _of_marked(args: Any, kwargs: Any) -> torch.device | None:
        """The device of the operands, or None if C++ made them all: it believes that they are the CPU's."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Tensor)]
        found = _devices([each for each in given if hasattr(_storage(each), "simulated_device")])
        return next((device for device in found if device.type == "cuda"), found[0] if found else None)


def _marked_state(read: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    return _mark(read(*args), CPU)


_PROPERTIES: dict[str, Any] = {
    "device": property(_device_of),
    "is_cuda": property(lambda tensor: _device_of(tensor).type == "cuda"),
    "is_cpu": property(lambda tensor: _device_of(tensor).type == "cpu"),
    "get_device": lambda tensor: -1 if _device_of(tensor).index is None else _device_of(tensor).index,
}


# Streams ----------------------------------------------------------------------------------------------------------------


def _stream_methods(machine: SimulatedMachine) -> tuple[dict[str, Any], dict[str, Any]]:
    def new_stream(
        cls: Any, priority: int = 0, stream_id: int = -1, device_index: int = -1, device_type: int = 1
    ) -> Any:
        stream = object.__new__(cls)
        if stream_id < 0:
            machine.streams += 1
            stream_id, device_index = machine.streams, machine.current
        stream.stream_id = stream.cuda_stream = stream_id
        stream.device_index, stream.device_type = device_index, device_type
        stream.device = torch.device("cuda", machine.check(device_index))
        return stream

    def new_event(cls: Any, **options: Any) -> Any:
        event = object.__new__(cls)
        event.device = None
        return event

    def record(event: Any, stream: Any) -> None:
        if event.device not in (None, stream.device):
            raise RuntimeError(f"Event device {event.device} does not match recording stream's device {stream.device}.")
        event.device = stream.device
        machine.calls.append(("record", stream.device, stream.stream_id))

    streams = {
        "__new__": new_stream,
        "__init__": lambda *args, **kwargs: None,
        "__eq__": lambda one, other: (one.stream_id, one.device) == (other.stream_id, other.device),
        "synchronize": lambda stream: machine.calls.append(("synchronize_stream", stream.device)),
        "query": lambda stream: True,
        "is_capturing": lambda stream: False,
    }
    events = {
        "__new__": new_event,
        "__init__": lambda *args, **kwargs: None,
        "record": record,
        "wait": lambda event, stream: machine.calls.append(("wait_event", stream.device)),
        "synchronize": lambda event: None,
        "query": lambda event: True,
    }
    return streams, events


# All together -----------------------------------------------------------------------------------------------------------


@contextmanager
def simulated_cuda(
    count: int, memory: int = 80 * GIB, capability: tuple[int, int] = (9, 0)
) -> Iterator[SimulatedMachine]:
    """Simulates a machine with `count` CUDA devices; 0 is a CUDA build of torch without a device.

    Args:
        count: Number of devices.
        memory: Bytes of memory of each.
        capability: Compute capability of each; below (8, 0) the hardware has no bf16.
    """
    if torch.backends.cuda.is_built():
        pytest.skip("devices are simulated on builds of torch without CUDA, whose own types cannot be replaced")
    importlib.import_module("torch._dynamo")  # optimizers import it; simulated, it would look for a driver

    machine = SimulatedMachine(count, memory, capability)
    mode = _Devices(machine)

    def init() -> None:
        if not machine.count:
            raise RuntimeError("No CUDA GPUs are available")

    run = threading.Thread.run

    def run_in_mode(thread: threading.Thread) -> None:
        with _Devices(machine), _Marks(machine):  # modes belong to a thread
            run(thread)

    driver: dict[str, Any] = {
        "_has_cuda": True,
        "_cuda_getDeviceCount": lambda: machine.count,
        "_cuda_init": init,
        "_cuda_isInBadFork": lambda: False,
        "_cuda_getArchFlags": lambda: None,
        "_cuda_setDevice": machine.set_device,
        "_cuda_getDevice": lambda: machine.current,
        "_cuda_synchronize": lambda: machine.calls.append(("synchronize", machine.current)),
        "_cuda_emptyCache": lambda: machine.calls.append(("empty_cache",)),
        "_cuda_ipc_collect": lambda: None,
        "_cuda_memoryStats": lambda index: {},
        "_cuda_resetPeakMemoryStats": lambda index: None,
        "_cuda_resetAccumulatedMemoryStats": lambda index: None,
        "_cuda_getCurrentStream": lambda index: (machine.stream_of.get(index, 0), machine.check(index), 1),
        "_cuda_getDefaultStream": lambda index: (0, machine.check(index), 1),
        "_cuda_setStream": machine.use_stream,
        "_accelerator_getAccelerator": lambda: torch.device("cuda"),
        "_accelerator_getDeviceIndex": lambda: machine.current,
        "_accelerator_setDeviceIndex": machine.set_device,
        "_accelerator_synchronizeDevice": lambda index: machine.calls.append(("synchronize", machine.check(index))),
        "_accelerator_emptyCache": lambda: machine.calls.append(("empty_cache",)),
        "_accelerator_getStream": lambda index: torch.cuda.current_stream(index),
        "_cuda_isCurrentStreamCapturing": lambda: False,
        "_accelerator_exchangeDevice": machine.select,
        "_accelerator_maybeExchangeDevice": machine.select,
    }
    above: dict[str, Any] = {  # what torch.cuda takes from the driver when it is imported or initialized
        "_cudart": SimpleNamespace(cudaMemGetInfo=machine.memory),
        "_initialized": False,
        "_queued_calls": list(torch.cuda._queued_calls),
        "_cached_device_count": None,
        "_exchange_device": machine.select,
        "_maybe_exchange_device": machine.select,
        "_get_device_properties": machine.properties,
        "_is_in_bad_fork": lambda: False,
        "_device_count_nvml": lambda: -1,
        "default_generators": machine.generators,
    }

    def record_stream(tensor: torch.Tensor, stream: Any) -> None:  # torch's parser would look for a real stream
        if tensor.device.type != "cuda":
            raise NotImplementedError("Could not run 'aten::record_stream' with arguments from the 'CPU' backend.")
        if not isinstance(stream, torch.cuda.Stream):
            raise TypeError(f"record_stream(): argument 's' must be Stream, not {type(stream).__name__}")
        machine.calls.append(("record_stream", tensor.device, stream))

    make_wrapper = _Tensor._make_wrapper_subclass

    def make_wrapper_subclass(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """Keeps wrappers on the CPU, as autograd's nodes look up the device's driver."""
        wanted = machine.device(kwargs.get("device") or CPU)
        kwargs["device"] = CPU if wanted.type == "cuda" else wanted
        return _mark(make_wrapper(cls, *args, **kwargs), wanted)

    streams, events = _stream_methods(machine)
    parse_to = _C._nn._parse_to

    def parse(*args: Any, **kwargs: Any) -> Any:  # a CPU build has no device that a number could stand for
        args = tuple(torch.device("cuda", each) if type(each) is int else each for each in args)
        if type(kwargs.get("device")) is int:
            kwargs["device"] = torch.device("cuda", kwargs["device"])
        return parse_to(*args, **kwargs)

    with ExitStack() as stack:
        for target, values in ((_C, driver), (torch.cuda, above)):
            for name, value in values.items():
                stack.enter_context(mock.patch.object(target, name, value, create=True))
        for kind, methods in ((_C._CudaStreamBase, streams), (_C._CudaEventBase, events)):
            for name, value in methods.items():
                stack.enter_context(mock.patch.object(kind, name, value, create=True))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "12.8"))
        stack.enter_context(mock.patch.object(torch.cuda.nccl, "version", lambda: (2, 27, 3)))
        stack.enter_context(mock.patch.object(_C._nn, "_parse_to", parse))
        stack.enter_context(mock.patch.object(_Tensor, "_make_wrapper_subclass", make_wrapper_subclass))
        stack.enter_context(mock.patch.object(_Tensor, "record_stream", record_stream, create=True))
        stack.enter_context(mock.patch.object(torch.UntypedStorage, "device", property(_storage_device), create=True))
        stack.enter_context(mock.patch.object(torch.storage, "_to", _storage_to))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_in_mode))
        for module in (torch, torch.cuda):  # states of generators are the CPU's, whatever draws from them
            read_state = module.get_rng_state
            marked = functools.partial(_marked_state, read_state)
            stack.enter_context(mock.patch.object(module, "get_rng_state", marked))
        for name, read in _PROPERTIES.items():
            stack.enter_context(mock.patch.object(_Tensor, name, read, create=True))
        stack.enter_context(mode)
        stack.enter_context(_Marks(machine))
        torch.cuda._check_bf16_tensor_supported.cache_clear()
        yield machine
        torch.cuda._check_bf16_tensor_supported.cache_clear()
