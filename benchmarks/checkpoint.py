"""What a checkpoint costs beside `torch.save` and `torch.load` of the same objects. Prints one table.

    python benchmarks/checkpoint.py --parameters 100 --repeats 3

Both sides end with the data on disk (fsync). Times are the best of the repeats, taken in turn, so that a busy machine
disturbs both. Loads are measured with the files in the page cache ("warm") and, where the cache can be dropped, without.
"""

from __future__ import annotations

import argparse
import gc
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


def evict(folder: Path) -> None:
    """Drops a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
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
    parser.add_argument("--load", type=Path, help="load this checkpoint once and print the memory it took")
    chosen = parser.parse_args()
    if chosen.load:
        load_once(chosen.load, chosen.parameters)
        return
    scratch = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    try:
        measure(scratch, chosen.parameters, chosen.repeats)
    finally:
        shutil.rmtree(scratch)


def measure(scratch: Path, millions: int, repeats: int) -> None:
    """Runs all rows and prints the table."""
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*build(millions))
    raw, ours = scratch / "raw", scratch / "ours"
    raw.mkdir()
    state = sum(p.numel() * p.element_size() for p in model.parameters()) * 3

    def save_raw() -> None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, raw / "all.pt")
        sync(raw / "all.pt")

    def load_raw() -> None:
        found = torch.load(raw / "all.pt", weights_only=True)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])

    rows: dict[str, list[float]] = {}

    def take(name: str, action: Callable[[], Any]) -> None:
        rows.setdefault(name, []).append(timed(action))

    for _ in range(repeats):
        take("torch.save", save_raw)
        take("save_state", lambda: accelerator.save_state(ours))
        take("blocked by save_state(asynchronous=True)", lambda: accelerator.save_state(ours, asynchronous=True))
        accelerator.wait_for_checkpoint()
        take("torch.load, warm", load_raw)
        take("load_state, warm", lambda: accelerator.load_state(ours))
        evict(scratch)
        take("torch.load, cold", load_raw)
        evict(scratch)
        take("load_state, cold", lambda: accelerator.load_state(ours))
    best = {name: min(times) for name, times in rows.items()}
    beside = {
        "save_state": "torch.save",
        "blocked by save_state(asynchronous=True)": "save_state",
        "load_state, warm": "torch.load, warm",
        "load_state, cold": "torch.load, cold",
    }
    print(f"{state / 1e9:.2f} GB of state (parameters and Adam's), best of {repeats}")
    for name, seconds in best.items():
        other = beside.get(name)
        ratio = f"{seconds / best[other]:5.2f} of {other}" if other else ""
        print(f"{name:42} {seconds:7.2f} s  {ratio}")
    # A process of its own: memory that this one has given back and kept would hide what a load takes.
    command = [sys.executable, "-W", "ignore", __file__, "--parameters", str(millions), "--load", str(ours)]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="")


def load_once(folder: Path, millions: int) -> None:
    """Loads a checkpoint into a fresh run and prints the memory it took."""
    accelerator = Accelerator(cpu=True)
    before = PeakAnonymous.now()
    model, _ = accelerator.prepare(*build(millions, stepped=False))
    with PeakAnonymous() as memory:
        accelerator.load_state(folder)
    state = sum(p.numel() * p.element_size() for p in model.parameters()) * 3
    print(
        f"anonymous memory at the peak of a load, weights included: {(memory.peak - before) / state:.2f} times the state"
    )


if __name__ == "__main__":
    main()
