"""The ranks of one launch on this machine: started, monitored and ended together, however the launcher ends.

A rank that fails ends the others, on all machines. The launcher's last line names it and quotes its error, and its exit code
becomes the launcher's. No process outlives the launcher.
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
from ..console import log_line
from ..multinode.heartbeat import NodeExit, PeerExitError, PeerMonitor
from ..multinode.static_rendezvous import (
    RendezvousConfig,
    RendezvousError,
    StaticRendezvous,
    StaticRendezvousHandler,
    float_option,
    join,
    parse_rdzv_conf,
)
from ..plan import LaunchPlan
from . import agent, failure_report
from .failure_report import ExitReport
from .local_rendezvous import LoopbackRendezvous
from .reaper import SETTLE_SECONDS, ExitWatcher, OrphanReaper, kill_groups, process_state

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult
    from torch.distributed.launcher.api import LaunchConfig

# `Accelerator.stop_on` saves a checkpoint on one of these signals.
_FORWARDED_SIGNALS = ("SIGUSR1", "SIGUSR2")
_WATCHER_SECONDS = 5.0


def run(plan: LaunchPlan, settings: LaunchSettings) -> int:
    """Starts the ranks of `plan` and waits for them.

    Returns:
        0, or the exit code of the rank that failed first (128 plus the signal's number if it was killed).

    Raises:
        SettingsError: if an option cannot be used, or differs from that of another machine.
    """
    reaper = OrphanReaper()  # forked while this process is small and has one thread
    try:
        env.publish(plan.merged_environment(env.snapshot()))
        _import_torch()
        with tempfile.TemporaryDirectory(prefix="accelerate_") as scratch:
            return WorkerGroup(plan, settings, reaper, scratch).run()
    except KeyboardInterrupt:
        log_line("interrupted", settings.quiet)
        return 128 + signal.SIGINT
    except RendezvousError as error:
        log_line(str(error))
        return 1
    finally:
        reaper.release()


def _import_torch() -> None:
    """Imports torch's agent; defers Ctrl-C, which an import may swallow, or which may leave torch half imported."""
    pressed: list[int] = []
    defer = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if defer:
        signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        import torch.distributed.run  # noqa: F401
    finally:
        if defer:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


class WorkerGroup:
    """The ranks of one launch, over all their restarts; the agent's observer."""

    def __init__(self, plan: LaunchPlan, settings: LaunchSettings, reaper: OrphanReaper, scratch: str) -> None:
        self.plan, self.settings, self.reaper, self.scratch = plan, settings, reaper, scratch
        self.quiet = settings.quiet
        self.process_groups: set[int] = set()  # all but those whose rank has exited with code 0
        self.exits: ExitWatcher | None = None
        self.statuses: dict[int, int] = {}
        self.pids: dict[int, int] = {}  # of this round: rank -> process id
        # When the ranks began to be terminated, and their states then, as `failure_report.report_failures` takes them.
        self.terminating_since = 0
        self.exited: dict[int, int] = {}
        self.still_running: dict[int, tuple[int, str]] = {}
        self.rendezvous: StaticRendezvous | None = None
        self.handler: Any = None
        self.peers: PeerMonitor | None = None

    def run(self) -> int:
        quiet = not self.settings.debug
        with _quiet_torch_logs(quiet):
            level = env.get("TORCH_CPP_LOG_LEVEL") or ("FATAL" if quiet else "WARNING")
            with env.patch_environment(torch_cpp_log_level=level):  # read when torch is imported; not for the ranks
                if self.plan.machines > 1:
                    self.rendezvous = self._join_rendezvous()
                config = agent.launch_config(self.plan, self.scratch)
                self.handler = self._rendezvous_handler(config)
                spec = agent.worker_spec(self.plan, config, self.handler)
                elastic_agent = agent.create_agent(spec, config, self, self.rendezvous)
            report = self._run_agent(elastic_agent)
        if report.line:
            log_line(report.line, self.quiet)
        return report.code

    def _run_agent(self, elastic_agent: Any) -> ExitReport:
        """Runs the agent to its end, and publishes the exit to the other machines."""
        from torch.distributed import DistError
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.rendezvous import RendezvousError as TorchRendezvousError

        report = ExitReport("", 0)
        for name in _FORWARDED_SIGNALS:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._forward_signal)
        try:
            report = self._report_result(elastic_agent.run())
        except SignalException as stopped:
            report = failure_report.report_signal(
                stopped.sigval, elastic_agent.exit_codes, elastic_agent.signaled_too_late
            )
        except PeerExitError as error:
            report = self._report_peer_exit(error.end)
        except (TorchRendezvousError, DistError) as error:
            if self.rendezvous is None:
                raise
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            line = f"{self.rendezvous.node_name} has lost the other machines, at {self.rendezvous.endpoint}: {reason}"
            report = ExitReport(line, 1, lost_peer=True)
        finally:
            _ignore_signals()
            kill_groups(self.process_groups)
        self._leave_peers(report)
        return report

    def _forward_signal(self, number: int, frame: FrameType | None) -> None:
        """Forwards a signal to the ranks; schedulers can be configured to send it to the launcher."""
        for group in list(self.process_groups):
            with contextlib.suppress(ProcessLookupError):
                os.kill(group, number)

    # Rendezvous --------------------------------------------------------------------------------------------------------

    def _rendezvous_handler(self, config: LaunchConfig) -> Any:
        """Returns one of torch's rendezvous handlers, or one of ours."""
        if self.plan.machines == 1 and config.rdzv_backend in ("static", "c10d"):
            wanted = int(config.rdzv_endpoint.rpartition(":")[2])
            handler = LoopbackRendezvous(wanted)
            if handler.port != wanted:
                log_line(f"{f'port {wanted} is taken, ' if wanted else ''}using port {handler.port}", self.quiet)
            return handler
        if self.rendezvous is None:
            return _registered_handler(config)
        if config.rdzv_backend == "static":
            return StaticRendezvousHandler(self.rendezvous)
        return _dynamic_handler(config, self.rendezvous)

    def _join_rendezvous(self) -> StaticRendezvous | None:
        """Joins the other machines; returns None if the backend, or its store, is one that only torch supports."""
        settings = self.settings
        options, backend = parse_rdzv_conf(settings.rdzv_conf), settings.rdzv_backend
        if backend not in ("static", "c10d") or options.get("store_type", "tcp") != "tcp":
            return None
        return join(
            RendezvousConfig(
                rank=settings.machine_rank if backend == "c10d" else settings.machine_rank or 0,
                machines=self.plan.machines,
                processes=settings.processes,
                address=str(settings.main_process_ip),
                port=DEFAULT_PORT if settings.main_process_port is None else settings.main_process_port,
                backend=backend,
                timeout=float_option(options, "join_timeout", "timeout", default=900.0),
                quiet=settings.quiet,
            )
        )

    # The agent's events ------------------------------------------------------------------------------------------------

    def rendezvous_completed(self, peers: PeerMonitor) -> None:
        """Replaces the monitor of the other machines when a round begins."""
        if self.peers is not None:
            self.peers.stop()
        self.peers = peers
        if isinstance(self.handler, StaticRendezvousHandler):
            self.handler.peers = peers

    def workers_started(self, pids: Mapping[int, int]) -> None:
        """Watches the ranks that have been started or restarted; rank -> process id."""
        self.reaper.watch(pids.values())
        self.process_groups |= set(pids.values())
        self.pids, self.exited, self.still_running, self.terminating_since = dict(pids), {}, {}, 0
        self.statuses.clear()
        self.exits = ExitWatcher(pids.values(), self._ended)

    def _ended(self, pid: int, status: int) -> None:
        self.statuses[pid] = status
        if status == 0:  # its children may outlive it on purpose
            self.process_groups.discard(pid)
            self.reaper.forget([pid])

    def before_termination(self, error_files: Mapping[int, str]) -> None:
        """Waits for the root cause before the agent terminates the remaining ranks, and records their states.

        A rank that ends closes its connections before it has exited, and its peers can fail faster than it exits: their
        failures are symptoms, and the cause must not be terminated before its exit code is available. A rank that was
        stopped and has saved is no cause either, as the others are about to save.

        Args:
            error_files: Process id -> the rank's error file.
        """
        since = time.monotonic()
        while self.exits is not None and self.exits.supported and len(self.exits.times) < len(error_files):
            failed = [pid for pid in list(self.exits.times) if self.statuses.get(pid) != 0]
            if all(self.statuses.get(pid) == failure_report.SAVED_EXIT_CODE for pid in failed):
                limit = agent.SAVE_SECONDS
            elif all(failure_report.is_symptom(failure_report.read_error_file(error_files[pid])) for pid in failed):
                limit = SETTLE_SECONDS
            else:
                break
            if time.monotonic() - since > limit:
                break
            time.sleep(0.02)
        if self.exits is not None and self.exits.supported:
            ended = self.exits.times
            self.exited = {rank: pid for rank, pid in self.pids.items() if self.statuses.get(pid) == 0}
            states = {
                rank: (pid, process_state(pid))
                for rank, pid in self.pids.items()
                if pid not in ended and not failure_report.read_error_file(error_files[pid])
            }
            # With several machines, a running rank may wait as well, for one on another machine.
            self.still_running = {
                rank: (pid, state)
                for rank, (pid, state) in states.items()
                if self.peers is None or state in failure_report.HALTED_STATES
            }
        self.terminating_since = time.time_ns()

    # Exit reports ------------------------------------------------------------------------------------------------------

    def _report_result(self, result: RunResult | None) -> ExitReport:
        if result is None:  # torch's rendezvous was closed
            end = self.peers.find_root_cause() if self.peers is not None else None
            return ExitReport("another machine has ended the run", 1, True) if end is None else _from_node_exit(end)
        if not result.is_failed():
            self.reaper.forget(self.process_groups)
            self.process_groups.clear()
            return ExitReport("", 0)
        exit_times = {}
        if self.exits is not None:
            self.exits.join(_WATCHER_SECONDS)  # torch may have reaped the last rank before the thread has run
            exit_times = self.exits.times
        report = failure_report.report_failures(
            result.failures, exit_times, self.terminating_since, self.exited, self.still_running
        )
        end = self.peers.find_root_cause() if report.lost_peer and self.peers is not None else None
        return report if end is None else _from_node_exit(end)

    def _report_peer_exit(self, end: NodeExit) -> ExitReport:
        if end.is_symptom and self.peers is not None:
            end = self.peers.find_root_cause() or end
        return _from_node_exit(end)

    def _leave_peers(self, report: ExitReport) -> None:
        """Publishes a failure to the other machines, and stops monitoring them."""
        if self.peers is None or self.rendezvous is None:
            return
        if report.code:
            line = report.line if report.lost_peer else f"{self.rendezvous.node_name}: {report.line}"
            self.peers.publish_exit(NodeExit(self.rendezvous.node_name, line, report.code, report.lost_peer))
            if self.rendezvous.config.backend == "c10d" and report.code < 128:
                self.handler.shutdown()
        self.peers.leave(last=self.rendezvous.hosts_store)


