"""Configures and subclasses torch's elastic agent; all uses of the agent's internals are in this module.

The subclass reports the processes it has started, ends ranks sooner once one has failed, and monitors the other machines.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...settings.option import SettingsError
from ..console import log_line
from ..multinode.heartbeat import PeerExitError, PeerMonitor
from ..multinode.static_rendezvous import StaticRendezvous, float_option
from ..plan import LaunchPlan
from .failure_report import SAVED_EXIT_CODE
from .reaper import kill_groups

if TYPE_CHECKING:
    from torch.distributed import Store
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.launcher.api import LaunchConfig

    _Base = LocalElasticAgent
else:
    _Base = object

# How long ranks may take to end once another has failed: enough to close files, not to wait for the one that is gone.
GRACE_SECONDS = 5
# How long they may take to save a checkpoint, after a signal or once another rank has saved.
SAVE_SECONDS = 60.0
# How long they may take after a second Ctrl-C; and how soon it counts as the first, sent by the terminal and by a program.
_KILL_DELAY_SECONDS = 1.0
_DEBOUNCE_SECONDS = 0.5
# Options of torch's dynamic rendezvous, whose product is the heartbeat timeout. The default is longer than torch's, so
# that a slow machine does not count as gone.
_KEEP_ALIVE = {"keep_alive_interval": 5, "keep_alive_max_attempt": 12}


class AgentObserver(Protocol):
    """Receives the events of an agent."""

    quiet: bool
    peers: PeerMonitor | None

    def workers_started(self, pids: Mapping[int, int]) -> None:
        """Called when all ranks have been started or restarted; rank -> process id."""

    def before_termination(self, error_files: Mapping[int, str]) -> None:
        """Called when a rank has failed, before the others are terminated; process id -> error file."""

    def rendezvous_completed(self, peers: PeerMonitor) -> None:
        """Called when a round with other machines begins."""


def launch_config(plan: LaunchPlan, log_dir: str) -> LaunchConfig:
    """Parses the plan's command as torch.distributed.run does.

    Args:
        plan: A plan for torch.
        log_dir: Folder of logs and error files, unless the plan names one.

    Raises:
        SettingsError: if torch rejects an option.
    """
    from torch.distributed.run import config_from_args, parse_args

    words = plan.command[plan.command.index("torch.distributed.run") + 1 :]
    arguments: Any = parse_args(words)  # type: ignore[no-untyped-call]
    arguments.log_dir = arguments.log_dir or log_dir
    try:
        config: LaunchConfig = config_from_args(arguments)[0]
    except ValueError as error:
        raise SettingsError(f"torch.distributed.run refuses an option: {error}") from None
    except OSError as error:
        raise SettingsError(f"--log_dir {arguments.log_dir} cannot be made: {error.strerror}.") from None
    return config


def worker_spec(plan: LaunchPlan, config: LaunchConfig, handler: Any) -> WorkerSpec:
    """Returns the command of each rank and the rendezvous handler, for the agent."""
    from torch.distributed.elastic.agent.server.api import WorkerSpec

    # The agent replaces $-macros in arguments; the script must receive its arguments unchanged.
    entrypoint, *arguments = [word.replace("$", "$$") for word in _rank_command(plan)]
    return WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        rdzv_handler=handler,
        entrypoint=entrypoint,
        args=tuple(arguments),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
    )


def _rank_command(plan: LaunchPlan) -> tuple[str, ...]:
    if sys.platform != "linux":
        return plan.worker
    shim = str(Path(__file__).with_name("shim.py"))
    return (sys.executable, "-I", "-S", shim, str(os.getpid()), *plan.worker)


def create_agent(
    spec: WorkerSpec, config: LaunchConfig, observer: AgentObserver, rendezvous: StaticRendezvous | None
) -> LocalElasticAgent:
    """Creates the agent of this machine.

    Args:
        spec: From `worker_spec`.
        config: From `launch_config`.
        observer: Receives the agent's events.
        rendezvous: The completed rendezvous of several machines; None for one machine.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Agent(AccelerateElasticAgent, LocalElasticAgent):
        pass

    agent = Agent(spec=spec, logs_specs=config.logs_specs, start_method=config.start_method)  # type: ignore[arg-type]  # made by config_from_args
    agent.observer, agent.rendezvous = observer, rendezvous
    if rendezvous is not None:
        for name, default in _KEEP_ALIVE.items():
            agent.heartbeat_timeout *= float_option(config.rdzv_configs, name, default=default)
    return agent


