"""Which rank is to blame, and what to say of it. Pure, save that it reads what ranks have noted of their errors.

When one rank fails, others often fail a moment later because it is gone. The first to fail of itself is the one to name.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .reaper import lost_a_peer, timed_out

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# What a script exits with when it has saved because it was asked to stop (`accelerate.checkpointing.EXIT_CODE`).
STOPPED = 75
_SAVED = " (it was asked to stop and has saved: start it again)"

_LIKELY: dict[int, str] = {
    signal.SIGKILL: " (by a person, or for want of memory)",
    signal.SIGABRT: (
        " (gloo does so when ranks take part with tensors of different sizes: --debug compares them first; NCCL's watchdog"
        " when a rank does not take part in time)"
    ),
}
# States of a process in /proc that it does not leave by itself: stopped by a signal, or by a debugger.
HALTED = ("T", "t")


class Verdict(NamedTuple):
    """How a machine's part of a launch ended.

    Attributes:
        line: What to say, or "".
        code: The launcher's exit code.
        lost_a_peer: Whether its ranks failed only because another was gone.
    """

    line: str
    code: int
    lost_a_peer: bool = False


def of_failures(
    failures: Mapping[int, ProcessFailure],
    deaths: Mapping[int, int],
    ending_since: int,
    left: Mapping[int, int] | None = None,
    alive: Mapping[int, tuple[int, str]] | None = None,
) -> Verdict:
    """The verdict on ranks that have failed.

    Args:
        failures: The failures by rank, at least one.
        deaths: When processes ended: process id -> nanoseconds since the epoch.
        ending_since: When the launcher began to end the ranks, in nanoseconds; 0 when it has not.
        left: Ranks that had left with code 0 by then: rank -> process id.
        alive: Ranks that had not ended by then: rank -> process id and state (`guard.state_of`).
    """

    def guilt(failure: ProcessFailure) -> tuple[bool, bool, bool, int]:
        """Sorts the rank that failed first, and of itself, before the others; one that timed out makes others lose it."""
        moment, why = _moment(failure, deaths), noted(failure.error_file)
        return moment > ending_since > 0, is_symptom(why), lost_a_peer(why), moment

    rank, failure = min(failures.items(), key=lambda item: guilt(item[1]))
    why = noted(failure.error_file)
    how, code = _how(failure.exitcode), failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    # It had noted its error, and the launcher's signal came before it was gone.
    if why and -failure.exitcode in (signal.SIGTERM, signal.SIGKILL) and deaths.get(failure.pid, 0) > ending_since > 0:
        how, code = "failed", 1
    line = f"rank {rank} (pid {failure.pid}) {how}{f': {why}' if why else ''}"
    # NCCL's watchdog aborts the process, and only its stderr has the reason.
    aborted = failure.exitcode == -signal.SIGABRT and not why
    if is_symptom(why) or aborted:
        cause = _missing(left or {}, alive or {}, only_known=not timed_out(why))
        line = f"{cause}; {line}" if cause else line
    return Verdict(line, code, lost_a_peer(why))


def is_symptom(why: str) -> bool:
    """Returns whether a rank's error is the effect of a peer that is gone, or that did not take part."""
    return lost_a_peer(why) or timed_out(why)


def _missing(left: Mapping[int, int], alive: Mapping[int, tuple[int, str]], only_known: bool) -> str:
    """The ranks that the others have missed, or "".

    Args:
        left: As for `of_failures`.
        alive: As for `of_failures`.
        only_known: Leave out ranks that were running: nothing says that they were waited for.
    """
    stopped = {rank: pid for rank, (pid, state) in alive.items() if state in HALTED}
    if stopped:
        return f"{_names(stopped)} {'is' if len(stopped) == 1 else 'are'} stopped (SIGSTOP)"
    if left:
        return f"{_names(left)} left early with code 0"
    if not alive or only_known:
        return ""
    running = _names({rank: pid for rank, (pid, _) in alive.items()})
    if len(alive) == 1:
        return f"{running} did not take part: it was still running"
    return f"one of {running} did not take part: they were still running"


def _names(ranks: Mapping[int, int]) -> str:
    return ", ".join(f"rank {rank} (pid {pid})" for rank, pid in sorted(ranks.items()))


def of_signal(number: signal.Signals, codes: Sequence[int | None] = (), too_late: bool = False) -> Verdict:
    """The verdict when the launcher was told to end.

    Args:
        number: The signal.
        codes: The ranks' exit codes.
        too_late: Whether all ranks had ended before the signal could reach them.
    """
    if STOPPED in codes and all(code in (0, STOPPED) for code in codes):
        return Verdict(f"stopped by {number.name}; all ranks have saved: start it again", STOPPED)
    if codes and all(code == 0 for code in codes):
        after = f"all ranks ended with code 0 after {number.name}"
        return Verdict(f"{number.name} came too late: all ranks had ended well" if too_late else after, 0)
    return Verdict("interrupted" if number == signal.SIGINT else f"stopped by {number.name}", 128 + int(number))


def noted(error_file: str) -> str:
    """The error that a rank noted, on one line; "" when it noted none."""
    try:
        found = json.loads(Path(error_file).read_text())["message"]
    except (OSError, ValueError, KeyError, TypeError):  # the rank did not get as far, or is not ours
        return ""
    text = str(found["message"] if isinstance(found, dict) and "message" in found else found).strip()
    first = text.splitlines()[0] if text else ""
    return first[:400]


def _moment(failure: ProcessFailure, deaths: Mapping[int, int]) -> int:
    """When a rank failed, in nanoseconds since the epoch: it notes its error before its peers can see it go.

    Integers throughout: a float holds moments of today only to 256 ns.
    """
    rounded_up = failure.timestamp + 1  # from whole seconds, rounded down
    moments = [deaths.get(failure.pid, rounded_up * 10**9)]
    if os.path.isfile(failure.error_file):
        moments.append(os.stat(failure.error_file).st_mtime_ns)
    return min(moments)


def _how(exitcode: int) -> str:
    if exitcode >= 0:
        stopped = _SAVED if exitcode == STOPPED else ""
        return f"exited with code {exitcode}{stopped}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    return f"was killed by {name}{_LIKELY.get(-exitcode, '')}"
