"""What a checkpoint costs beside `torch.save` and `torch.load` of the same objects. Prints one table.

    python benchmarks/checkpoint.py --parameters 100 --repeats 3

Both sides end with the data on disk (fsync). Times are the best of the repeats, taken in turn, so that a busy machine
disturbs both. Each load has a new process, as a resumed run has, with the files in the page cache ("warm") or out of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accelerate import Accelerator


def build(millions: int, stepped: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of that many million parameters, with Adam and (if it has stepped) its state."""
    width = 2048
    layers = max(1, round(millions * 1_000_000 / (width * width)))
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if stepped:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def sync(path: Path) -> None:
    """Brings a file to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def files_of(path: Path) -> list[Path]:
    """A file, or the files of a folder."""
    return [path] if path.is_file() else [below for below in path.rglob("*") if below.is_file()]


def warm(path: Path) -> None:
    """Brings files into the page cache."""
    for file in files_of(path):
        with open(file, "rb", buffering=0) as opened:
            while opened.read(2**20):
                pass


def evict(path: Path) -> None:
    """Drops files from the page cache."""
    for file in files_of(path):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(action: Callable[[], Any]) -> float:
    """Seconds that an action takes."""
    gc.collect()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


class PeakAnonymous:
    """Largest growth of this process's anonymous memory in a block, in bytes."""

    def __enter__(self) -> PeakAnonymous:
        self.before = self.peak = self.now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, self.now())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @staticmethod
    def now() -> int:
        """Anonymous memory of this process."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        return 0


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100, help="millions of parameters")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--load", type=Path, help="only load this file or checkpoint; print seconds and memory")
    chosen = parser.parse_args()
    if chosen.load:
        load_once(chosen.load, chosen.parameters)
        return
    load_average = os.getloadavg()[0]
    scratch = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    try:
        measure(scratch, chosen.parameters, chosen.repeats)
    finally:
        shutil.rmtree(scratch)
    print(f"load average before and after, on {os.cpu_count()} cores: {load_average:.1f}, {os.getloadavg()[0]:.1f}")


def measure(scratch: Path, millions: int, repeats: int) -> None:
    """Runs all rows and prints the table."""
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*build(millions))
    raw, ours = scratch / "raw", scratch / "ours"
    raw.mkdir()

    def save_raw() -> None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, raw / "all.pt")
        sync(raw / "all.pt")

    rows: dict[str, list[float]] = {}
    memory: list[float] = []

    def take(name: str, action: Callable[[], Any]) -> None:
        rows.setdefault(name, []).append(timed(action))

    def load(name: str, path: Path, prepare: Callable[[Path], None]) -> None:
        prepare(path)
        command = [sys.executable, "-W", "ignore", __file__, "--parameters", str(millions), "--load", str(path)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.setdefault(name, []).append(found["seconds"])
        if path == ours:
            memory.append(found["memory"])

    for repeat in range(repeats + 1):
        # The first save in the background gets memory, which later ones use again.
        blocked = "blocked by save_state(asynchronous=True)" if repeat else "blocked by the first of these"
        take(blocked, lambda: accelerator.save_state(ours, asynchronous=True))
        accelerator.wait_for_checkpoint()
        if not repeat:
            continue
        take("torch.save", save_raw)
        take("save_state", lambda: accelerator.save_state(ours))
        for state, prepare in (("warm", warm), ("cold", evict)):
            load(f"torch.load, {state}", raw / "all.pt", prepare)
            load(f"load_state, {state}", ours, prepare)
    best = {name: min(times) for name, times in rows.items()}
    beside = {
        "save_state": "torch.save",
        "blocked by save_state(asynchronous=True)": "save_state",
        "load_state, warm": "torch.load, warm",
        "load_state, cold": "torch.load, cold",
    }
    print(f"{state_size(model) / 1e9:.2f} GB of state (parameters and Adam's), best of {repeats}")
    for name, seconds in best.items():
        other = beside.get(name)
        ratio = f"{seconds / best[other]:5.2f} of {other}" if other else ""
        print(f"{name:42} {seconds:7.2f} s  {ratio}")
    print(f"anonymous memory at the peak of a load, weights included: {max(memory):.2f} times the state")


def state_size(model: nn.Module) -> int:
    """Bytes of parameters and Adam's two moments."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) * 3


def load_once(path: Path, millions: int) -> None:
    """Loads into a fresh run, a checkpoint with `load_state` and a file with `torch.load`; prints seconds and memory."""
    accelerator = Accelerator(cpu=True)
    before = PeakAnonymous.now()
    model, optimizer = build(millions, stepped=False)

    def load_raw() -> None:
        found = torch.load(path, weights_only=True)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])

    if path.is_dir():
        model, optimizer = accelerator.prepare(model, optimizer)
    with PeakAnonymous() as memory:
        seconds = timed(load_raw if path.is_file() else lambda: accelerator.load_state(path))
    print(json.dumps({"seconds": seconds, "memory": (memory.peak - before) / state_size(model)}))


if __name__ == "__main__":
    main()
