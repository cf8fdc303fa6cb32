"""Launches functions on several processes from a notebook or a test. Ranks are forked, so functions need not be importable.

Ranks use a store on 127.0.0.1. An error in one ends the others, and is raised here with the rank's own traceback.
"""

from __future__ import annotations

import inspect
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from .launch.compat import PrepareForLaunch
from .launch.local.local_rendezvous import LoopbackRendezvous
from .launch.local.reaper import SETTLE_SECONDS, lost_peer
from .launch.local.shim import set_parent_death_signal
from .runtime import devices, world
from .runtime.cluster.cluster_env import LOOPBACK
from .settings import env
from .settings.enums import PrecisionType
from .state import AcceleratorState, GradientState, PartialState

# How long ranks may take to end once another has failed.
_GRACE_SECONDS = 5


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    mixed_precision: str = "no",
    use_port: str | int = "29500",
    master_addr: str = "127.0.0.1",
    node_rank: int = 0,
    num_nodes: int = 1,
    rdzv_backend: str = "static",
    rdzv_endpoint: str = "",
    rdzv_conf: Mapping[str, Any] | None = None,
    rdzv_id: str = "none",
    max_restarts: int = 0,
    monitor_interval: float = 0.1,
    log_line_prefix_template: str | None = None,
) -> None:
    """Runs a training function on several processes of this machine, or of several machines.

    Processes are forked from this one, so that `function` may be defined in a notebook's cell. This process must not have
    used an accelerator before: create `Accelerator`, and import modules that use the device, inside `function`. A forked
    process computes with one thread unless OMP_NUM_THREADS is set: the thread pool of this process does not survive a
    fork.

    Args:
        function: The function that each process calls.
        args: Its arguments.
        num_processes: Number of processes on this machine; None: one per accelerator.
        mixed_precision: ``no``, ``fp16``, ``bf16`` or ``fp8``: the default of `Accelerator`.
        use_port: Port of the rendezvous; on a single machine, one that is taken, or 0, selects any free port.
        master_addr: Address of the first machine.
        node_rank: Rank of this machine, from 0.
        num_nodes: Number of machines, each with a notebook that calls this function.
        rdzv_backend: Rendezvous backend of several machines: ``static`` or ``c10d``.
        rdzv_endpoint: Rendezvous endpoint; empty: `master_addr` and `use_port`.
        rdzv_conf: Further options of the rendezvous.
        rdzv_id: Id of the run, the same on all machines.
        max_restarts: Number of restarts after failures.
        monitor_interval: Seconds between checks of the processes, with several machines.
        log_line_prefix_template: Prefix of log lines of torch's agent, with several machines.

    Raises:
        TypeError: if `function` cannot be called with `args`.
        ValueError: for an invalid number of processes or machines, precision or port; if this process has an
            `Accelerator`.
        RuntimeError: if this process has used its accelerator already.
        torch.multiprocessing.ProcessRaisedException: if `function` raised, with the traceback of the first to fail.
        torch.multiprocessing.ProcessExitedException: if a process was killed or exited with another code than 0.

    Example:
        ```python
        notebook_launcher(training_loop, args=("fp16", 42, 64), num_processes=2)
        ```
    """
    if mixed_precision not in PrecisionType.list():
        raise ValueError(
            f"mixed_precision={mixed_precision!r}: expected one of {', '.join(map(str, PrecisionType.list()))}."
        )
    _check_arguments("notebook_launcher", function, args)
    if num_nodes < 1 or not 0 <= node_rank < num_nodes:
        raise ValueError(
            f"node_rank={node_rank}, num_nodes={num_nodes}: expected a rank from 0 to num_nodes - 1, or the ranks of this "
            "machine would wait for others until the timeout."
        )
    if max_restarts < 0:
        raise ValueError(f"max_restarts={max_restarts}: expected 0 or more.")
    port = _parse_port(use_port)
    kind, count = _device_and_count(num_processes)
    precision = {"ACCELERATE_MIXED_PRECISION": mixed_precision}
    if count == 1 and num_nodes == 1:
        where = {"cpu": "CPU", "mps": "MPS"}.get(kind.name, "one " + ("GPU" if kind.name == "cuda" else kind.name))
        print(f"Launching training on {where}.")
        with env.patch_environment(**(precision if mixed_precision != "no" else {})):
            function(*args)
        return
    _require_no_state("notebook_launcher")
    _require_unused_device(kind)
    name = {"cuda": "GPU"}.get(kind.name, kind.name.upper())
    print(f"Launching training on {count * num_nodes} {name}s.")
    if num_nodes == 1 and rdzv_backend == "static":
        for attempt in range(max_restarts + 1):
            try:
                return _fork_ranks(function, args, count, precision, port, attempt, max_restarts)
            except _rank_errors():
                if attempt == max_restarts:
                    raise
                print(f"A process failed; starting all again ({max_restarts - attempt} more times).")
    endpoint = rdzv_endpoint or f"{master_addr}:{port}"
    config = {
        "min_nodes": num_nodes,
        "max_nodes": num_nodes,
        "nproc_per_node": count,
        "run_id": rdzv_id,
        "rdzv_endpoint": endpoint,
        "rdzv_backend": rdzv_backend,
        "rdzv_configs": {**({"rank": node_rank} if rdzv_backend == "static" else {}), **(rdzv_conf or {})},
        "max_restarts": max_restarts,
        "monitor_interval": monitor_interval,
        "log_line_prefix_template": log_line_prefix_template,
    }
    _launch_with_agent(function, args, config, precision)


