"""Runs a script on a host with TPUs.

``python -m accelerate.launch.engines.tpu_worker --function main [--processes N] script.py …``

torch_xla starts one process per device; each imports the script, which is not its main module, and calls the function.
Independent of the launcher, as the workers of a pod have no configuration of their own.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os.path
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple


class TpuWorker(NamedTuple):
    """The target of each process: torch_xla pickles it, and calls it with the process's index on this host.

    Attributes:
        script: The script's path, or a module's name.
        module: Whether `script` is a module's name.
        function: Name of the function to call.
        processes: Number of processes, or None for one on each device.
        arguments: ``sys.argv`` after the script.
    """

    script: str
    module: bool
    function: str
    processes: int | None
    arguments: tuple[str, ...]

    def __call__(self, index: int) -> None:
        """Runs as process `index`."""
        import torch_xla.runtime as xr

        count = xr.world_size()
        if self.processes not in (None, count):
            sys.exit(
                f"accelerate launch: num_processes is {self.processes}, and torch_xla starts one process for each of the "
                f"{count} TPU devices here, or one in all: leave --num_processes out, or give 1."
            )
        sys.argv = [self.script, *self.arguments]
        function = getattr(self.load(), self.function, None)
        if not callable(function):
            sys.exit(f"accelerate launch: {self.script} has no function {self.function} (--main_training_function).")
        # torch_xla calls functions with the process's index; ours take no argument.
        required = [each for each in inspect.signature(function).parameters.values() if each.default is each.empty]
        function(*([index] if len(required) == 1 and required[0].kind is required[0].POSITIONAL_OR_KEYWORD else []))

    def load(self) -> ModuleType:
        """Imports the script under its own name, so that its classes can be pickled."""
        if self.module:
            sys.path.insert(0, "")
            return importlib.import_module(self.script)
        sys.path.insert(0, os.path.dirname(os.path.abspath(self.script)))
        name = os.path.splitext(os.path.basename(self.script))[0]
        spec = importlib.util.spec_from_file_location(name, self.script)
        if spec is None or spec.loader is None:
            sys.exit(f"accelerate launch: {self.script} is not a Python file.")
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[name] = loaded
        spec.loader.exec_module(loaded)
        return loaded


def parse(words: Sequence[str]) -> TpuWorker:
    """Parses the command line; arguments of the script stay unchanged."""
    rest = list(words)
    options = {"--function": "main", "--processes": ""}
    while rest and rest[0] in options:
        options[rest[0]] = rest[1]
        del rest[:2]
    module = rest[:1] == ["-m"]
    script, *arguments = rest[1:] if module else rest
    count = options["--processes"]
    return TpuWorker(script, module, options["--function"], int(count) if count else None, tuple(arguments))


def main(words: Sequence[str]) -> None:
    """Starts one process per device, or a single one, and waits for them."""
    rank = parse(words)
    try:
        import torch_xla.distributed.xla_multiprocessing as xmp
    except ImportError as error:
        from .tpu import INSTALL

        sys.exit(f"accelerate launch: {INSTALL} ({error})")
    xmp.spawn(rank, nprocs=1 if rank.processes == 1 else None, start_method="spawn")


if __name__ == "__main__":
    # Under the module's own name, so that the processes can unpickle `TpuWorker`.
    from accelerate.launch.engines.tpu_worker import main as start

    start(sys.argv[1:])
