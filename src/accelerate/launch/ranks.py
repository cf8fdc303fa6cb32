"""Several processes on this machine through torch's elastic agent: started, watched, ended together.

The agent's store listens on 127.0.0.1 only when all ranks are here. A rank that fails ends the others; the launcher's
last line names it and quotes its error, and its exit code becomes the launcher's. No process outlives the launcher.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..settings import env
from ..settings.launcher import LaunchSettings
from .guard import Deaths, Guard, kill
from .plan import LaunchPlan
from .run import child_environment, say

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.elastic.rendezvous import RendezvousInfo
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
        env.publish(child_environment(plan))
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

    def run(self) -> int:
        if not self.settings.debug and env.get("LOGLEVEL") is None:
            import logging

            logging.disable(logging.CRITICAL)  # the agent's own account of a failure; ours is shorter
        from torch.distributed.elastic.multiprocessing import SignalException

        config = self._config()
        agent = _agent(self._spec(config), config, self)
        try:
            result = agent.run()
        except SignalException as stopped:
            say("interrupted" if stopped.sigval == signal.SIGINT else f"stopped by {stopped.sigval.name}", self.quiet)
            return 128 + int(stopped.sigval)
        finally:
            _ignore_signals()
            kill(self.running)
        return self._failed(result) if result.is_failed() else 0

    @property
    def quiet(self) -> bool:
        return self.settings.quiet

    def started(self, pids: list[int]) -> None:
        """The agent has started all ranks (again)."""
        self.guard.watch(pids)
        self.running |= set(pids)
        self.deaths = Deaths(dict.fromkeys(pids), self._ended)

    def _ended(self, pid: int, status: int) -> None:
        if status == 0:  # what it left running on purpose is its own affair
            self.running.discard(pid)
            self.guard.forget([pid])

    # What the agent is told -------------------------------------------------------------------------------------------

    def _config(self) -> LaunchConfig:
        from torch.distributed.run import config_from_args, parse_args

        command = self.plan.command
        arguments = parse_args(command[command.index("torch.distributed.run") + 1 :])
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
            handler = Loopback(wanted, self.quiet)
            return WorkerSpec(**common, rdzv_handler=handler, master_addr=handler.address, master_port=handler.port)  # type: ignore[arg-type]  # a handler by its methods: the base class would import torch here
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
        failure_of = dict(sorted(result.failures.items()))
        rank = min(failure_of, key=lambda rank: self._moment(failure_of[rank]))
        failure = failure_of[rank]
        say(f"rank {rank} (pid {failure.pid}) {_how(failure.exitcode)}{_why(failure.error_file)}", self.quiet)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode

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
    return f"was killed by {name}" + (" (by a person, or for want of memory)" if -exitcode == signal.SIGKILL else "")


def _why(error_file: str) -> str:
    """The error that the rank noted, on one line; "" when it noted none."""
    import json

    try:
        noted = json.loads(Path(error_file).read_text())["message"]
    except (OSError, ValueError, KeyError, TypeError):  # the rank did not get as far, or is not ours
        return ""
    text = str(noted["message"] if isinstance(noted, dict) and "message" in noted else noted).strip()
    first = text.splitlines()[0] if text else ""
    return f": {first[:400]}" if first else ""


def _ignore_signals() -> None:
    """A second Ctrl-C must not keep the launcher from killing what is left."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class Loopback:
    """A rendezvous of one machine: the agent's store on 127.0.0.1, out of reach of other machines.

    The port is bound here and handed to the store, so that nobody can take it in between. A `RendezvousHandler` by its
    methods.

    Args:
        port: The port wanted; 0, or one that is taken, means any free one, which is then said.
    """

    address = "127.0.0.1"
    use_agent_store = True

    def __init__(self, port: int, quiet: bool = False) -> None:
        self._socket = _listen(self.address, port) or _listen(self.address, 0)
        assert self._socket is not None
        self.port: int = self._socket.getsockname()[1]
        if self.port != port:
            say(f"{f'port {port} is taken, ' if port else ''}using port {self.port}", quiet)
        self._store: Any = None

    def next_rendezvous(self) -> RendezvousInfo:
        """The place of this machine's agent: the only one."""
        from torch.distributed import PrefixStore, TCPStore
        from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

        if self._store is None:
            assert self._socket is not None
            self._store = TCPStore(
                self.address,
                self.port,
                is_master=True,
                wait_for_workers=False,
                multi_tenant=True,
                master_listen_fd=self._socket.detach(),  # the store closes it
            )
        store = PrefixStore(self.get_run_id(), self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(self.address, self.port))

    def get_backend(self) -> str:
        return "loopback"

    def get_run_id(self) -> str:
        return "accelerate"

    def num_nodes_waiting(self) -> int:
        return 0

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nobody else waits for it."""

    def shutdown(self) -> bool:
        self._store = None
        return True


def _listen(address: str, port: int) -> socket.socket | None:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # A port whose last user has just ended is free; on Linux this does not let two listen.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((address, port))
        listening.listen(2048)
    except OSError:
        listening.close()
        return None
    return listening


def _agent(spec: WorkerSpec, config: LaunchConfig, ranks: _Ranks) -> LocalElasticAgent:
    """torch's agent for this machine, with three things of ours: who was started, how long ending takes, a word on restarts."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Agent(LocalElasticAgent):
        _patient = False

        def _start_workers(self, worker_group: Any) -> dict[int, Any]:
            ids: dict[int, Any] = super()._start_workers(worker_group)
            ranks.started(list(ids.values()))
            context: Any = self._pcontext
            close: Callable[..., None] = context._close

            def close_soon(death_sig: signal.Signals, timeout: int = 30) -> None:
                close(death_sig=death_sig, timeout=timeout if self._patient else min(timeout, GRACE_SECONDS))

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