def debug_launcher(function: Callable[..., Any], args: Sequence[Any] = (), num_processes: int = 2) -> None:
    """Runs a function on several CPU processes of this machine, to test communication between ranks.

    Args:
        function: The function that each process calls; it need not be importable.
        args: Its arguments.
        num_processes: Number of processes.

    Raises:
        TypeError: if `function` cannot be called with `args`.
        ValueError: for fewer than one process, or if this process is part of a process group.
        torch.multiprocessing.ProcessRaisedException: if `function` raised, with the traceback of the first to fail.
        torch.multiprocessing.ProcessExitedException: if a process was killed or exited with another code than 0.
    """
    _check_arguments("debug_launcher", function, args)
    if num_processes < 1:
        raise ValueError(f"num_processes={num_processes}: expected at least 1.")
    _require_no_group("debug_launcher")
    variables = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "yes"}
    _fork_ranks(function, args, num_processes, variables, port=0)


# Checks ----------------------------------------------------------------------------------------------------------------


def _device_and_count(wanted: int | None) -> tuple[devices.DeviceKind, int]:
    """Returns the device type and the number of processes to start."""
    # Has torch count GPUs through NVML: once CUDA is initialized here, forked processes cannot use it.
    with env.patch_environment(pytorch_nvml_based_cuda_check=1):
        kind = devices.DEVICES["cpu"] if env.flag("ACCELERATE_USE_CPU") else devices.default_kind()
        if kind.name == "xla":
            raise NotImplementedError("this version of accelerate cannot launch on TPUs yet.")
        if wanted is None:
            if kind.name == "cpu":
                raise ValueError(
                    "this machine has no accelerator, so the number of processes is not determined: give num_processes."
                )
            return kind, kind.count()
    if wanted < 1:
        raise ValueError(f"num_processes={wanted}: expected at least 1.")
    return kind, wanted


def _check_arguments(launcher: str, function: Any, args: Any) -> None:
    """Raises a TypeError if ``function(*args)`` cannot be called."""
    if not callable(function):
        raise TypeError(
            f"{launcher} expected a function, found {type(function).__name__} {function!r}: pass the "
            f"function itself, without calling it, and its arguments in `args`: {launcher}(train, args=(1, 2))."
        )
    try:
        inspect.signature(function).bind(*args)
    except ValueError:  # a builtin without a signature
        return
    except TypeError as error:
        name = getattr(function, "__name__", repr(function))
        raise TypeError(f"{launcher} would call {name} with args={args!r}: {error}.") from None


