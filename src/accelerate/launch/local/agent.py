"""torch's elastic agent: what it is told, and where ours differs. Everything that depends on its insides is here.

Ours says who was started, ends ranks sooner, and keeps an eye on the other machines.
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
from ..console import say
from ..multinode.heartbeat import Elsewhere, Neighbours
from ..multinode.static_rendezvous import Meeting, number
from ..plan import LaunchPlan
from .failure_report import STOPPED
from .reaper import kill

if TYPE_CHECKING:
    from torch.distributed import Store
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.launcher.api import LaunchConfig

    _Base = LocalElasticAgent
else:
    _Base = object

# How long ranks may take to end once another has failed: time to close files, not to wait for the one that is gone.
GRACE_SECONDS = 5
# How long when somebody asked them to stop, or has asked another one that has saved by now: they save.
SAVING_SECONDS = 60.0
# How long after a second Ctrl-C; and how soon one counts as the same, sent by the terminal and by a program in between.
_HURRY_SECONDS = 1.0
_SAME_SECONDS = 0.5
# torch's own names and, where ours is longer, why: a machine must not count as gone for being slow.
_SILENCE = {"keep_alive_interval": 5, "keep_alive_max_attempt": 12}


class Observer(Protocol):
    """Who is told what the agent does."""

    quiet: bool
    neighbours: Neighbours | None

    def started(self, pids: Mapping[int, int]) -> None:
        """All ranks have been started (again); rank -> process id."""

    def before_ending(self, error_files: Mapping[int, str]) -> None:
        """A rank has ended badly, and the others are about to be ended; process id -> where it notes its error."""

    def met(self, neighbours: Neighbours) -> None:
        """A round with other machines begins."""


def configuration(plan: LaunchPlan, log_dir: str) -> LaunchConfig:
    """What torch.distributed.run makes of the plan's command.

    Args:
        plan: A plan for torch.
        log_dir: Where ranks note errors and logs unless the plan says where.

    Raises:
        SettingsError: when it can make nothing of an option.
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


def specification(plan: LaunchPlan, config: LaunchConfig, handler: Any) -> WorkerSpec:
    """What the agent starts, and how its ranks meet."""
    from torch.distributed.elastic.agent.server.api import WorkerSpec

    # The agent replaces $-macros in arguments; ours are for the script as they are.
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


