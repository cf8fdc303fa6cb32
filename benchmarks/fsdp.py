"""What fully sharded training costs and saves: a step beside raw `fully_shard`, bytes beside DDP, memory while loading.

    python benchmarks/fsdp.py [--only step|bytes|loading-1|loading-2] [--repeats 40]

step:    two gloo ranks, both sides in turns in the same processes; the fastest block of each side, and their ratio.
bytes:   four ranks, what a rank holds in parameters, gradients and optimizer states, counted in tensors after a step, over
         what it holds with DistributedDataParallel.
loading: the peak of a rank's own memory (RssAnon) while `prepare` brings the weights of rank 0 to it, less what it holds
         after, over the size of the model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState

torch.set_num_threads(1)
ALLOWED = {"step": 1.03, "bytes": 0.27, "loading": 0.15}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def model(width: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(width) for _ in range(layers)], nn.Linear(width, 1))


def accelerator(version: int | None, **fields: Any) -> Accelerator:
    AcceleratorState._reset_state()
    wrap = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["Block"]}
    fields = {"fsdp_version": version, **wrap, **({"use_orig_params": True} if version == 1 else {}), **fields}
    return Accelerator(cpu=True, fsdp_plugin=None if version is None else FullyShardedDataParallelPlugin(**fields))


# A step --------------------------------------------------------------------------------------------------------------


def step(repeats: int) -> list[dict[str, Any]]:
    ours = accelerator(2)  # joins the ranks, for both
    inputs = torch.randn(16, 128)
    raw_model = model(128, 6)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in raw_model[:-1]:
        fully_shard(block, mesh=mesh)
    fully_shard(raw_model, mesh=mesh)
    raw_optimizer = torch.optim.AdamW(raw_model.parameters())
    mine = model(128, 6)
    our_model, our_optimizer = ours.prepare(mine, torch.optim.AdamW(mine.parameters()))
    rows = []
    for name, clips in (("a step", False), ("a step, clipped", True)):
        raw = raw_steps(raw_model, raw_optimizer, inputs, clips)
        rows.append(compare(name, raw, our_steps(ours, our_model, our_optimizer, inputs, clips), repeats))
    return rows


def raw_steps(net: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, clips: bool) -> Callable[[], int]:
    def run() -> int:
        for _ in range(5):
            net(inputs).mean().backward()
            if clips:
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return 5

    return run


def our_steps(
    ours: Accelerator, net: nn.Module, optimizer: Any, inputs: torch.Tensor, clips: bool
) -> Callable[[], int]:
    def run() -> int:
        for _ in range(5):
            with ours.accumulate(net):
                ours.backward(net(inputs).mean())
                if clips:
                    ours.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return 5

    return run


def compare(name: str, raw: Callable[[], int], ours: Callable[[], int], repeats: int) -> dict[str, Any]:
    """Milliseconds of each side; the slower of the two ranks counts, as both wait for it."""
    best = {"raw": float("inf"), "ours": float("inf")}
    sides = {"raw": raw, "ours": ours}
    for repeat in range(-3, repeats):
        for side in sorted(sides, reverse=bool(repeat % 2)):
            dist.barrier()
            start = time.perf_counter()
            count = sides[side]()
            spent = torch.tensor((time.perf_counter() - start) / count * 1e3)
            dist.all_reduce(spent, dist.ReduceOp.MAX)
            if repeat >= 0:
                best[side] = min(best[side], spent.item())
    return {"name": f"step: {name}, ms", **best, "ratio": best["ours"] / best["raw"], "allowed": ALLOWED["step"]}


# Bytes ---------------------------------------------------------------------------------------------------------------


def held(version: int | None) -> int:
    """The bytes of this rank's parameters, gradients and optimizer states after a step."""
    run = accelerator(version)
    net = model(256, 8)
    net, optimizer = run.prepare(net, torch.optim.AdamW(net.parameters()))
    run.backward(net(torch.randn(4, 256)).mean())
    optimizer.step()
    params = list(net.parameters())
    states = [value for state in optimizer.state.values() for value in state.values()]
    gradients = [param.grad for param in params if param.grad is not None]
    return bytes_of([*params, *gradients, *(value for value in states if isinstance(value, torch.Tensor))])


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Of their memory, each storage once."""
    locals_ = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in locals_}
    return sum(storages.values())


def count_bytes(_: int) -> list[dict[str, Any]]:
    whole = held(None)
    rows = []
    for version in (1, 2):
        mine = held(version)
        name = f"bytes: FSDP {version}, {dist.get_world_size()} ranks"
        rows.append({"name": name, "raw": whole, "ours": mine, "ratio": mine / whole, "allowed": ALLOWED["bytes"]})
    return rows


# Loading -------------------------------------------------------------------------------------------------------------


class Peak:
    """The peak of this process's anonymous memory while the context is open."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.before = self.peak = anonymous()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ends.wait(0.002):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *_: Any) -> None:
        self._ends.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous())


def anonymous() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def loading(version: int) -> list[dict[str, Any]]:
    run = accelerator(version, cpu_ram_efficient_loading=True)
    run.prepare(model(64, 2))  # what is loaded once does not count
    with torch.device("cpu" if run.is_main_process else "meta"):
        net = model(704, 16)
    size = sum(param.numel() * param.element_size() for param in net.parameters())
    with Peak() as peak:
        run.prepare(net)
    shard = size / dist.get_world_size()
    more = torch.tensor(-1.0 if run.is_main_process else (peak.peak - peak.before - shard) / size)
    dist.all_reduce(more, dist.ReduceOp.MAX)  # of the ranks other than 0
    name = f"loading: FSDP {version}, {dist.get_world_size()} ranks, {size / 2**20:.0f} MiB"
    return [
        {"name": name, "raw": size, "ours": size * more.item(), "ratio": more.item(), "allowed": ALLOWED["loading"]}
    ]


# Ranks ---------------------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[[int], list[dict[str, Any]]], int]] = {
    "step": (step, 2),
    "bytes": (count_bytes, 4),
    "loading-1": (lambda _: loading(1), 4),
    "loading-2": (lambda _: loading(2), 4),
}


def on_ranks(name: str, ranks: int, repeats: int) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        environment |= {key: str(value) for key, value in place.items()}
        command = [sys.executable, __file__, "--rank-of", name, "--repeats", str(repeats)]
        children.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"{name}: a rank failed")
    rows: list[dict[str, Any]] = json.loads(said[0].splitlines()[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="What fully sharded training costs and saves.")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--only", choices=PARTS, action="append", help="these parts (default: all)")
    parser.add_argument("--rank-of", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        rows = PARTS[args.rank_of][0](args.repeats)
        if os.environ["RANK"] == "0":
            print(json.dumps(rows))
        return
    for name in args.only or PARTS:
        for row in on_ranks(name, PARTS[name][1], args.repeats):
            numbers = f"{row['raw']:>12.4g} {row['ours']:>12.4g} {row['ratio']:>8.3f} {row['allowed']:>8}"
            print(f"{row['name']:44}{numbers}", flush=True)


if __name__ == "__main__":
    main()
