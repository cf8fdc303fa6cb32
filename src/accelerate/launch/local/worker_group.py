"""The ranks of one launch on this machine: started, watched and ended together, whatever happens to the launcher.

A rank that fails ends the others, on all machines; the launcher's last line names it and quotes its error, and its exit
code becomes the launcher's. No process outlives the launcher.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from ...runtime.cluster.cluster_env import DEFAULT_PORT
from ...settings import env
from ...settings.launcher import LaunchSettings
from ...settings.option import SettingsError
from ..console import say
from ..multinode.heartbeat import Elsewhere, End, Neighbours
from ..multinode.rounds import Rounds
from ..multinode.static_rendezvous import Meeting, NoMeeting, Terms, gather, number, options
from ..plan import LaunchPlan
from . import agent, failure_report
from .failure_report import Verdict
from .local_rendezvous import Loopback
from .reaper import SETTLE_SECONDS, Deaths, Guard, kill, state_of

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult
    from torch.distributed.launcher.api import LaunchConfig


def run(plan: LaunchPlan, settings: LaunchSettings) -> int:
    """Starts the ranks of `plan` and waits for them.

    Returns:
        0, or the exit code of the rank that failed first (128 and the signal's number if it was killed).

    Raises:
        SettingsError: when an option cannot be used, or contradicts what other machines were told.
    """
    guard = Guard()  # forked while this process is small and has one thread
    try:
        env.publish(plan.environment_over(env.snapshot()))
        _import_torch()
        with tempfile.TemporaryDirectory(prefix="accelerate_") as scratch:
            return _Ranks(plan, settings, guard, scratch).run()
    except KeyboardInterrupt:
        say("interrupted", settings.quiet)
        return 128 + signal.SIGINT
    except NoMeeting as error:
        say(str(error))
        return 1
    finally:
        guard.release()


def _import_torch() -> None:
    """Imports torch's agent; Ctrl-C waits so long: raised within an import, it may be swallowed or end torch badly."""
    pressed: list[int] = []
    waiting = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if waiting:
        signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        import torch.distributed.run  # noqa: F401
    finally:
        if waiting:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


# `Accelerator.stop_on` has a script save when one of these comes.
_HANDED_ON = ("SIGUSR1", "SIGUSR2")
_NOTED_SECONDS = 5.0


class _Ranks:
    """The ranks of one launch, over all their restarts; the agent's observer."""

    def __init__(self, plan: LaunchPlan, settings: LaunchSettings, guard: Guard, scratch: str) -> None:
        self.plan, self.settings, self.guard, self.scratch = plan, settings, guard, scratch
        self.quiet = settings.quiet
        self.running: set[int] = set()  # process groups that are not known to have ended well
        self.deaths: Deaths | None = None
        self.statuses: dict[int, int] = {}
        self.ending_since = 0
        self.pids: dict[int, int] = {}  # of this round: rank -> process id
        self.left: dict[int, int] = {}  # when the ranks began to be ended, as `verdict.of_failures` takes them
        self.alive: dict[int, tuple[int, str]] = {}
        self.meeting: Meeting | None = None
        self.handler: Any = None
        self.neighbours: Neighbours | None = None

    def run(self) -> int:
        with _silence(torch=not self.settings.debug):
            if self.plan.machines > 1:
                self.meeting = self._gather()
            config = agent.configuration(self.plan, self.scratch)
            self.handler = self._rendezvous(config)
            spec = agent.specification(self.plan, config, self.handler)
            started = agent.make(spec, config, self, self.meeting)
        ended = self._watch(started)
        if ended.line:
            say(ended.line, self.quiet)
        return ended.code

    def _watch(self, started: Any) -> Verdict:
        """Runs the agent to its end, and takes leave of the other machines."""
        from torch.distributed import DistError
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.rendezvous import RendezvousError

        ended = Verdict("", 0)
        for name in _HANDED_ON:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._hand_on)
        try:
            result = started.run()
            ended = self._judge(result)
        except SignalException as stopped:
            ended = failure_report.of_signal(stopped.sigval, started.exit_codes, started.signaled_too_late)
        except Elsewhere as error:
            ended = self._judge_elsewhere(error.end)
        except (RendezvousError, DistError) as error:
            if self.meeting is None:
                raise
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            line = f"{self.meeting.me} has lost the others, met at {self.meeting.where}: {reason}"
            ended = Verdict(line, 1, lost_a_peer=True)
        finally:
            _ignore_signals()
            kill(self.running)
        self._take_leave(ended)
        return ended

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        """Sends ranks a signal that says nothing to a launcher; schedulers can be told to send it."""
        for group in list(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(group, number)

    # How ranks meet ----------------------------------------------------------------------------------------------------

    def _rendezvous(self, config: LaunchConfig) -> Any:
        """One of torch's rendezvous handlers, or one of ours."""
        if self.plan.machines == 1 and config.rdzv_backend in ("static", "c10d"):
            wanted = int(config.rdzv_endpoint.rpartition(":")[2])
            handler = Loopback(wanted)
            if handler.port != wanted:
                say(f"{f'port {wanted} is taken, ' if wanted else ''}using port {handler.port}", self.quiet)
            return handler
        if self.meeting is None:
            return _known_to_torch(config)
        return Rounds(self.meeting) if config.rdzv_backend == "static" else _elastic(config, self.meeting)

    def _gather(self) -> Meeting | None:
        """Meets the other machines, unless torch knows another way to do it."""
        settings = self.settings
        said, backend = options(settings.rdzv_conf), settings.rdzv_backend
        if backend not in ("static", "c10d") or said.get("store_type", "tcp") != "tcp":
            return None
        return gather(
            Terms(
                rank=settings.machine_rank if backend == "c10d" else settings.machine_rank or 0,
                machines=self.plan.machines,
                processes=settings.processes,
                address=str(settings.main_process_ip),
                port=DEFAULT_PORT if settings.main_process_port is None else settings.main_process_port,
                backend=backend,
                timeout=number(said, "join_timeout", "timeout", default=900.0),
                quiet=settings.quiet,
            )
        )

    # What the agent says -----------------------------------------------------------------------------------------------

    def met(self, neighbours: Neighbours) -> None:
        """A round with other machines begins."""
        if self.neighbours is not None:
            self.neighbours.stop()
        self.neighbours = neighbours
        if isinstance(self.handler, Rounds):
            self.handler.neighbours = neighbours

    def started(self, pids: Mapping[int, int]) -> None:
        """The agent has started all ranks (again); rank -> process id."""
        self.guard.watch(pids.values())
        self.running |= set(pids.values())
        self.pids, self.left, self.alive, self.ending_since = dict(pids), {}, {}, 0
        self.statuses.clear()
        self.deaths = Deaths(pids.values(), self._ended)

    def _ended(self, pid: int, status: int) -> None:
        self.statuses[pid] = status
        if status == 0:  # what it left running on purpose is its own affair
            self.running.discard(pid)
            self.guard.forget([pid])

    def before_ending(self, error_files: Mapping[int, str]) -> None:
        """A rank has ended badly, and the agent is about to end the others.

        A rank that leaves takes its connections down before it is gone, and its peers can fail faster than it ends:
        they are not the cause, and the cause must not be ended before it has said its exit code. A rank that has saved
        because it was asked to stop is no cause either: the others are about to do the same.

        Args:
            error_files: Process id -> where the rank notes its error.
        """
        since = time.monotonic()
        while self.deaths is not None and self.deaths.able and len(self.deaths.times) < len(error_files):
            dead = [pid for pid in list(self.deaths.times) if self.statuses.get(pid) != 0]
            if all(self.statuses.get(pid) == failure_report.STOPPED for pid in dead):
                patience = agent.SAVING_SECONDS
            elif all(failure_report.is_symptom(failure_report.noted(error_files[pid])) for pid in dead):
                patience = SETTLE_SECONDS
            else:
                break
            if time.monotonic() - since > patience:
                break
            time.sleep(0.02)
        if self.deaths is not None and self.deaths.able:
            ended = self.deaths.times
            self.left = {rank: pid for rank, pid in self.pids.items() if self.statuses.get(pid) == 0}
            alive = [
                rank
                for rank, pid in self.pids.items()
                if pid not in ended and not failure_report.noted(error_files[pid])
            ]
            states = {rank: state_of(self.pids[rank]) for rank in alive}
            # With several machines, one that runs may be waiting as well, for a rank on another.
            self.alive = {
                rank: (self.pids[rank], state)
                for rank, state in states.items()
                if self.neighbours is None or state in failure_report.HALTED
            }
        self.ending_since = time.time_ns()

    # How it ended ------------------------------------------------------------------------------------------------------

    def _judge(self, result: RunResult | None) -> Verdict:
        if result is None:  # torch's rendezvous was closed
            end = self.neighbours.explain() if self.neighbours is not None else None
            return Verdict("another machine has ended the run", 1, True) if end is None else _of(end)
        if not result.is_failed():
            self.guard.forget(self.running)
            self.running.clear()
            return Verdict("", 0)
        deaths = {}
        if self.deaths is not None:
            self.deaths.join(_NOTED_SECONDS)  # torch may have reaped the last rank before the thread has run
            deaths = self.deaths.times
        ended = failure_report.of_failures(result.failures, deaths, self.ending_since, self.left, self.alive)
        if ended.lost_a_peer and self.neighbours is not None:
            end = self.neighbours.explain()
            return ended if end is None else _of(end)
        return ended

    def _judge_elsewhere(self, end: End) -> Verdict:
        if end.innocent and self.neighbours is not None:
            end = self.neighbours.explain() or end
        return _of(end)

    def _take_leave(self, ended: Verdict) -> None:
        """Tells the other machines how it ended here, unless they know."""
        if self.neighbours is None or self.meeting is None:
            return
        if ended.code:
            line = ended.line if ended.lost_a_peer else f"{self.meeting.me}: {ended.line}"
            self.neighbours.tell(End(self.meeting.me, line, ended.code, ended.lost_a_peer))
            if self.meeting.terms.backend == "c10d" and ended.code < 128:
                self.handler.shutdown()
        self.neighbours.leave(last=self.meeting.serves)


def _of(end: End) -> Verdict:
    return Verdict(end.line, end.code, lost_a_peer=True)


def _known_to_torch(config: LaunchConfig) -> Any:
    """One of torch's other rendezvous: etcd, or one that a package adds."""
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    try:
        return get_rendezvous_handler(_parameters(config))
    except (ImportError, ValueError, RendezvousError) as error:
        raise SettingsError(
            f"--rdzv_backend {config.rdzv_backend}: {error} (static and c10d need no other package.)"
        ) from None


def _parameters(config: LaunchConfig, local_address: str | None = None) -> Any:
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    return RendezvousParameters(
        config.rdzv_backend,
        config.rdzv_endpoint,
        config.run_id,
        config.min_nodes,
        config.max_nodes,
        local_addr=local_address,
        **config.rdzv_configs,
    )


def _elastic(config: LaunchConfig, meeting: Meeting) -> Any:
    """torch's rendezvous that lets a machine take the place of another, at the meeting's store."""
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    from ...runtime.cluster.network import local_address

    assert meeting.store is not None
    parameters = _parameters(config, meeting.address if meeting.own else local_address(meeting.address))
    return create_handler(meeting.store, C10dRendezvousBackend(meeting.store, config.run_id), parameters)


@contextlib.contextmanager
def _silence(torch: bool) -> Iterator[None]:
    """Keeps torch's own account of a failure off the launcher's screen, not its ranks': ours is shorter."""
    if torch and env.get("LOGLEVEL") is None:
        import logging

        logging.disable(logging.CRITICAL)
    level = env.get("TORCH_CPP_LOG_LEVEL") or ("FATAL" if torch else "WARNING")
    with env.patch_environment(torch_cpp_log_level=level):  # it is read when torch is imported, in the block
        yield


def _ignore_signals() -> None:
    """A second Ctrl-C must not keep the launcher from killing what is left."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
