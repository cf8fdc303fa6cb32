"""What the wrappers cost: ours beside raw PyTorch, in the same process, in ratios.

    python benchmarks/overhead.py [--repeats 30] [--only NAME]

Both sides of a row are timed in turns, block by block; a row shows each side's fastest block (a busy machine only ever adds
time) and their ratio. Rows on two ranks run in two processes over gloo on the loopback interface. The last column is the
most that the project allows itself.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

torch.set_num_threads(1)


@dataclass
class Row:
    """One comparison: microseconds for one iteration of each side, and the ratio that is allowed."""

    name: str
    raw: float
    ours: float
    allowed: float

    @property
    def ratio(self) -> float:
        return self.ours / self.raw


def compare(name: str, raw: Callable[[], int], ours: Callable[[], int], allowed: float, repeats: int) -> Row:
    """Times two functions in turns; each returns how many iterations it did."""
    sides = {"raw": raw, "ours": ours}
    best = dict.fromkeys(sides, float("inf"))
    for repeat in range(-2, repeats):  # two rounds to warm up
        for side in sorted(sides, reverse=bool(repeat % 2)):  # whoever comes first alternates
            start = time.perf_counter()
            count = sides[side]()
            elapsed = (time.perf_counter() - start) / count * 1e6
            if repeat >= 0:
                best[side] = min(best[side], elapsed)
    return Row(name, best["raw"], best["ours"], allowed)


# One process -----------------------------------------------------------------------------------------------------------


def small_model(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


def batches(count: int = 64, width: int = 64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(16, width), torch.randn(16, 1)) for _ in range(count)]


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, data: list) -> Callable[[], int]:
    loss_function = nn.MSELoss()

    def run() -> int:
        for x, y in data:
            loss_function(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return len(data)

    return run


def prepared_step(accelerator: Accelerator, data: list) -> Callable[[], int]:
    loss_function, model = nn.MSELoss(), small_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))

    def run() -> int:
        for x, y in data:
            accelerator.backward(loss_function(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        return len(data)

    return run


def iteration(batches: Iterable) -> Callable[[], int]:
    def run() -> int:
        count = 0
        for _ in batches:
            count += 1
        return count

    return run


def prepared(repeats: int) -> Row:
    data, model = batches(), small_model()
    raw = plain_step(model, torch.optim.SGD(model.parameters(), lr=1e-3), data)
    return compare("prepared step", raw, prepared_step(Accelerator(cpu=True), data), 1.10, repeats)


def accumulate(repeats: int) -> Row:
    data, loss_function, steps = batches(), nn.MSELoss(), 4
    plain = small_model()
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3)

    def raw() -> int:
        for index, (x, y) in enumerate(data):
            (loss_function(plain(x), y) / steps).backward()
            if (index + 1) % steps == 0:
                plain_optimizer.step()
                plain_optimizer.zero_grad()
        return len(data)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    model = small_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))

    def ours() -> int:
        for x, y in data:
            with accelerator.accumulate(model):
                accelerator.backward(loss_function(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        return len(data)

    row = compare("accumulate over 4", raw, ours, 1.15, repeats)
    accelerator.gradient_accumulation_steps = 1
    return row


class Nested(Dataset):
    """Samples as a dictionary of tensors, two of them nested."""

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> dict:
        one = torch.ones(8)
        return {"ids": one, "mask": one, "extra": {"labels": one, "pair": (one, one)}}


def collated(samples: list) -> dict:
    return samples[0]


def loader(repeats: int) -> Row:
    plain = DataLoader(Nested(), batch_size=1, collate_fn=collated)
    ours = Accelerator(cpu=True).prepare(DataLoader(Nested(), batch_size=1, collate_fn=collated))
    return compare("loader, nested batch", iteration(plain), iteration(ours), 1.05, repeats)


def bf16_forward(repeats: int) -> Row:
    from accelerate.state import AcceleratorState

    x, count = torch.randn(16, 64), 200
    plain = small_model()
    AcceleratorState._reset_state(True)
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(small_model())
    AcceleratorState._reset_state(True)

    def raw() -> int:
        context = torch.autocast("cpu", dtype=torch.bfloat16)
        for _ in range(count):
            with context:
                out = plain(x)
            out.float()
        return count

    def ours() -> int:
        for _ in range(count):
            model(x)
        return count

    with torch.no_grad():
        return compare("bf16 forward", raw, ours, 1.05, repeats)


# Two ranks -------------------------------------------------------------------------------------------------------------


def ddp_step(repeats: int) -> Row:
    accelerator, data = Accelerator(cpu=True), batches(32)
    wrapped = DistributedDataParallel(small_model())
    raw = plain_step(wrapped, torch.optim.SGD(wrapped.parameters(), lr=1e-3), data)
    return compare("DDP step, 2 ranks", raw, prepared_step(accelerator, data), 1.03, repeats)


def plain_gather(tensors: tuple[torch.Tensor, ...], count: int) -> Callable[[], int]:
    def run() -> int:
        for _ in range(count):
            for tensor in tensors:
                parts = [torch.empty_like(tensor) for _ in range(2)]
                dist.all_gather(parts, tensor)
                torch.cat(parts)
        return count

    return run


def gather(repeats: int) -> Row:
    accelerator, count, x = Accelerator(cpu=True), 100, torch.randn(16, 4)

    def ours() -> int:
        for _ in range(count):
            accelerator.gather(x)
        return count

    return compare("gather, 2 ranks", plain_gather((x,), count), ours, 1.15, repeats)


def gather_for_metrics(repeats: int) -> Row:
    accelerator, count = Accelerator(cpu=True), 100
    pair = torch.randn(16, 4), torch.randint(0, 4, (16,))

    def ours() -> int:
        for _ in range(count):
            accelerator.gather_for_metrics(pair)
        return count

    return compare("gather_for_metrics of 2", plain_gather(pair, count), ours, 1.15, repeats)


READY = {"ids": torch.zeros(16, 240, dtype=torch.int64), "labels": torch.zeros(16, 16, dtype=torch.int64)}  # 32 KB


class Stream(IterableDataset):
    """100 batches of 16; what a sample is does not matter, since a batch is ready."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(1600))