def _parse_port(port: str | int) -> int:
    try:
        number = int(port)
    except ValueError:
        number = -1
    if not 0 <= number < 2**16:
        raise ValueError(f"use_port={port!r}: expected the number of a port, 0 to 65535.")
    return number


def _require_no_state(launcher: str) -> None:
    if AcceleratorState._shared_state or PartialState._shared_state or world.is_joined():
        raise ValueError(
            f"{launcher} forks this process, and this process has an Accelerator or a PartialState already: the forked "
            "ones would take themselves for it. Create them only inside the function that you launch, and restart the "
            "notebook."
        )
    _require_no_group(launcher)


def _require_no_group(launcher: str) -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        raise ValueError(
            f"{launcher} forks this process, and this process is part of a process group: leave it first "
            "(torch.distributed.destroy_process_group())."
        )


def _require_unused_device(kind: devices.DeviceKind) -> None:
    module = None if kind.name in ("cpu", "mps") else kind.torch_module()
    if module is None:
        return
    if module.is_initialized():
        raise RuntimeError(
            f"{kind.name} has been initialized in this process, and a forked process cannot use it then. Restart the "
            "notebook, and keep everything that touches the device inside the function that you launch. "
            "ACCELERATE_DEBUG_MODE=yes looks for the cause."
        )
    if env.flag("ACCELERATE_DEBUG_MODE"):
        probe = multiprocessing.get_context("fork").Process(target=module.init)
        probe.start()
        probe.join()
        if probe.exitcode != 0:
            raise RuntimeError(
                f"a forked process cannot use {kind.name} (its traceback is above): something imported in this process "
                f"has initialized the driver. Import it inside the function that you launch."
            )


# Forked ranks ----------------------------------------------------------------------------------------------------------


def _fork_ranks(
    function: Callable[..., Any],
    args: Sequence[Any],
    count: int,
    variables: Mapping[str, str],
    port: int,
    attempt: int = 0,
    max_restarts: int = 0,
) -> None:
    """Runs `function` on `count` forked ranks and waits for them; raises as `notebook_launcher` does."""
    if not hasattr(os, "fork"):
        raise RuntimeError("this system cannot fork: put the function into a script and use `accelerate launch`.")
    rendezvous = LoopbackRendezvous(port) if count > 1 else None
    common: dict[str, Any] = dict(variables)
    if rendezvous is not None:
        if port not in (0, rendezvous.port):
            print(f"Port {port} is taken, using port {rendezvous.port}.")
        common |= {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "NODE_RANK": 0,
            "NPROC": count,
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": rendezvous.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_RESTART_COUNT": attempt,
            "TORCHELASTIC_MAX_RESTARTS": max_restarts,
        }
    sys.stdout.flush()
    sys.stderr.flush()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="accelerate_") as folder:
        error_files = [Path(folder) / str(index) for index in range(count)]
        # The store's threads start after the fork; faster ranks wait on the bound port.
        ranks = [
            context.Process(
                target=_run_rank,
                args=(os.getpid(), index, function, args, common, error_files[index]),
                name=f"rank {index}",
            )
            for index in range(count)
        ]
        try:
            for rank in ranks:
                rank.start()
            if rendezvous is not None:
                rendezvous.serve()
            _wait(ranks, error_files)
        finally:
            _terminate(ranks)
            if rendezvous is not None:
                rendezvous.shutdown()


