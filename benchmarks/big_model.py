"""Models larger than memory: ours beside plain PyTorch on the same files, in one run.

    python benchmarks/big_model.py [--blocks 36] [--width 1024] [--rows 64] [--repeats 5] [--device cpu|cuda] [--folder DIR]

A transformer of 36 blocks of width 1024 (450 million parameters, 1.8 GB) is saved in shards of 200 MB. Times are each side's
fastest, taken in turns (a busy machine only ever adds time); memory is the peak of `RssAnon` in a process of its own. Cold
means that the files are dropped from the page cache before every forward. With `--device cuda`, the forward with weights in
pinned memory stands beside the time that the bus needs for them. The last column is the most that the project allows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import accelerate


class Block(nn.Module):
    """One block: attention over the rows, and a feed-forward network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.T / q.shape[-1] ** 0.5, -1) @ v)
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def make(blocks: int, width: int) -> nn.Module:
    return nn.Sequential(*[Block(width) for _ in range(blocks)]).eval()


def save(folder: Path, blocks: int, width: int) -> list[Path]:
    """Writes the shards, with an index, as other programs do."""
    torch.manual_seed(0)
    files: list[Path] = []
    places: dict[str, str] = {}
    waiting: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        files.append(folder / f"model-{len(files) + 1:05}.safetensors")
        save_file(waiting, files[-1], metadata={"format": "pt"})
        places.update(dict.fromkeys(waiting, files[-1].name))
        waiting.clear()

    for number in range(blocks):
        for name, value in Block(width).state_dict().items():
            total += value.nbytes
            waiting[f"{number}.{name}"] = value
        if sum(value.nbytes for value in waiting.values()) > 150e6:
            flush()
    if waiting:
        flush()

    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": places}), encoding="utf-8"
    )
    return files


def empty(blocks: int, width: int) -> nn.Module:
    with accelerate.init_empty_weights():
        return make(blocks, width)


def dispatched(folder: Path, blocks: int, width: int, device: str, **options: object) -> nn.Module:
    where = {str(number): "disk" for number in range(blocks)}
    model = empty(blocks, width)
    if device != "cpu":
        where["0"] = device
    return accelerate.load_checkpoint_and_dispatch(model, folder, device_map=where, **options)


def drop_cache(files: list[Path]) -> None:
    """Has the system forget what the files hold."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_all(files: list[Path]) -> None:
    """Pure reading: every byte once, into one buffer."""
    buffer = bytearray(4 << 20)
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


# Timing ----------------------------------------------------------------------------------------------------------------


class Times:
    """The fastest of each of several things, done in turns."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    def add(self, name: str, action: Callable[[], object]) -> None:
        begin, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        action()
        synchronize()
        now = resource.getrusage(resource.RUSAGE_SELF)
        cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        self.wall[name] = min(self.wall.get(name, 1e9), time.perf_counter() - begin)
        self.cpu[name] = min(self.cpu.get(name, 1e9), cpu)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def row(name: str, seconds: float, cpu: float, beside: str, ratio: float, allowed: float | None) -> None:
    bound = f"{allowed:8.2f}" if allowed is not None else "        "
    print(f"{name:44} {seconds:9.3f} {cpu:9.3f}   {ratio:8.3f}  {bound}   {beside}", flush=True)


# Parts -----------------------------------------------------------------------------------------------------------------


