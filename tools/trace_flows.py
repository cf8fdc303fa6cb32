"""Traces the files and functions that one public call passes through.

    PYTHONPATH=src python tools/trace_flows.py [--files] [FLOW ...]

Counts files of the package whose functions run, distinct functions, and the greatest depth of nested frames of the package,
by `sys.setprofile` and `threading.setprofile`. Each flow runs once unmeasured first, so that imports at first use and
caches are left out. On two ranks, rank 0 is traced.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import tempfile
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import accelerate

PACKAGE = Path(accelerate.__file__).parent
LEFT_OUT = {"<module>", "<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>", "<lambda>"}
"""Frames that are no functions of their own."""


class Trace:
    """Calls of the package's functions while `recording` is active."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.depth = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Counts calls in this thread and in those that start meanwhile."""
        depth: dict[int, int] = {}
        files: dict[types.CodeType, str | None] = {}

        def profile(frame: types.FrameType, event: str, _: Any) -> None:
            if event not in ("call", "return"):
                return
            code = frame.f_code
            if code not in files:
                path = Path(code.co_filename)
                files[code] = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None
            file = files[code]
            if file is None or code.co_name in LEFT_OUT:
                return
            thread = threading.get_ident()
            depth[thread] = depth.get(thread, 0) + (1 if event == "call" else -1)
            if event == "call":
                self.calls[file, getattr(code, "co_qualname", code.co_name)] += 1
                self.depth = max(self.depth, depth[thread])

        threading.setprofile(profile)
        sys.setprofile(profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]

    @property
    def files(self) -> Counter[str]:
        """Returns file -> calls of its functions."""
        found: Counter[str] = Counter()
        for (file, _), calls in self.calls.items():
            found[file] += calls
        return found


class Run:
    """An Accelerator with what a training script prepares."""

    def __init__(self, **arguments: Any) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, step_scheduler_with_optimizer=False, **arguments)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters())
        data = TensorDataset(torch.randn(32, 8), torch.randn(32, 1))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        self.objects = (model, optimizer, DataLoader(data, batch_size=4, shuffle=True), scheduler)

    def prepare(self) -> None:
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(*self.objects)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        with self.accelerator.accumulate(self.model):
            loss = nn.functional.mse_loss(self.model(x), y)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()


def traced(action: Callable[[], Any]) -> Trace:
    """Runs an action once unmeasured, then once measured."""
    action()
    trace = Trace()
    with trace.recording():
        action()
    return trace


def training_flows(
    kind: str, wanted: Callable[[str], bool], arguments: Callable[[], dict[str, Any]]
) -> dict[str, Trace]:
    """Traces prepare, a step, and checkpoints of one way of distributing."""
    found: dict[str, Trace] = {}

    def prepared() -> Trace:
        Run(**arguments()).prepare()
        trace, run = Trace(), Run(**arguments())
        with trace.recording():
            run.prepare()
        return trace

    if wanted(f"prepare, {kind}"):
        found[f"prepare, {kind}"] = prepared()
    run = Run(**arguments())
    run.prepare()
    batches = iter(run.loader)
    batch = next(batches)
    if wanted(f"step, {kind}"):
        found[f"step, {kind}"] = traced(lambda: run.step(*batch))
    else:
        run.step(*batch)
    if wanted(f"batch, {kind}"):
        found[f"batch, {kind}"] = traced(lambda: next(batches))
    shared = [tempfile.mkdtemp(prefix="trace-")]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    try:
        for name, asynchronous in (("save_state", False), ("asynchronous save_state", True)):
            if wanted(f"{name}, {kind}"):
                found[f"{name}, {kind}"] = traced(partial(_save, run.accelerator, folder / "checkpoint", asynchronous))
        if wanted(f"load_state, {kind}"):
            run.accelerator.save_state(str(folder / "checkpoint"))
            found[f"load_state, {kind}"] = traced(lambda: run.accelerator.load_state(str(folder / "checkpoint")))
    finally:
        run.accelerator.wait_for_everyone()
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _save(accelerator: accelerate.Accelerator, folder: Path, asynchronous: bool) -> None:
    accelerator.save_state(str(folder), asynchronous=asynchronous)
    if asynchronous:
        accelerator.wait_for_checkpoint()


def launch_flow(processes: int) -> Trace:
    """Traces `accelerate launch` of an empty script, up to the end of the launch or the exec of the script."""
    from accelerate.commands.accelerate_cli import main

    def execute(*_: Any) -> None:
        raise _ExecutedError

    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "empty.py"
        script.write_text("")
        words = ["launch", "--cpu", "--num_processes", str(processes), str(script)]

        def start() -> None:
            with suppress(SystemExit, _ExecutedError):
                main(words)

        with mock.patch("os.execve", execute):
            return traced(start)


class _ExecutedError(BaseException):
    """Raised instead of replacing this process by a program."""


def _rank(rank: int, port: int, wanted: list[str], results: Any) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}})
    chosen = _chooser(wanted)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    found = training_flows("DDP", chosen, dict)

    def sharded() -> dict[str, Any]:
        accelerate.state.AcceleratorState._reset_state()
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", auto_wrap_policy="size_based_wrap", min_num_params=1
        )
        return {"fsdp_plugin": plugin}

    found |= training_flows("FSDP2 sharded", chosen, sharded)
    if rank == 0:
        results.put({name: (trace.calls, trace.depth) for name, trace in found.items()})
    dist.barrier()
    dist.destroy_process_group()


def _chooser(wanted: list[str]) -> Callable[[str], bool]:
    return lambda name: not wanted or any(each in name for each in wanted)


def two_ranks(wanted: list[str]) -> dict[str, Trace]:
    """Traces DDP and FSDP 2 on two gloo ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    processes = mp.spawn(_rank, (port, wanted, results), nprocs=2, join=False)
    found: dict[str, Trace] = {}
    for name, (calls, depth) in results.get().items():
        found[name] = trace = Trace()
        trace.calls, trace.depth = calls, depth
    processes.join()
    return found


def main() -> int:
    """Prints one line for each flow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "flows", nargs="*", help="parts of names of flows, such as save_state or DDP; all of them by default"
    )
    parser.add_argument("--files", action="store_true", help="list each flow's files with the calls of their functions")
    options = parser.parse_args()
    wanted = _chooser(options.flows)
    found: dict[str, Trace] = {}
    for processes in (1, 2):
        name = f"launch, {processes} process{'es' if processes > 1 else ''}"
        if wanted(name):
            found[name] = launch_flow(processes)
    found |= training_flows("single process", wanted, dict)
    found |= two_ranks(options.flows)
    print(f"{'flow':42}{'files':>6}{'functions':>11}{'depth':>7}")
    for name, trace in found.items():
        print(f"{name:42}{len(trace.files):6}{len(trace.calls):11}{trace.depth:7}")
        if options.files:
            for file, calls in sorted(trace.files.items()):
                print(f"    {calls:6} {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