def _run_rank(
    parent: int,
    index: int,
    function: Callable[..., Any],
    args: Iterable[Any],
    common: Mapping[str, Any],
    error_file: Path,
) -> None:
    """Runs in a forked rank."""
    if sys.platform == "linux":
        set_parent_death_signal(parent)
    for state in (AcceleratorState, PartialState, GradientState):  # inherited from the parent
        state._shared_state.clear()
    world.forget()
    env.publish(common)
    import torch

    torch.set_num_threads(env.integer("OMP_NUM_THREADS", 1))
    try:
        if "WORLD_SIZE" in common:
            PrepareForLaunch(function)(index, *args)
        else:  # a rank without peers has no group
            env.publish({"FORK_LAUNCHED": 1})
            function(*args)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)
    except Exception:  # noqa: BLE001 - the parent raises it
        error_file.write_text(traceback.format_exc())
        sys.exit(1)


def _wait(ranks: Sequence[BaseProcess], error_files: Sequence[Path]) -> None:
    """Waits until all ranks have succeeded; raises if one fails."""
    running = {rank.sentinel: rank for rank in ranks}
    while running:
        for sentinel in multiprocessing.connection.wait(list(running)):
            running.pop(sentinel).join()  # type: ignore[arg-type]  # sentinels are numbers here
        if any(rank.exitcode for rank in ranks):
            _wait_for_root_cause(list(running.values()), ranks, error_files)
            _raise_first_failure(ranks, error_files)


def _wait_for_root_cause(
    running: Sequence[BaseProcess], ranks: Sequence[BaseProcess], error_files: Sequence[Path]
) -> None:
    """Waits briefly for the rank with the root cause, while all failed ranks have only lost a peer."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while any(rank.is_alive() for rank in running) and time.monotonic() < deadline:
        if not all(lost_peer(_read_error(error_files[index])) for index, rank in enumerate(ranks) if rank.exitcode):
            return
        time.sleep(0.02)


def _read_error(error_file: Path) -> str:
    return error_file.read_text() if error_file.exists() else ""


def _raise_first_failure(ranks: Sequence[BaseProcess], error_files: Sequence[Path]) -> NoReturn:
    """Raises the error of the rank that failed first with a cause of its own: others often fail because they lost it."""
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

    def blame_key(index: int) -> tuple[bool, int]:
        error_file = error_files[index]
        return lost_peer(_read_error(error_file)), error_file.stat().st_mtime_ns if error_file.exists() else 0

    index = min((index for index, rank in enumerate(ranks) if rank.exitcode), key=blame_key)
    code, pid = ranks[index].exitcode or 0, ranks[index].pid or 0
    if error := _read_error(error_files[index]):
        raise ProcessRaisedException(
            f"\n\n-- Process {index} terminated with the following error:\n{error}", index, pid
        )
    if code < 0:
        name = signal.Signals(-code).name
        raise ProcessExitedException(f"process {index} terminated with signal {name}", index, pid, code, name)
    raise ProcessExitedException(f"process {index} terminated with exit code {code}", index, pid, code)


def _terminate(ranks: Sequence[BaseProcess]) -> None:
    """Terminates running ranks, and kills those that do not end."""
    alive = [rank for rank in ranks if rank.pid is not None and rank.is_alive()]
    for rank in alive:
        rank.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for rank in alive:
        rank.join(max(0.0, deadline - time.monotonic()))
        if rank.is_alive():
            rank.kill()
            rank.join()


def _rank_errors() -> tuple[type[Exception], ...]:
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

    return ProcessRaisedException, ProcessExitedException


# Several machines ------------------------------------------------------------------------------------------------------


def _launch_with_agent(
    function: Callable[..., Any], args: Sequence[Any], config: Mapping[str, Any], variables: Mapping[str, str]
) -> None:
    """Runs `function` through torch's elastic agent; restores the signal handlers that the agent replaces."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def forked(*inner: Any) -> None:
        env.publish({**variables, "FORK_LAUNCHED": 1})
        function(*inner)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        elastic_launch(LaunchConfig(**config, start_method="fork"), forked)(*args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
