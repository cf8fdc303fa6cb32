"""torch's elastic agent: what it is told, and where ours differs. Everything that depends on its insides is here.

Ours says who was started, ends ranks sooner, and keeps an eye on the other machines.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..settings.option import SettingsError
from .console import say
from .meeting import Meeting, number
from .neighbours import Neighbours
from .plan import LaunchPlan

if TYPE_CHECKING:
    from torch.distributed import Store
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.launcher.api import LaunchConfig

# How long ranks may take to end once another has failed: time to close files, not to wait for the one that is gone.
GRACE_SECONDS = 5
# torch's own names and, where ours is longer, why: a machine must not count as gone for being slow.
_SILENCE = {"keep_alive_interval": 5, "keep_alive_max_attempt": 12}


class Observer(Protocol):
    """Who is told what the agent does."""

    quiet: bool
    neighbours: Neighbours | None

    def started(self, pids: list[int]) -> None:
        """All ranks have been started (again)."""

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
    from torch.distributed.elastic.agent.server.api import WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    silence = 1.0
    for name, default in _SILENCE.items():
        silence *= number(config.rdzv_configs, name, default=default)

    class Agent(LocalElasticAgent):
        _patient = False

        def _rendezvous(self, worker_group: Any) -> None:
            super()._rendezvous(worker_group)
            if meeting is None:
                return
            rank, count = worker_group.group_rank, worker_group.group_world_size
            begun = spec.max_restarts - self._remaining_restarts
            name, most = _agree(worker_group.store, rank, count, begun)
            # A restart counts on all machines, or their ranks would look for each other in different places.
            self._remaining_restarts = max(0, spec.max_restarts - most)
            observer.met(Neighbours(lambda: _prefixed(name, meeting), rank, count, meeting.me, meeting.holder, silence))

        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            waits = meeting is not None and meeting.terms.backend == "c10d" and self._remaining_restarts > 0
            if observer.neighbours is not None and result.state == WorkerState.HEALTHY and not waits:
                observer.neighbours.look()  # where torch may wait for another machine in its place, it shall
            return result

        def _exit_barrier(self) -> None:
            if observer.neighbours is not None:
                observer.neighbours.finish()

        def _start_workers(self, worker_group: Any) -> dict[int, Any]:
            ids: dict[int, Any] = super()._start_workers(worker_group)
            observer.started(list(ids.values()))
            context: Any = self._pcontext
            close: Callable[..., None] = context._close
            files = {pid: context.error_files[local_rank] for local_rank, pid in ids.items()}

            def close_soon(death_sig: signal.Signals, timeout: int = 30) -> None:
                if not self._patient:
                    observer.before_ending(files)
                    timeout = min(timeout, GRACE_SECONDS)
                close(death_sig=death_sig, timeout=timeout)

            context._close = close_soon
            return ids

        def _shutdown(self, *args: Any, **kwargs: Any) -> None:
            # Told to stop by somebody: ranks may take their time, to save a checkpoint for instance.
            self._patient = True
            super()._shutdown(*args, **kwargs)

        def _restart_workers(self, worker_group: Any) -> None:
            elsewhere = worker_group.state == WorkerState.HEALTHY
            which = "a rank on another machine failed" if elsewhere else "a rank failed"
            left = self._remaining_restarts - elsewhere
            say(f"{which}; starting all ranks again ({left} more restart{'' if left == 1 else 's'})", observer.quiet)
            super()._restart_workers(worker_group)
            self._patient = False

    return Agent(spec=spec, logs_specs=config.logs_specs, start_method=config.start_method)  # type: ignore[arg-type]  # made by config_from_args


def _agree(store: Store, rank: int, count: int, begun: int) -> tuple[str, int]:
    """A name for the round, and how often ranks have been started again: the highest number of any machine."""
    name = uuid.uuid4().hex
    store.set(f"accelerate/round/{rank}", json.dumps([name, begun]))
    told = [json.loads(store.get(f"accelerate/round/{other}")) for other in range(count)]
    return str(told[0][0]), max(number for _, number in told)


def _prefixed(name: str, meeting: Meeting) -> Store:
    import torch.distributed as dist

    return dist.PrefixStore(f"accelerate/{name}", meeting.connect())
