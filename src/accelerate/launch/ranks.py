"""Several processes on this machine through torch's elastic agent: started, watched, ended together.

The agent's store listens on 127.0.0.1 only when all ranks are here. A rank that fails ends the others; the launcher's
last line names it and quotes its error, and its exit code becomes the launcher's. No process outlives the launcher.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..settings import env
from ..settings.launcher import LaunchSettings
from .console import say
from .guard import SETTLE_SECONDS, Deaths, Guard, kill, lost_a_peer
from .loopback import Loopback
from .plan import LaunchPlan

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

# How long ranks may take to end once another has failed: time to close files, not to wait for the one that is gone.
GRACE_SECONDS = 5


def run(plan: LaunchPlan, settings: LaunchSettings) -> int:
    """Starts the ranks of `plan` and waits for them.

    Returns:
        0, or the exit code of the rank that failed first (128 and the signal's number if it was killed).
    """
    guard = Guard()  # forked while this process is small and has one thread
    try:
        env.publish(plan.environment_over(env.snapshot()))
        with tempfile.TemporaryDirectory(prefix="accelerate_") as scratch:
            return _Ranks(plan, settings, guard, scratch).run()
    except KeyboardInterrupt:
        say("interrupted", settings.quiet)
        return 128 + signal.SIGINT
    finally:
        guard.release()


class _Ranks:
    """The ranks of one launch, over all their restarts."""

    def __init__(self, plan: LaunchPlan, settings: LaunchSettings, guard: Guard, scratch: str) -> None:
        self.plan, self.settings, self.guard, self.scratch = plan, settings, guard, scratch
        self.running: set[int] = set()  # process groups that are not known to have ended well
        self.deaths: Deaths | None = None
        self.statuses: dict[int, int] = {}
        self.ending_since = 0

    def run(self) -> int:
        if not self.settings.debug and env.get("LOGLEVEL") is None:
            import logging

            logging.disable(logging.CRITICAL)  # the agent's own account of a failure; ours is shorter
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.rendezvous import RendezvousError

        config = self._config()
        agent = _agent(self._spec(config), config, self)
        try:
            result = agent.run()
            if not result.is_failed():
                self.guard.forget(self.running)
                self.running.clear()
        except SignalException as stopped:
            say("interrupted" if stopped.sigval == signal.SIGINT else f"stopped by {stopped.sigval.name}", self.quiet)
            return 128 + int(stopped.sigval)
        except (RendezvousError, RuntimeError, TimeoutError) as error:
            if self.plan.machines == 1:
                raise
            say(self._no_meeting(config, error))
            return 1
        finally:
            _ignore_signals()
            kill(self.running)
        return self._failed(result) if result.is_failed() else 0

    def _no_meeting(self, config: LaunchConfig, error: Exception) -> str:
        here = f"machine {self.settings.machine_rank or 0} of {self.plan.machines}"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return (
            f"this is {here}, and it could not meet the others at {config.rdzv_endpoint} ({config.rdzv_backend} "
            f"rendezvous): {reason}"
        )

    @property
    def quiet(self) -> bool:
        return self.settings.quiet

    def started(self, pids: list[int]) -> None:
        """The agent has started all ranks (again)."""
        self.guard.watch(pids)
        self.running |= set(pids)
        self.statuses.clear()
        self.deaths = Deaths(pids, self._ended)

    def _ended(self, pid: int, status: int) -> None:
        self.statuses[pid] = status
        if status == 0:  # what it left running on purpose is its own affair
            self.running.discard(pid)
            self.guard.forget([pid])

    def before_ending(self, error_files: Mapping[int, str]) -> None:
        """A rank has ended badly, and the agent is about to end the others.

        A rank that leaves takes its connections down before it is gone, and its peers can fail faster than it ends:
        they are not the cause, and the cause must not be ended before it has said its exit code.

        Args:
            error_files: Process id -> where the rank notes its error.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        while self.deaths is not None and self.deaths.able and time.monotonic() < deadline:
            dead = [pid for pid in list(self.deaths.times) if self.statuses.get(pid) != 0]
            if len(self.deaths.times) == len(error_files) or not all(
                lost_a_peer(_why(error_files[pid])) for pid in dead
            ):
                break
            time.sleep(0.02)
        self.ending_since = time.time_ns()

    # What the agent is told -------------------------------------------------------------------------------------------

    def _config(self) -> LaunchConfig:
        from torch.distributed.run import config_from_args, parse_args

        command = self.plan.command
        arguments: Any = parse_args(command[command.index("torch.distributed.run") + 1 :])  # type: ignore[no-untyped-call]
        arguments.log_dir = arguments.log_dir or self.scratch
        config: LaunchConfig = config_from_args(arguments)[0]
        return config

    def _spec(self, config: LaunchConfig) -> WorkerSpec:
        from torch.distributed.elastic.agent.server.api import WorkerSpec
        from torch.distributed.elastic.rendezvous import RendezvousParameters
        from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

        common: dict[str, Any] = {
            "role": config.role,
            "local_world_size": config.nproc_per_node,
            "max_restarts": config.max_restarts,
            "monitor_interval": config.monitor_interval,
        }
        # The agent replaces $-macros in arguments; ours are for the script as they are.
        entrypoint, *arguments = [word.replace("$", "$$") for word in self._worker()]
        common |= {"entrypoint": entrypoint, "args": tuple(arguments)}
        if self.plan.machines == 1:
            wanted = int(config.rdzv_endpoint.rpartition(":")[2])
            handler: Any = Loopback(wanted)
            if handler.port != wanted:
                say(f"{f'port {wanted} is taken, ' if wanted else ''}using port {handler.port}", self.quiet)
            return WorkerSpec(**common, rdzv_handler=handler)
        parameters = RendezvousParameters(
            config.rdzv_backend,
            config.rdzv_endpoint,
            config.run_id,
            config.min_nodes,
            config.max_nodes,
            **config.rdzv_configs,
        )
        address, _, port = config.rdzv_endpoint.rpartition(":")
        static = config.rdzv_backend == "static"
        return WorkerSpec(
            **common,
            rdzv_handler=get_rendezvous_handler(parameters),
            master_addr=address if static else None,
            master_port=int(port) if static else None,
        )

    def _worker(self) -> tuple[str, ...]:
        if sys.platform != "linux":
            return self.plan.worker
        shim = str(Path(__file__).with_name("shim.py"))
        return (sys.executable, "-I", "-S", shim, str(os.getpid()), *self.plan.worker)

    # What is said in the end ------------------------------------------------------------------------------------------

    def _failed(self, result: RunResult) -> int:
        rank, failure = min(result.failures.items(), key=lambda item: self._guilt(item[1]))
        why = _why(failure.error_file)
        line = f"rank {rank} (pid {failure.pid}) {_how(failure.exitcode)}{f': {why}' if why else ''}"
        if lost_a_peer(_why(failure.error_file)) and 0 in self.statuses.values():
            line += " (another rank had ended before, with code 0)"
        say(line, self.quiet)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode

    def _guilt(self, failure: ProcessFailure) -> tuple[bool, bool, float]:
        """Sorts the rank that failed first, and of itself, before the others."""
        moment = self._moment(failure)
        ended_by_us = moment > self.ending_since > 0 and -failure.exitcode in (signal.SIGTERM, signal.SIGKILL)
        return ended_by_us, lost_a_peer(_why(failure.error_file)), moment

    def _moment(self, failure: ProcessFailure) -> float:
        """When a rank failed, in nanoseconds: it notes its error before its peers can see it go."""
        moments = [failure.timestamp * 1e9 + 1e9]  # whole seconds, rounded down
        if self.deaths is not None and failure.pid in self.deaths.times:
            moments = [float(self.deaths.times[failure.pid])]
        if os.path.isfile(failure.error_file):
            moments.append(float(os.stat(failure.error_file).st_mtime_ns))
        return min(moments)


def _how(exitcode: int) -> str:
    if exitcode >= 0:
        return f"exited with code {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    return f"was killed by {name}{_LIKELY.get(-exitcode, '')}"


_LIKELY: dict[int, str] = {
    signal.SIGKILL: " (by a person, or for want of memory)",
    signal.SIGABRT: " (gloo does so when ranks take part with tensors of different sizes: --debug compares them first)",
}


def _why(error_file: str) -> str:
    """The error that the rank noted, on one line; "" when it noted none."""
    import json

    try:
        noted = json.loads(Path(error_file).read_text())["message"]
    except (OSError, ValueError, KeyError, TypeError):  # the rank did not get as far, or is not ours
        return ""
    text = str(noted["message"] if isinstance(noted, dict) and "message" in noted else noted).strip()
    first = text.splitlines()[0] if text else ""
    return first[:400]


def _ignore_signals() -> None:
    """A second Ctrl-C must not keep the launcher from killing what is left."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _agent(spec: WorkerSpec, config: LaunchConfig, ranks: _Ranks) -> LocalElasticAgent:
    """torch's agent for this machine, and ours: who was started, how long ending takes, a word on restarts."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Agent(LocalElasticAgent):
        _patient = False

        def _start_workers(self, worker_group: Any) -> dict[int, Any]:
            ids: dict[int, Any] = super()._start_workers(worker_group)
            ranks.started(list(ids.values()))
            context: Any = self._pcontext
            close: Callable[..., None] = context._close

            files = {pid: context.error_files[local_rank] for local_rank, pid in ids.items()}

            def close_soon(death_sig: signal.Signals, timeout: int = 30) -> None:
                if not self._patient:
                    ranks.before_ending(files)
                    timeout = min(timeout, GRACE_SECONDS)
                close(death_sig=death_sig, timeout=timeout)

            context._close = close_soon
            return ids

        def _shutdown(self, *args: Any, **kwargs: Any) -> None:
            # Told to stop by somebody: ranks may take their time, to save a checkpoint for instance.
            self._patient = True
            super()._shutdown(*args, **kwargs)

        def _restart_workers(self, worker_group: Any) -> None:
            left = self._remaining_restarts
            say(f"a rank failed; starting all ranks again ({left} more restart{'' if left == 1 else 's'})", ranks.quiet)
            super()._restart_workers(worker_group)
            self._patient = False

    return Agent(spec=spec, logs_specs=config.logs_specs, start_method=config.start_method)  # type: ignore[arg-type]  # made by config_from_args