def _from_node_exit(end: NodeExit) -> ExitReport:
    return ExitReport(end.line, end.code, lost_peer=True)


def _registered_handler(config: LaunchConfig) -> Any:
    """Returns one of torch's other rendezvous handlers: etcd's, or one that a package registers."""
    from torch.distributed.elastic.rendezvous import RendezvousError as TorchRendezvousError
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    try:
        return get_rendezvous_handler(_parameters(config))
    except (ImportError, ValueError, TorchRendezvousError) as error:
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


def _dynamic_handler(config: LaunchConfig, rendezvous: StaticRendezvous) -> Any:
    """Returns torch's dynamic rendezvous handler, which lets machines be replaced, on the store of `rendezvous`."""
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    from ...runtime.cluster.network import local_address

    assert rendezvous.store is not None
    parameters = _parameters(
        config, rendezvous.address if rendezvous.owns_address else local_address(rendezvous.address)
    )
    return create_handler(rendezvous.store, C10dRendezvousBackend(rendezvous.store, config.run_id), parameters)


@contextlib.contextmanager
def _quiet_torch_logs(quiet: bool) -> Iterator[None]:
    """Suppresses torch's report of a failure in the launcher, not in its ranks, as ours replaces it.

    The logs of a program that launches from Python are restored afterwards.
    """
    import logging

    disabled = logging.root.manager.disable
    if quiet and env.get("LOGLEVEL") is None:
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)


def _ignore_signals() -> None:
    """Ignores signals, so that a second Ctrl-C does not keep the launcher from killing the remaining ranks."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