def ready(samples: list) -> dict:
    return READY


def dispatch(repeats: int) -> Row:
    """A dispatched batch beside one broadcast of its bytes, plus reading it on the main process."""
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True, split_batches=True)
    )
    plain = DataLoader(Stream(), batch_size=16, collate_fn=ready)
    ours_loader = accelerator.prepare(DataLoader(Stream(), batch_size=16, collate_fn=ready))
    size = sum(tensor.nbytes for tensor in READY.values())

    def raw() -> int:
        count = 0
        buffer = torch.empty(size, dtype=torch.uint8)
        source = plain if accelerator.is_main_process else range(100)
        for _ in source:
            dist.broadcast(buffer, 0)
            count += 1
        return count

    return compare("dispatched batch of 32 KB", raw, iteration(ours_loader), 3.0, repeats)


def dispatch_against_sharding(repeats: int) -> Row:
    """Shown for the record: what dispatching costs where sharding would do."""
    rows = []
    for dispatched in (False, True):
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatched))
        rows.append(accelerator.prepare(DataLoader(Nested(), batch_size=4, collate_fn=collated)))

    return compare("dispatch beside sharding", iteration(rows[0]), iteration(rows[1]), float("inf"), repeats)


ALONE = {f.__name__: f for f in (prepared, accumulate, loader, bf16_forward)}
TWO_RANKS = {f.__name__: f for f in (ddp_step, gather, gather_for_metrics, dispatch, dispatch_against_sharding)}


def on_two_ranks(names: list[str], repeats: int) -> list[Row]:
    """Runs those rows in two processes; rank 0 reports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        environment |= {name: str(value) for name, value in place.items()}
        command = [sys.executable, __file__, "--rank-of-two", ",".join(names), "--repeats", str(repeats)]
        children.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit("a rank of the two-rank rows failed; its error is above")
    return [Row(**row) for row in json.loads(outputs[0].splitlines()[-1])]


def table(rows: list[Row]) -> str:
    lines = [f"{'':28}{'raw µs':>10}{'ours µs':>10}{'ratio':>8}{'allowed':>9}"]
    for row in rows:
        allowed = "-" if row.allowed == float("inf") else f"{row.allowed:.2f}"
        mark = "" if row.ratio <= row.allowed else "  over"
        lines.append(f"{row.name:28}{row.raw:10.1f}{row.ours:10.1f}{row.ratio:8.3f}{allowed:>9}{mark}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="blocks a side; the fastest counts")
    parser.add_argument("--only", choices=[*ALONE, *TWO_RANKS], action="append", help="these rows (default: all)")
    parser.add_argument("--rank-of-two", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of_two:
        rows = [TWO_RANKS[name](args.repeats) for name in args.rank_of_two.split(",")]
        if os.environ["RANK"] == "0":
            print(json.dumps([asdict(row) for row in rows]))
        return
    names = args.only or [*ALONE, *TWO_RANKS]
    rows = [ALONE[name](args.repeats) for name in names if name in ALONE]
    if two := [name for name in names if name in TWO_RANKS]:
        rows += on_two_ranks(two, args.repeats)
    print(table(rows))


if __name__ == "__main__":
    main()
