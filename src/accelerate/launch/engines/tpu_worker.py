"""Runs a script on a host with TPUs.

``python -m accelerate.launch.engines.tpu_worker --function main [--processes N] script.py …``

torch_xla starts one process for each device; each imports the script, which is not its main program, and calls the
function. Knows nothing of the launcher: a pod's workers have no configuration of their own.
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
    """The body of a process: torch_xla pickles it, and calls it with the process's number on this host.

    Attributes:
        script: The script's path, or a module's name.
        module: Whether it is a module's name.
        function: Name of the function to call.
        processes: How many processes were asked for, or None for one on each device.
        arguments: What ``sys.argv`` holds after the script.
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
        # torch_xla's own convention is a function of the process's number; ours takes nothing.
        wants = [each for each in inspect.signature(function).parameters.values() if each.default is each.empty]
        function(*([index] if len(wants) == 1 and wants[0].kind is wants[0].POSITIONAL_OR_KEYWORD else []))

    def load(self) -> ModuleType:
        """Imports the script, under a name by which its classes can be pickled."""
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
    """The rank that the command line describes; the script's own words stay as they are."""
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
    """Starts a process for each device, or one, and waits for them."""
    rank = parse(words)
    try:
        import torch_xla.distributed.xla_multiprocessing as xmp
    except ImportError as error:
        from .tpu import INSTALL

        sys.exit(f"accelerate launch: {INSTALL} ({error})")
    xmp.spawn(rank, nprocs=1 if rank.processes == 1 else None, start_method="spawn")


if __name__ == "__main__":
    # Under the module's own name, so that the processes can unpickle what is sent to them.
    from accelerate.launch.engines.tpu_worker import main as start

    start(sys.argv[1:])