class AccelerateElasticAgent(_Base):
    """Overrides of torch's agent; `create_agent` adds the base class, as importing it imports torch.

    Attributes:
        observer: Receives the agent's events.
        rendezvous: The completed rendezvous of several machines; None for one machine.
        heartbeat_timeout: Seconds without a heartbeat after which a machine counts as gone.
        exit_codes: Exit codes of the ranks after the last shutdown.
        signaled_too_late: Whether all ranks had ended before that.
    """

    observer: AgentObserver
    rendezvous: StaticRendezvous | None
    heartbeat_timeout = 1.0
    exit_codes: Sequence[int | None] = ()
    signaled_too_late = False
    _stop_timeout: float | None = None  # seconds that ranks may take to end once the agent shuts down
    _remote_exit_time = 0.0  # when another machine ended

    def _rendezvous(self, worker_group: Any) -> None:
        super()._rendezvous(worker_group)
        rendezvous = self.rendezvous
        if rendezvous is None:
            return
        rank, count = worker_group.group_rank, worker_group.group_world_size
        max_restarts = worker_group.spec.max_restarts
        name, restarts = _sync_round(worker_group.store, rank, count, max_restarts - self._remaining_restarts)
        # All machines count the same restarts, since the keys of the ranks' stores contain the number.
        self._remaining_restarts = max(0, max_restarts - restarts)
        connect = functools.partial(_connect_round, name, rendezvous)
        self.observer.rendezvous_completed(
            PeerMonitor(connect, rank, count, rendezvous.node_name, rendezvous.store_host, self.heartbeat_timeout)
        )

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        if result.failures and all(failure.exitcode == SAVED_EXIT_CODE for failure in result.failures.values()):
            self._remaining_restarts = 0  # it was stopped, and has saved
        # With c10d, torch may wait for another machine that replaces the one that is gone.
        replaceable = (
            self.rendezvous is not None and self.rendezvous.config.backend == "c10d" and self._remaining_restarts > 0
        )
        if self.observer.peers is not None and _is_healthy(result) and not replaceable:
            self._check_peers(self.observer.peers)
        return result

    def _check_peers(self, peers: PeerMonitor) -> None:
        try:
            peers.check()
        except PeerExitError as error:
            self._remote_exit_time = self._remote_exit_time or time.monotonic()
            saving = error.end.code == SAVED_EXIT_CODE and time.monotonic() - self._remote_exit_time < SAVE_SECONDS
            if not saving:
                raise

    def _exit_barrier(self) -> None:
        if self.observer.peers is not None:
            self.observer.peers.exit_barrier()

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        ids: dict[int, Any] = super()._start_workers(worker_group)
        self.observer.workers_started({worker.global_rank: ids[worker.local_rank] for worker in worker_group.workers})
        context: Any = self._pcontext
        close: Callable[..., None] = context._close
        context.error_files = _ErrorFiles(context.error_files)
        files = {pid: context.error_files.get(local_rank) for local_rank, pid in ids.items()}

        def close_soon(death_sig: signal.Signals, timeout: int = 30) -> None:
            if self._stop_timeout is None:
                self.observer.before_termination(files)
            limit = min(timeout, GRACE_SECONDS) if self._stop_timeout is None else int(self._stop_timeout)
            close(death_sig=death_sig, timeout=limit)
            if self._stop_timeout is None:
                _add_later_failures(context)

        context._close = close_soon
        return ids

    def _shutdown(self, death_sig: signal.Signals | None = None, timeout: float = 30, **options: Any) -> None:
        # Stopped from outside: ranks may take the time to save a checkpoint.
        if death_sig is signal.SIGTERM:
            timeout = max(timeout, SAVE_SECONDS)
            signal.signal(
                signal.SIGTERM, signal.SIG_IGN
            )  # schedulers may send it twice: to us, and to our process group
        # Not passed to torch: 2.6 takes no timeout. Its own argument, whether ranks are started again, is in options.
        self._stop_timeout = timeout
        self.signaled_too_late = all(code is not None for code in self._exit_codes())
        with self._second_interrupt_kills() if death_sig is not None else contextlib.nullcontext():
            super()._shutdown(death_sig or signal.SIGTERM, **options)
        self.exit_codes = self._exit_codes()

    def _exit_codes(self) -> list[int | None]:
        context: Any = self._pcontext
        handlers = context.subprocess_handlers.values() if context is not None else ()
        return [handler.proc.poll() for handler in handlers]

    @contextlib.contextmanager
    def _second_interrupt_kills(self) -> Iterator[None]:
        """Within the block, Ctrl-C kills the ranks after a second, instead of interrupting the wait for them."""
        context: Any = self._pcontext
        start = time.monotonic()
        timers: list[threading.Timer] = []

        def kill_soon(*_: object) -> None:
            if time.monotonic() - start < _DEBOUNCE_SECONDS or timers or context is None:
                return
            alive = [
                handler.proc.pid for handler in context.subprocess_handlers.values() if handler.proc.poll() is None
            ]
            timers.append(threading.Timer(_KILL_DELAY_SECONDS, kill_groups, [alive]))
            timers[0].start()

        previous = signal.signal(signal.SIGINT, kill_soon)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
            for timer in timers:
                timer.cancel()

    def _restart_workers(self, worker_group: Any) -> None:
        remote = _is_healthy(worker_group)
        which = "a rank on another machine failed" if remote else "a rank failed"
        left = self._remaining_restarts - remote
        log_line(
            f"{which}; starting all ranks again ({left} more restart{'' if left == 1 else 's'})", self.observer.quiet
        )
        super()._restart_workers(worker_group)
        self._stop_timeout = None


