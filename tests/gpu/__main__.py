"""Runs the parts, each in a process of its own, and writes a JSON file of what they found: ``python -m tests.gpu``.

The whole takes at most eight minutes on one GPU. Exits with 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LONGEST = 470.0
"""Seconds for all parts together; those for which none are left are not run."""
_MARK = "figures: "


def main() -> int:
    """Runs all parts or those named; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="PART", help="run these parts")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON file (gpu.json)")
    parser.add_argument("--cpu", action="store_true", help="hide the GPU, and run small on the CPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    from .parts import PARTS

    if chosen.part is not None:
        print(_MARK + json.dumps(PARTS[chosen.part].run()), flush=True)
        return 0
    if unknown := set(chosen.only or ()) - PARTS.keys():
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    began, results = time.monotonic(), {}
    for name in chosen.only or PARTS:
        results[name] = _run(name, LONGEST - (time.monotonic() - began))
        print(f"{name:20} {results[name]['result']:10} {results[name].get('seconds', 0.0):5.1f} s", flush=True)
        for key in ("figures", "error"):
            if results[name].get(key):
                print(f"    {results[name][key]}", flush=True)
    chosen.out.write_text(json.dumps({"machine": _machine(), "parts": results}, indent=1))
    failed = [name for name, result in results.items() if result["result"] != "passed"]
    print(f"{len(results) - len(failed)} passed, {len(failed)} failed; the figures are in {chosen.out}")
    return bool(failed)


def _run(name: str, left: float) -> dict[str, Any]:
    from .parts import PARTS

    part = PARTS[name]
    if left < 10:
        return {"result": "no time"}
    variables = dict(os.environ, **dict(part.variables))
    if part.grouped:
        here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        variables.update(here, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    command = [sys.executable, "-m", "tests.gpu", "--part", name]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, env=variables, timeout=min(part.limit, left), capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired as error:
        said = error.stderr or b""
        text = said.decode(errors="replace") if isinstance(said, bytes) else said
        return {"result": "timed out", "seconds": time.monotonic() - start, "error": text[-3000:]}
    taken = time.monotonic() - start
    figures = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode != 0 or not figures:
        return {"result": "failed", "seconds": taken, "code": done.returncode, "error": done.stderr[-3000:]}
    return {"result": "passed", "seconds": taken, "figures": json.loads(figures[-1])}


def _machine() -> dict[str, Any]:
    import torch

    about: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about |= {"gpu": properties.name, "memory_gib": properties.total_memory >> 30, "cuda": torch.version.cuda}
        about["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return about


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