def on_this_machine(options: argparse.Namespace, folder: Path, files: list[Path]) -> None:
    size = (options.blocks, options.width)
    x = torch.randn(options.rows, options.width)
    times = Times()
    for _ in range(options.repeats):
        times.add("map", lambda: dispatched(folder, *size, "cpu"))
    row("map all blocks to disk", times.wall["map"], times.cpu["map"], "seconds", times.wall["map"], 0.3)

    resident = make(*size)
    state = {name: value for file in files for name, value in load_file(file).items()}
    resident.load_state_dict({name: value.clone() for name, value in state.items()})
    del state
    sides = {
        "resident": resident,
        "disk": dispatched(folder, *size, "cpu"),
        "disk, prefetch off": dispatched(folder, *size, "cpu", prefetch=False),
        "RAM": accelerate.cpu_offload(make(*size), torch.device("cpu"), state_dict=resident.state_dict()),
    }
    expected = resident(x)
    for repeat in range(-3, options.repeats):  # the first times bring the page cache into shape
        for name, model in sides.items():
            if repeat < 0:
                assert torch.equal(model(x), expected), name
            else:
                times.add(name, lambda model=model: model(x))
    base = times.wall["resident"]
    for name in sides:
        allowed = {"disk": 1.1}.get(name)
        row(f"forward, {name}", times.wall[name], times.cpu[name], "resident", times.wall[name] / base, allowed)
    for _ in range(options.repeats):
        # As after a start of the machine: the first forward of a model.
        fresh, fresh_off = (dispatched(folder, *size, "cpu", prefetch=wanted) for wanted in (True, False))
        for name, action in {
            "reading": lambda: read_all(files),
            "cold": lambda model=fresh: model(x),
            "cold, off": lambda model=fresh_off: model(x),
        }.items():
            drop_cache(files)
            times.add(name, action)
    bound = max(times.wall["reading"], base)
    row("pure reading, cold", times.wall["reading"], times.cpu["reading"], "itself", 1.0, None)
    row("forward, disk, cold", times.wall["cold"], times.cpu["cold"], "max(reading, computing)",
        times.wall["cold"] / bound, 1.15)  # fmt: skip
    row("forward, disk, cold, prefetch off", times.wall["cold, off"], times.cpu["cold, off"],
        "max(reading, computing)", times.wall["cold, off"] / bound, None)  # fmt: skip


