"""What a checkpoint costs beside `torch.save` and `torch.load` of the same objects. Prints one table.

    python benchmarks/checkpoint.py --parameters 100 --repeats 3

Both sides end with the data on disk (fsync), and both write to a name that is new, or replace what they wrote before. Rows
are taken in turn, so that a busy machine disturbs all; each waits until the disk has dealt with the one before, and what a
save leaves to the system to tidy up is not counted, on either side. Each load has a new process, as a resumed run has, with
the files in the page cache ("warm") or out of it. So has the first asynchronous save, which gets memory for the copy.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
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


BESIDE = {
    "save_state, new name": "torch.save, new name",
    "save_state, replacing": "torch.save, replacing",
    "blocked by the first asynchronous save": "save_state, replacing",
    "blocked by a later one": "save_state, replacing",
    "load_state, warm": "torch.load, warm",
    "load_state, cold": "torch.load, cold",
}
"""What each row is compared with."""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100, help="millions of parameters")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--load", type=Path, help="only load this file or checkpoint; print seconds and memory")
    parser.add_argument("--first", type=Path, help="only save to this folder in the background; print seconds blocked")
    chosen = parser.parse_args()
    if chosen.load:
        load_once(chosen.load, chosen.parameters)
    elif chosen.first:
        save_once(chosen.first, chosen.parameters)
    else:
        scratch = Path(tempfile.mkdtemp(prefix="checkpoint-"))
        load_average = os.getloadavg()[0]
        try:
            Benchmark(scratch, chosen.parameters).run(chosen.repeats)
        finally:
            shutil.rmtree(scratch)
        print(f"load average before and after, on {os.cpu_count()} cores: {load_average:.1f}, {os.getloadavg()[0]:.1f}")


class Benchmark:
    """All rows.

    Args:
        scratch: A folder for what is written.
        millions: Parameters of the model.
    """

    def __init__(self, scratch: Path, millions: int) -> None:
        self.scratch = scratch
        self.millions = millions
        self.accelerator = Accelerator(cpu=True)
        self.model, self.optimizer = self.accelerator.prepare(*build(millions))
        self.raw, self.ours = scratch / "all.pt", scratch / "ours"
        self.rows: dict[str, list[float]] = {}
        self.memory: list[float] = []

    def run(self, repeats: int) -> None:
        """Takes the rows and prints them."""
        self.save_raw(self.raw)
        self.accelerator.save_state(self.ours, asynchronous=True)
        self.accelerator.wait_for_checkpoint()
        for _ in range(repeats):
            self.save()
            self.load()
        print(f"{state_size(self.model) / 1e9:.2f} GB of state (parameters and Adam's); best and median of {repeats}")
        for name, times in self.rows.items():
            print(f"{name:40} {min(times):7.2f} {statistics.median(times):7.2f} s  {self.compared(name)}")
        print(f"anonymous memory at the peak of a load, weights included: {max(self.memory):.2f} times the state")

    def compared(self, name: str) -> str:
        """A row beside its other one, by the best times and by the medians."""
        if name not in BESIDE:
            return ""
        own, other = self.rows[name], self.rows[BESIDE[name]]
        medians = statistics.median(own) / statistics.median(other)
        return f"{min(own) / min(other):5.2f} {medians:5.2f} of {BESIDE[name]}"

    def take(self, name: str, action: Callable[[], Any]) -> None:
        """Measures a row once."""
        os.sync()
        time.sleep(0.5)
        self.rows.setdefault(name, []).append(timed(action))

    def save_raw(self, path: Path) -> None:
        """What one would do without us."""
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, path)
        sync(path)

    def save(self) -> None:
        """The rows of saving."""
        new_file, new_folder = self.scratch / "new.pt", self.scratch / "new"
        self.take("torch.save, new name", lambda: self.save_raw(new_file))
        new_file.unlink()
        self.take("save_state, new name", lambda: self.accelerator.save_state(new_folder))
        shutil.rmtree(new_folder)
        self.take("torch.save, replacing", lambda: self.save_raw(self.raw))
        self.take("save_state, replacing", lambda: self.accelerator.save_state(self.ours))
        first = self.alone("--first", self.ours)
        self.rows.setdefault("blocked by the first asynchronous save", []).append(first["seconds"])
        self.take("blocked by a later one", lambda: self.accelerator.save_state(self.ours, asynchronous=True))
        self.accelerator.wait_for_checkpoint()

    def load(self) -> None:
        """The rows of loading."""
        for state, prepare in (("warm", warm), ("cold", evict)):
            for name, path in (("torch.load", self.raw), ("load_state", self.ours)):
                prepare(path)
                found = self.alone("--load", path)
                self.rows.setdefault(f"{name}, {state}", []).append(found["seconds"])
                if path == self.ours:
                    self.memory.append(found["memory"])

    def alone(self, option: str, path: Path) -> dict[str, float]:
        """Measures in a new process."""
        command = [sys.executable, "-W", "ignore", __file__, "--parameters", str(self.millions), option, str(path)]
        found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return found


def state_size(model: nn.Module) -> int:
    """Bytes of parameters and Adam's two moments."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) * 3


def save_once(path: Path, millions: int) -> None:
    """Saves in the background, for the first time in this process; prints the seconds that it blocks."""
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(*build(millions))
    print(json.dumps({"seconds": timed(lambda: accelerator.save_state(path, asynchronous=True))}))
    accelerator.wait_for_checkpoint()


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
