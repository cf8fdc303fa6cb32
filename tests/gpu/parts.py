"""The parts of ``make gpu``. Each runs in a process of its own, asserts what must hold and returns the figures it measured.

Sizes depend on the device: on a GPU they are large enough for kernels to outlast copies, on the CPU a part takes seconds.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerate import (
    Accelerator,
    FullyShardedDataParallelPlugin,
    PartialState,
    cpu_offload,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
)
from accelerate.data_loader.batches.batch_broadcast import _ALIGNMENT, BatchBroadcaster
from accelerate.data_loader.dispatch import select_host_collectives
from accelerate.runtime import world
from accelerate.state import AcceleratorState
from accelerate.utils import (
    BnbQuantizationConfig,
    DataLoaderConfiguration,
    find_executable_batch_size,
    get_max_memory,
    load_and_quantize_model,
    set_seed,
    synchronize_rng_states,
)
from accelerate.utils.memory import clear_device_cache

Figures = dict[str, Any]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
SPELLINGS: tuple[Any, ...] = ("cuda", "cuda:0", 0, torch.device("cuda"), DEVICE) if ON_GPU else ("cpu", DEVICE)
"""The execution device, in every spelling that the documentation allows."""


# Building blocks --------------------------------------------------------------------------------------------------------


def mlp(width: int = 256, depth: int = 4) -> nn.Sequential:
    """Builds an MLP with the same weights in every process."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth)))


def loader(width: int = 256, samples: int = 64, **options: Any) -> DataLoader[Any]:
    """Builds a shuffled loader over the same samples in every process, in batches of 8."""
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(samples, width)), batch_size=8, shuffle=True, **options)


def train(accelerator: Accelerator, model: nn.Module, optimizer: Any, data: Any, steps: int = 6) -> list[float]:
    """Takes `steps` clipped steps and returns their losses."""
    losses = []
    for (inputs,) in itertools.islice(data, steps):
        loss = model(inputs).float().square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def heavy_stack() -> tuple[nn.Sequential, torch.Tensor]:
    """Builds layers, and an input for which their kernels run longer than their weights take over the bus."""
    torch.manual_seed(0)
    width, depth, rows = (8192, 12, 16384) if ON_GPU else (64, 6, 8)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    model = nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(depth)))
    return model, torch.randn(rows, width, dtype=dtype)


def size_of(model: nn.Module) -> int:
    """Returns the bytes of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if ON_GPU:
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Returns the shortest time that `run` took, the device's work included."""
    best = float("inf")
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@contextmanager
def fresh_accelerator(**options: Any) -> Iterator[Accelerator]:
    """Yields an `Accelerator` whose state no later one inherits."""
    yield Accelerator(**options)
    AcceleratorState._reset_state(True)


# One process, no group --------------------------------------------------------------------------------------------------


