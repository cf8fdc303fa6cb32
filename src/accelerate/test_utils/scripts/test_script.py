"""Checks the setup it is launched in, on one process or many: prints a line for each check, raises if one fails.

``accelerate test`` launches it. Results are compared with those of a single process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, TensorDataset

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from accelerate.utils import (
    broadcast,
    broadcast_object_list,
    gather_object,
    pad_across_processes,
    reduce,
    set_seed,
    synchronize_rng_states,
)

# Not divisible by common numbers of processes or batch sizes: tests the ends of epochs.
SAMPLES = 37


def check_world(accelerator: Accelerator) -> str:
    """Checks that ranks are unique and collectives reach all of them."""
    ranks = accelerator.gather(torch.tensor([accelerator.process_index], device=accelerator.device)).tolist()
    expect(ranks == list(range(accelerator.num_processes)), f"ranks are {ranks}, one for each process expected")
    mains = accelerator.gather(torch.tensor([int(accelerator.is_main_process)], device=accelerator.device)).sum().item()
    expect(mains == 1, f"is_main_process is true on {mains} processes, expected one")
    return f"{accelerator.num_processes} process(es) with the expected ranks"


def check_order(accelerator: Accelerator) -> str:
    """Checks main_process_first, on_main_process and on_last_process."""
    with accelerator.main_process_first():
        moment = time.time()
        time.sleep(0.05 if accelerator.is_main_process else 0)
    moments = gather_object([moment])
    expect(moments[0] <= min(moments), "the main process did not go first")

    here = []
    accelerator.on_main_process(lambda: here.append("main"))()
    accelerator.on_last_process(lambda: here.append("last"))()
    ran = gather_object(here)
    expect(ran == ["main", "last"], f"functions for the main and the last process ran as {ran}")
    return "the main process goes first, functions run on the process they are for"


def check_split(accelerator: Accelerator) -> str:
    """Checks split_between_processes, with and without padding."""
    items = [f"item {number}" for number in range(accelerator.num_processes * 2 + 1)]
    with accelerator.split_between_processes(items) as mine:
        together = gather_object(list(mine))
    expect(together == items, f"{len(items)} items split between processes came back as {together}")
    with accelerator.split_between_processes(items, apply_padding=True) as mine:
        lengths = gather_object([len(mine)])
    expect(len(set(lengths)) == 1, f"padded parts have lengths {lengths}")
    return "split_between_processes assigns every item once"


def check_collectives(accelerator: Accelerator) -> str:
    """Checks gather, reduce, broadcast, pad_across_processes, and objects."""
    rank, size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    mine = torch.full((2, 3), float(rank), device=device)
    gathered = accelerator.gather({"x": mine})["x"]
    expect(gathered[:, 0].tolist() == [float(r) for r in range(size) for _ in range(2)], "gather mixed up the ranks")
    total = reduce(torch.tensor([rank + 1.0], device=device), "sum").item()
    expect(total == size * (size + 1) / 2, f"the sum of 1 to {size} came out as {total}")
    mean = reduce(torch.tensor([float(rank)], device=device), "mean").item()
    expect(mean == (size - 1) / 2, f"the mean of the ranks came out as {mean}")
    sent = broadcast(mine.clone(), from_process=size - 1)
    expect(bool((sent == size - 1).all()), "broadcast did not bring the last rank's tensor")
    padded = pad_across_processes(torch.ones(rank + 1, device=device))
    expect(padded.shape == (size,), f"padded to {tuple(padded.shape)}, expected ({size},)")
    objects = broadcast_object_list([f"from {rank}"], from_process=0)
    expect(objects == ["from 0"], f"broadcast of objects brought {objects}")
    return "gather, reduce, broadcast, pad_across_processes, and objects"


def check_random_states(accelerator: Accelerator) -> str:
    """Checks that device-specific seeds differ, and that ranks agree after synchronization."""
    set_seed(42, device_specific=True)
    drawn = gather_object([torch.rand(1).item()])
    expect(len(set(drawn)) == accelerator.num_processes, "device-specific seeds gave equal numbers")
    synchronize_rng_states(["torch"])
    drawn = gather_object([torch.rand(1).item()])
    expect(len(set(drawn)) == 1, f"after synchronization ranks drew {drawn}")
    return "random number generators can be synchronized"


def check_data(accelerator: Accelerator) -> str:
    """Checks that each loader configuration reads every sample, and gather_for_metrics returns each once, in order."""
    ways = 0
    for split_batches in (False, True):
        for dispatch_batches in (False, True):
            for shuffle in (False, True):
                seen = _epoch(accelerator, split_batches, dispatch_batches, shuffle)
                where = f"{split_batches=}, {dispatch_batches=}, {shuffle=}"
                expect(sorted(seen) == list(range(SAMPLES)), f"{where}: samples came back as {seen}")
                expect(shuffle or seen == list(range(SAMPLES)), f"{where}: samples came back in the order {seen}")
                ways += 1
    return f"data is read as by one process, in {ways} configurations; gather_for_metrics drops repeated samples"


def _epoch(accelerator: Accelerator, split_batches: bool, dispatch_batches: bool, shuffle: bool) -> list[int]:
    """Returns the samples of one epoch, gathered from all ranks."""
    accelerator.dataloader_config = DataLoaderConfiguration(
        split_batches=split_batches, dispatch_batches=dispatch_batches, use_seedable_sampler=True
    )
    set_seed(7)
    batch_size = 2 * accelerator.num_processes  # divisible, for split_batches
    data = TensorDataset(torch.arange(SAMPLES))
    loader = accelerator.prepare(DataLoader(data, batch_size=batch_size, shuffle=shuffle))
    seen: list[int] = []
    for (batch,) in loader:
        seen += accelerator.gather_for_metrics(batch).tolist()
    return seen


def check_training(accelerator: Accelerator) -> str:
    """Checks that a short training ends with the weights of a single process on the same samples."""
    exact = accelerator.mixed_precision == "no" and accelerator.device.type != "mps"
    dtype = torch.float64 if exact else torch.float32
    inputs, targets, weights = _problem(dtype)
    size = accelerator.num_processes
    alone = _train_alone(inputs, targets, weights, batch=8 * size)
    accelerator.dataloader_config = DataLoaderConfiguration()
    model = _model(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []
    with _accumulating(accelerator, steps=1):
        for _ in range(3):
            for x, y in loader:
                loss = torch.nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    expect(losses[-1] < losses[0], f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g}")
    if not exact:
        return f"training in {accelerator.mixed_precision}: the loss goes down"
    trained = accelerator.unwrap_model(model).weight.detach().cpu()
    difference = (trained - alone).abs().max().item()
    expect(difference < 1e-10, f"weights differ by {difference:.3g} from those of one process")
    return "training ends with the weights of one process (float64, to 1e-10)"


def check_accumulation(accelerator: Accelerator) -> str:
    """Checks that gradients accumulated over micro-batches equal those of the whole batch."""
    exact = accelerator.mixed_precision == "no" and accelerator.device.type != "mps"
    inputs, targets, weights = _problem(torch.float64 if exact else torch.float32)
    size = accelerator.num_processes
    alone = _train_alone(inputs, targets, weights, batch=16 * size, epochs=1)
    model = _model(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    updates = 0
    with _accumulating(accelerator, steps=2):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(torch.nn.functional.mse_loss(model(x), y))
                updates += accelerator.sync_gradients
                optimizer.step()
                optimizer.zero_grad()
    expect(updates == len(loader) // 2, f"{len(loader)} micro-batches gave {updates} updates, half as many expected")
    if exact:
        difference = (accelerator.unwrap_model(model).weight.detach().cpu() - alone).abs().max().item()
        expect(difference < 1e-10, f"weights differ by {difference:.3g} from those of whole batches")
    return "accumulated gradients are those of the whole batch"


def check_trigger(accelerator: Accelerator) -> str:
    """Checks that one rank's trigger is visible on all."""
    expect(not accelerator.check_trigger(), "check_trigger is true though no process called set_trigger")
    if accelerator.is_last_process:
        accelerator.set_trigger()
    expect(accelerator.check_trigger(), "the last process set a trigger, and this one did not see it")
    return "a trigger set on one process is seen by all"