def make(spec: WorkerSpec, config: LaunchConfig, observer: Observer, meeting: Meeting | None) -> LocalElasticAgent:
    """The agent of this machine.

    Args:
        spec: What it starts.
        config: More of what it was told.
        observer: Who is told.
        meeting: Where the machines have met; None for a single one.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Agent(_Ours, LocalElasticAgent):
        pass

    made = Agent(spec=spec, logs_specs=config.logs_specs, start_method=config.start_method)  # type: ignore[arg-type]  # made by config_from_args
    made.observer, made.meeting = observer, meeting
    for name, default in _SILENCE.items():
        made.silence *= number(config.rdzv_configs, name, default=default)
    return made


class _Ours(_Base):
    """Where our agent differs from torch's, which `make` puts behind it, as importing it imports torch."""

    observer: Observer
    meeting: Meeting | None
    silence = 1.0
    exit_codes: Sequence[int | None] = ()  # of the ranks, after the last shutdown
    signaled_too_late = False  # all ranks had ended before it
    _patient: float | None = None  # how long ranks may take to end once the agent shuts down, in seconds
    _since = 0.0  # when another machine ended

    def _rendezvous(self, worker_group: Any) -> None:
        super()._rendezvous(worker_group)
        meeting = self.meeting
        if meeting is None:
            return
        rank, count = worker_group.group_rank, worker_group.group_world_size
        restarts = worker_group.spec.max_restarts
        name, begun = _agree(worker_group.store, rank, count, restarts - self._remaining_restarts)
        # A restart counts on all machines, or their ranks would look for each other in different places.
        self._remaining_restarts = max(0, restarts - begun)
        connect = functools.partial(_prefixed, name, meeting)
        self.observer.met(Neighbours(connect, rank, count, meeting.me, meeting.holder, self.silence))

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        if result.failures and all(failure.exitcode == STOPPED for failure in result.failures.values()):
            self._remaining_restarts = 0  # it did what it was asked to
        # Where torch may wait for another machine in the place of one that is gone, it shall.
        replaceable = self.meeting is not None and self.meeting.terms.backend == "c10d" and self._remaining_restarts > 0
        if self.observer.neighbours is not None and _is_healthy(result) and not replaceable:
            self._look_around(self.observer.neighbours)
        return result

    def _look_around(self, neighbours: Neighbours) -> None:
        try:
            neighbours.look()
        except Elsewhere as elsewhere:
            self._since = self._since or time.monotonic()
            saving = elsewhere.end.code == STOPPED and time.monotonic() - self._since < SAVING_SECONDS
            if not saving:
                raise

    def _exit_barrier(self) -> None:
        if self.observer.neighbours is not None:
            self.observer.neighbours.finish()

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        ids: dict[int, Any] = super()._start_workers(worker_group)
        self.observer.started({worker.global_rank: ids[worker.local_rank] for worker in worker_group.workers})
        context: Any = self._pcontext
        close: Callable[..., None] = context._close
        context.error_files = _ReadableFiles(context.error_files)
        files = {pid: context.error_files.get(local_rank) for local_rank, pid in ids.items()}

        def close_soon(death_sig: signal.Signals, timeout: int = 30) -> None:
            if self._patient is None:
                self.observer.before_ending(files)
            patience = min(timeout, GRACE_SECONDS) if self._patient is None else int(self._patient)
            close(death_sig=death_sig, timeout=patience)
            if self._patient is None:
                _report_ended(context)

        context._close = close_soon
        return ids

    def _shutdown(self, death_sig: signal.Signals | None = None, timeout: float = 30, **options: Any) -> None:
        # Told to stop by somebody: ranks may take their time, to save a checkpoint for instance.
        if death_sig is signal.SIGTERM:
            timeout = max(timeout, SAVING_SECONDS)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # some send it twice: to us, and to our process group
        # Not passed to torch: 2.6 takes no timeout. Its own argument, whether ranks are started again, is in options.
        self._patient = timeout
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
        """Within the block, Ctrl-C leaves ranks a second to end, instead of interrupting the wait for them."""
        context: Any = self._pcontext
        begun = time.monotonic()
        killing: list[threading.Timer] = []

        def hurry(*_: object) -> None:
            if time.monotonic() - begun < _SAME_SECONDS or killing or context is None:
                return
            alive = [
                handler.proc.pid for handler in context.subprocess_handlers.values() if handler.proc.poll() is None
            ]
            killing.append(threading.Timer(_HURRY_SECONDS, kill, [alive]))
            killing[0].start()

        previous = signal.signal(signal.SIGINT, hurry)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
            for timer in killing:
                timer.cancel()

    def _restart_workers(self, worker_group: Any) -> None:
        elsewhere = _is_healthy(worker_group)
        which = "a rank on another machine failed" if elsewhere else "a rank failed"
        left = self._remaining_restarts - elsewhere
        say(f"{which}; starting all ranks again ({left} more restart{'' if left == 1 else 's'})", self.observer.quiet)
        super()._restart_workers(worker_group)
        self._patient = None


class _ReadableFiles(dict[int, str]):
    """Error files by local rank, as torch looks them up; it raises on one that its writer had no time to complete."""

    def __getitem__(self, local_rank: int) -> str:
        from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

        file = super().__getitem__(local_rank)
        try:
            ProcessFailure(local_rank, 0, 1, file)
        except (ValueError, TypeError, LookupError, AttributeError):  # no JSON, or other than torch expects
            os.replace(file, f"{file}.damaged")
        return file


def _report_ended(context: Any) -> None:
    """Adds the ranks that have failed since the first did: torch 2.6 leaves them out, newer releases add them."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    for local_rank, handler in context.subprocess_handlers.items():
        if local_rank not in context._failures and (code := handler.proc.poll()):
            file = context.error_files[local_rank]
            context._failures[local_rank] = ProcessFailure(local_rank, handler.proc.pid, code, file)


def _is_healthy(group: Any) -> bool:
    return str(group.state.name) == "HEALTHY"


def _agree(store: Store, rank: int, count: int, begun: int) -> tuple[str, int]:
    """A name for the round, and how often ranks have been started again: the highest number of any machine."""
    name = uuid.uuid4().hex
    store.set(f"accelerate/round/{rank}", json.dumps([name, begun]))
    told = [json.loads(store.get(f"accelerate/round/{other}")) for other in range(count)]
    return str(told[0][0]), max(number for _, number in told)


def _prefixed(name: str, meeting: Meeting) -> Store:
    import torch.distributed as dist

    return dist.PrefixStore(f"accelerate/{name}", meeting.connect())