def lone() -> Figures:
    """Trains in one process: device, seeds, caches, a pinned loader with a worker, a profile."""
    accelerator = Accelerator()
    model, optimizer, data = mlp(), None, loader(pin_memory=ON_GPU, num_workers=1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    PartialState().set_device()
    set_seed(1)
    clear_device_cache()
    accelerator.wait_for_everyone()
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    losses = train(accelerator, model, optimizer, data)
    device = next(model.parameters()).device
    assert accelerator.device == device == DEVICE, (accelerator.device, device)
    with accelerator.profile() as profile:
        train(accelerator, model, optimizer, data, steps=2)
    if ON_GPU:
        assert any("cuda" in str(event.device_type).lower() for event in profile.events()), "no kernel was profiled"
    return {"losses": losses, "max_memory": {str(place): size for place, size in get_max_memory().items()}}


def precision() -> Figures:
    """Trains in bf16 and fp16, skips a step that overflows, and takes a step after a load in fp16."""
    figures: Figures = {}
    for dtype in ("bf16", "fp16"):
        with fresh_accelerator(mixed_precision=dtype) as accelerator, tempfile.TemporaryDirectory() as folder:
            model = mlp()
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            model, optimizer, data = accelerator.prepare(model, optimizer, loader())
            figures[dtype] = train(accelerator, model, optimizer, data)
            if dtype == "fp16":
                figures["scale"] = accelerator.scaler.get_scale()
                accelerator.backward(model(torch.randn(8, 256, device=accelerator.device)).float().sum() * 1e30)
                optimizer.step()
                assert optimizer.step_was_skipped, "a step with infinite gradients was taken"
                optimizer.zero_grad()
                accelerator.save_state(folder)
                train(accelerator, model, optimizer, data, steps=1)
                accelerator.load_state(folder)
                train(accelerator, model, optimizer, data, steps=1)
    return figures


def compiled() -> Figures:
    """Trains a compiled model."""
    accelerator = Accelerator(dynamo_backend="inductor" if ON_GPU else "eager")
    model = mlp()
    model, optimizer, data = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader())
    return {
        "losses": train(accelerator, model, optimizer, data),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def out_of_memory() -> Figures:
    """Halves the batch size until it fits, after the device's own out-of-memory errors."""
    tried: list[int] = []
    total = torch.cuda.get_device_properties(0).total_memory if ON_GPU else 0

    @find_executable_batch_size(starting_batch_size=64)
    def run(batch_size: int) -> None:
        tried.append(batch_size)
        if ON_GPU:
            torch.empty(total * batch_size // 12, dtype=torch.uint8, device=DEVICE)
        elif batch_size > 8:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1.00 GiB")

    run()
    assert tried == [64, 32, 16, 8], tried
    return {"tried": tried, "reserved_mib": torch.cuda.memory_reserved() >> 20 if ON_GPU else 0}


def checkpoint() -> Figures:
    """Saves, saves in the background while training goes on, loads, and repeats the same losses bit for bit."""
    accelerator = Accelerator(mixed_precision="bf16")
    width = 4096 if ON_GPU else 256
    model = mlp(width, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, data = accelerator.prepare(model, optimizer, loader(width))
    train(accelerator, model, optimizer, data, steps=3)
    figures: Figures = {"model_mib": size_of(model) >> 20, "stalls": []}
    with tempfile.TemporaryDirectory() as folder:
        figures["synchronous"] = seconds(lambda: accelerator.save_state(f"{folder}/whole"), repeats=1)
        for _ in range(3):  # the first allocates the staging buffer, later ones use it again
            stall = seconds(lambda: accelerator.save_state(f"{folder}/background", asynchronous=True), repeats=1)
            figures["stalls"].append(stall)
            expected = train(accelerator, model, optimizer, data, steps=3)
            accelerator.wait_for_checkpoint()
            accelerator.load_state(f"{folder}/background")
            resumed = train(accelerator, model, optimizer, data, steps=3)
            assert resumed == expected, (resumed, expected)
    figures["losses"] = resumed
    return figures


def offload_exact() -> Figures:
    """Runs offloaded forwards whose kernels outlast the copies: a block that is reused too early changes the result."""
    wrong = {}
    for spelling in SPELLINGS:
        model, inputs = heavy_stack()
        inputs = inputs.to(DEVICE)
        with torch.no_grad():
            expected = model.to(DEVICE)(inputs)
            cpu_offload(model.to("cpu"), execution_device=spelling)
            wrong[repr(spelling)] = sum(not torch.equal(model(inputs), expected) for _ in range(15 if ON_GPU else 3))
        del model
    assert not any(wrong.values()), wrong
    return {"wrong_forwards": wrong}


def offload_speed() -> Figures:
    """Times offloaded forwards from memory and from disk, ahead and in turn, beside the bus and the layers alone."""
    model, inputs = heavy_stack()
    size, inputs = size_of(model), inputs[:256].to(DEVICE)
    figures: Figures = {"model_mib": size >> 20}
    if ON_GPU:
        source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(source, device=DEVICE)
        bandwidth = source.numel() / seconds(lambda: target.copy_(source, non_blocking=True))
        figures |= {"bus_gib_per_second": bandwidth / 2**30, "bus_seconds": size / bandwidth}
        del source, target
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for place, ahead in itertools.product(("cpu", "disk"), (True, False)):
            model, _ = heavy_stack()
            if place == "cpu":
                cpu_offload(model, DEVICE, prefetch=ahead)
            else:
                disk_offload(model, f"{folder}/{ahead}", DEVICE, prefetch=ahead)
            model(inputs)
            taken = seconds(lambda model=model: model(inputs))
            figures[f"{place}, {'ahead' if ahead else 'in turn'}"] = taken
            if ON_GPU:
                figures[f"{place}, {'ahead' if ahead else 'in turn'}, of the bus"] = figures["bus_seconds"] / taken
    return figures


def device_map() -> Figures:
    """Spreads a model over half of what it needs and the CPU, and compares outputs; the map's limit must hold."""
    model, inputs = heavy_stack()
    inputs, size = inputs[:64], size_of(model)
    limits: dict[int | str, int | str] = {"cpu": size * 2}
    if ON_GPU:
        limits[0] = size // 2
    with torch.no_grad():
        expected = model.to(DEVICE)(inputs.to(DEVICE)).cpu()
        model.to("cpu")
        clear_device_cache()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        devices = infer_auto_device_map(model, limits)
        dispatch_model(model, devices)
        assert torch.equal(model(inputs).cpu(), expected)
    figures = {"map": {name: str(place) for name, place in devices.items()}}
    if ON_GPU:
        peak = torch.cuda.max_memory_allocated()
        figures |= {"limit_mib": size // 2 >> 20, "peak_mib": peak >> 20}
        assert peak <= size // 2 + 64 * 2**20, figures
    return figures


def quantized() -> Figures:
    """Runs layers in 8 and in 4 bits."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return {"skipped": "bitsandbytes is not installed"}
    errors: Figures = {}
    four_bits = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bf16"}
    for dtype, options in ((torch.float16, {"load_in_8bit": True}), (torch.bfloat16, four_bits)):
        inputs = torch.randn(4, 512, device=DEVICE, dtype=dtype)
        expected = mlp(512).to(DEVICE, dtype)(inputs).float()
        layers = load_and_quantize_model(mlp(512), BnbQuantizationConfig(torch_dtype=dtype, **options))
        error = (layers(inputs).float() - expected).norm() / expected.norm()
        errors["8 bits" if "load_in_8bit" in options else "4 bits"] = error.item()
    assert all(error < 0.5 for error in errors.values()), errors
    return {"relative_error": errors}


# A group of one ---------------------------------------------------------------------------------------------------------


def group() -> Figures:
    """Runs every collective on every dtype and shape, objects included, then DistributedDataParallel."""
    accelerator = Accelerator()
    set_seed(3)
    dtypes = (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    )
    everyone = world.current().collectives  # the documented functions would skip a group of one
    for dtype, shape in itertools.product(dtypes, ((), (3,), (2, 3), (0, 2))):
        value = torch.ones(shape, device=accelerator.device).to(dtype)
        assert torch.equal(everyone.all_gather(value), value.reshape(shape or (1,))), (dtype, shape)
        assert torch.equal(everyone.broadcast(value.clone()), value), (dtype, shape)
        if dtype not in (torch.bool, torch.int16):  # NCCL sums neither
            assert torch.equal(everyone.all_reduce(value.clone()), value), (dtype, shape)
    assert everyone.all_gather_object({"a": 1}) == [{"a": 1}]
    assert everyone.broadcast_object_list([1]) == [1]
    everyone.barrier()
    synchronize_rng_states(["torch", *(["cuda"] if ON_GPU else [])])
    model = mlp()
    model, optimizer, data = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader())
    losses = train(accelerator, model, optimizer, data)
    figures = {"backend": accelerator.state.backend, "model": type(model).__name__, "losses": losses}
    accelerator.end_training()
    return figures


def dispatched() -> Figures:
    """Reads batches of changing shapes on rank 0 and sends them, without waiting for the device in between."""
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=True))

    def collate(rows: list[int]) -> dict[str, Any]:
        return {"x": torch.tensor(rows)[:, None].repeat(1, 3), "y": torch.ones(len(rows), dtype=torch.bool), "s": ["a"]}

    data = accelerator.prepare(DataLoader(range(19), batch_size=4, collate_fn=collate))  # type: ignore[arg-type]
    batches = list(data)
    seen = [int(row) for batch in batches for row in batch["x"][:, 0]]
    assert seen[:19] == list(range(19)), seen
    assert all(batch["x"].device == accelerator.device for batch in batches)
    everyone = world.current().collectives
    broadcaster = BatchBroadcaster(
        everyone, staged=True, host_collectives=select_host_collectives(everyone)
    )  # a group of one has nobody to send to: by hand
    for rows in (4, 4, 9, 2):
        batch = collate(list(range(rows)))
        broadcaster.send(broadcaster.pack([batch], rows, None, False))
        sent = broadcaster._buffer[_ALIGNMENT : _ALIGNMENT + broadcaster._tensor_bytes].cpu()
        assert torch.equal(sent, broadcaster._host_buffer[_ALIGNMENT : _ALIGNMENT + broadcaster._tensor_bytes]), rows
    accelerator.end_training()
    return {"batches": len(batches)}


def fsdp_1() -> Figures:
    """Trains fully sharded with version 1 in bf16, saves and resumes."""
    return _fully_sharded(1, "bf16")


def fsdp_1_offload_fp16() -> Figures:
    """Does so with the parameters on the CPU, and a gradient scaler."""
    return _fully_sharded(1, "fp16", cpu_offload=ON_GPU)  # torch cannot offload from the CPU


def fsdp_2() -> Figures:
    """Trains fully sharded with version 2 in bf16, saves and resumes."""
    return _fully_sharded(2, "bf16")


def fsdp_2_offload_fp16() -> Figures:
    """Does so with the parameters on the CPU, and a gradient scaler."""
    return _fully_sharded(2, "fp16", cpu_offload=True)


def _fully_sharded(version: int, dtype: str, **options: Any) -> Figures:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, auto_wrap_policy="size_based_wrap", min_num_params=1000, **options
    )
    accelerator = Accelerator(mixed_precision=dtype, fsdp_plugin=plugin)
    model = mlp()
    fused = not options.get("cpu_offload")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    model, optimizer, data = accelerator.prepare(model, optimizer, loader())
    losses = train(accelerator, model, optimizer, data)
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        expected = train(accelerator, model, optimizer, data, steps=2)
        accelerator.load_state(folder)
        assert train(accelerator, model, optimizer, data, steps=2) == expected
    names = list(accelerator.get_state_dict(model))
    assert len(names) == 8, names
    figures = {"backend": accelerator.state.backend, "losses": losses}
    accelerator.end_training()
    return figures


def ends_at_once() -> Figures:
    """Exits with the group still there: the process must end, and not wait for a watchdog."""
    Accelerator()
    return {}


# The list ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        run: Runs it and returns its figures.
        limit: Seconds after which it counts as hung.
        grouped: Run it in a process group of one rank.
        variables: Environment variables it runs with.
    """

    run: Callable[[], Figures]
    limit: int = 45
    grouped: bool = False
    variables: tuple[tuple[str, str], ...] = ()


_FSDP = (("ACCELERATE_USE_FSDP", "true"),)
_PARTS = (
    Part(lone),
    Part(precision),
    Part(compiled, limit=90),
    Part(out_of_memory),
    Part(checkpoint, limit=60),
    Part(offload_exact, limit=90),
    Part(offload_speed, limit=60),
    Part(device_map),
    Part(quantized),
    Part(group, grouped=True),
    Part(dispatched, grouped=True),
    Part(fsdp_1, grouped=True, variables=_FSDP),
    Part(fsdp_1_offload_fp16, grouped=True, variables=_FSDP),
    Part(fsdp_2, grouped=True, variables=_FSDP),
    Part(fsdp_2_offload_fp16, grouped=True, variables=_FSDP),
    Part(ends_at_once, grouped=True),
)
PARTS = {part.run.__name__: part for part in _PARTS}