@contextmanager
def _accumulating(accelerator: Accelerator, steps: int) -> Iterator[None]:
    """Overrides the number of accumulation steps inside the block."""
    before, accelerator.gradient_accumulation_steps = accelerator.gradient_accumulation_steps, steps
    yield
    accelerator.gradient_accumulation_steps = before


def _problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns inputs [n, 3], targets [n, 1] and initial weights [1, 3], with n proportional to the number of processes."""
    generator = torch.Generator().manual_seed(3)
    size = AcceleratorState().num_processes
    inputs = torch.randn(64 * size, 3, generator=generator, dtype=dtype)
    targets = inputs @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=dtype)
    return inputs, targets, torch.randn(1, 3, generator=generator, dtype=dtype)


def _model(weights: torch.Tensor) -> torch.nn.Linear:
    model = torch.nn.Linear(3, 1, bias=False, dtype=weights.dtype)
    with torch.no_grad():
        model.weight.copy_(weights)
    return model


def _train_alone(
    inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, batch: int, epochs: int = 3
) -> torch.Tensor:
    """Trains on the same samples with plain PyTorch in one process on the CPU, and returns the weights."""
    model = _model(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(epochs):
        for x, y in DataLoader(TensorDataset(inputs, targets), batch_size=batch):
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.weight.detach()


def expect(condition: bool, problem: str) -> None:
    """Raises AssertionError with `problem` unless `condition` holds."""
    if not condition:
        raise AssertionError(f"rank {AcceleratorState().process_index}: {problem}.")


CHECKS: tuple[Callable[[Accelerator], str], ...] = (
    check_world,
    check_order,
    check_split,
    check_collectives,
    check_random_states,
    check_data,
    check_training,
    check_accumulation,
    check_trigger,
)


def main() -> None:
    """Runs every check."""
    accelerator = Accelerator()
    accelerator.print(f"Checking this setup.\n{AcceleratorState()!r}")
    for check in CHECKS:
        result = check(accelerator)
        accelerator.free_memory()
        accelerator.wait_for_everyone()
        accelerator.print(f"ok: {result}")
    accelerator.end_training()
    accelerator.print(f"Everything works: {accelerator.num_processes} process(es) on {accelerator.device.type}.")


if __name__ == "__main__":
    main()