def map_times(options: argparse.Namespace) -> None:
    """`infer_auto_device_map` over two devices and the disk, for a model and for one of ten times the blocks."""
    times = Times()
    for blocks in (400, 4000):
        model = empty(blocks, 64)
        whole = sum(value.nbytes for value in model.state_dict().values())
        limits: dict[int | str, int | str] = {0: whole // 3, "cpu": whole // 3, "disk": whole}
        for _ in range(2 * options.repeats):
            times.add(
                str(blocks),
                lambda model=model, limits=limits: accelerate.infer_auto_device_map(
                    model, limits, no_split_module_classes=["Block"]
                ),
            )
    few, many = times.wall["400"], times.wall["4000"]
    row("a map of 400 blocks", few, times.cpu["400"], "seconds", few, 0.03)
    row("a map of 4,000 blocks", many, times.cpu["4000"], "400 blocks", many / few, 12)


def load_times(options: argparse.Namespace, folder: Path, files: list[Path]) -> None:
    times = Times()

    def theirs() -> None:
        kept = [value.clone() for file in files for value in load_file(file).values()]
        del kept

    def ours(model: nn.Module) -> None:
        accelerate.load_checkpoint_and_dispatch(model, folder, device_map={"": "cpu"})
        kept = [parameter.clone() for parameter in model.parameters()]
        del kept

    for _ in range(options.repeats):
        times.add("load_file", theirs)
        skeleton = empty(options.blocks, options.width)  # building a model is no part of loading it
        times.add("ours", lambda skeleton=skeleton: ours(skeleton))
    base = times.wall["load_file"]
    row("load_file, every value touched", base, times.cpu["load_file"], "itself", 1.0, None)
    row(
        "load into RAM, every value touched",
        times.wall["ours"],
        times.cpu["ours"],
        "load_file",
        times.wall["ours"] / base,
        1.1,
    )


def peak_memory(options: argparse.Namespace, folder: Path) -> None:
    """Peak of RssAnon of a process that maps the model and runs it three times, over what it had before."""
    command = [sys.executable, __file__, "--memory", str(folder), "--blocks", str(options.blocks)]
    command += ["--width", str(options.width), "--rows", str(options.rows), "--device", options.device]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    before, peak, mapped, total = (float(number) for number in out)
    row(
        f"peak RssAnon [MB] (was {before:.0f} before)", peak, 0, f"model, {total:.0f} MB", (peak - before) / total, 0.25
    )
    row("peak RssFile [MB]", mapped, 0, "model", mapped / total, None)


def watch_memory(options: argparse.Namespace) -> None:
    def now() -> tuple[float, float]:
        lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["RssAnon"].split()[0]) / 1e3, int(lines["RssFile"].split()[0]) / 1e3

    x = torch.randn(options.rows, options.width)
    make(1, options.width)(x)  # what torch takes for itself
    before, peaks, done = now()[0], [0.0, 0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peaks[:] = [max(pair) for pair in zip(peaks, now(), strict=True)]

    thread = threading.Thread(target=watch)
    thread.start()
    model = dispatched(Path(options.memory), options.blocks, options.width, options.device)
    for _ in range(3):
        model(x)
    done.set()
    thread.join()
    total = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    print(before, *peaks, total)


def on_a_gpu(options: argparse.Namespace, folder: Path) -> None:
    size, device = (options.blocks, options.width), torch.device(options.device)
    x = torch.randn(options.rows, options.width, device=device)
    resident = make(*size)
    accelerate.load_checkpoint_in_model(resident, folder)
    weights = {name: value.pin_memory() for name, value in resident.state_dict().items()}
    pageable = {name: value.clone() for name, value in resident.state_dict().items()}
    resident.to(device)
    landing = {name: torch.empty_like(value, device=device) for name, value in weights.items()}

    def bus() -> None:
        for name, value in weights.items():
            landing[name].copy_(value, non_blocking=True)

    sides: dict[str, Callable[[], object]] = {
        "the bus alone, pinned": bus,
        "resident": lambda: resident(x),
    }
    models = {
        "RAM, pinned": accelerate.cpu_offload(empty(*size), device, state_dict=weights),
        "RAM, pinned, prefetch off": accelerate.cpu_offload(empty(*size), device, state_dict=weights, prefetch=False),
        "RAM, pageable": accelerate.cpu_offload(empty(*size), device, state_dict=pageable),
        "disk, warm": dispatched(folder, *size, options.device),
    }
    expected, times = resident(x), Times()
    for name, model in models.items():
        assert torch.equal(model(x), expected), name
        sides[name] = lambda model=model: model(x)
    for repeat in range(-2, options.repeats):
        for name, action in sides.items():
            if repeat < 0:
                action()
            else:
                times.add(name, action)
    base = times.wall["the bus alone, pinned"]
    for name in sides:
        allowed = {"RAM, pinned": 1 / 0.7}.get(name)
        row(f"forward, {name}", times.wall[name], times.cpu[name], "the bus", times.wall[name] / base, allowed)
    for name, model in models.items():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        model(x)
        taken = (torch.cuda.max_memory_allocated() - held) / 1e6
        print(f"{name}: {taken:.0f} MB of the device for the forward")


def hook_overhead() -> None:
    """What a hook adds to a module's call."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    plain, x, count = nn.Identity(), torch.ones(1), 5000
    aligned = add_hook_to_module(nn.Identity(), AlignDevicesHook("cpu"))
    linear = nn.Linear(1, 1)
    fetching = accelerate.cpu_offload(nn.Sequential(nn.Linear(1, 1)), torch.device("cpu"))[0]
    times = Times()
    for _ in range(20):
        for name, module in {"Identity": plain, "aligned": aligned, "Linear": linear, "RAM": fetching}.items():
            times.add(name, lambda module=module: [module(x) for _ in range(count // 10)])
    for name, base in (("aligned", "Identity"), ("RAM", "Linear")):
        extra = (times.wall[name] - times.wall[base]) / (count // 10) * 1e6
        print(f"a hook adds {extra:.1f} µs to a call ({name})")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=36)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", help="where the shards are written; default: a temporary folder")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        watch_memory(options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        files = save(folder, options.blocks, options.width)
        print(f"{'':44} {'seconds':>9} {'CPU':>9}   {'ratio':>8}  {'allowed':>8}   beside")
        if options.device == "cpu":
            on_this_machine(options, folder, files)
            map_times(options)
            load_times(options, folder, files)
            peak_memory(options, folder)
            hook_overhead()
        else:
            on_a_gpu(options, folder)


if __name__ == "__main__":
    main()