class _ErrorFiles(dict[int, str]):
    """Error files by local rank; moves a file aside that is incomplete, on which torch would raise."""

    def __getitem__(self, local_rank: int) -> str:
        from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

        file = super().__getitem__(local_rank)
        try:
            ProcessFailure(local_rank, 0, 1, file)
        except (ValueError, TypeError, LookupError, AttributeError):  # not JSON, or not the fields that torch expects
            os.replace(file, f"{file}.damaged")
        return file


def _add_later_failures(context: Any) -> None:
    """Adds the ranks that have failed since the first did: torch 2.6 leaves them out, newer releases add them."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    for local_rank, handler in context.subprocess_handlers.items():
        if local_rank not in context._failures and (code := handler.proc.poll()):
            file = context.error_files[local_rank]
            context._failures[local_rank] = ProcessFailure(local_rank, handler.proc.pid, code, file)


def _is_healthy(group: Any) -> bool:
    return str(group.state.name) == "HEALTHY"


def _sync_round(store: Store, rank: int, count: int, restarts: int) -> tuple[str, int]:
    """Returns a name for the round, equal on all machines, and the maximum over them of the restarts so far."""
    name = uuid.uuid4().hex
    store.set(f"accelerate/round/{rank}", json.dumps([name, restarts]))
    nodes = [json.loads(store.get(f"accelerate/round/{other}")) for other in range(count)]
    return str(nodes[0][0]), max(number for _, number in nodes)


def _connect_round(name: str, rendezvous: StaticRendezvous) -> Store:
    import torch.distributed as dist

    return dist.PrefixStore(f"accelerate/{name}", rendezvous.connect())
