"""Determines the rank that failed first, and the line that reports it. Pure, except that it reads ranks' error files.

If one rank fails, others often fail a moment later because they lost it. The first failure with a cause of its own is
reported: failures after the launcher began to terminate ranks, lost connections and timeouts have lower priority.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .reaper import lost_peer, timed_out

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# Exit code of a script that was stopped and has saved (`accelerate.checkpointing.EXIT_CODE`).
SAVED_EXIT_CODE = 75
_SAVED_HINT = " (it was stopped and has saved: start it again)"

_LIKELY_CAUSES: dict[int, str] = {
    signal.SIGKILL: " (by a person, or for want of memory)",
    signal.SIGABRT: (
        " (gloo does so when ranks take part with tensors of different sizes: --debug compares them first; NCCL's watchdog"
        " when a rank does not take part in time)"
    ),
}
# States of a process in /proc that another process must end: stopped by a signal, or by a debugger.
HALTED_STATES = ("T", "t")


class ExitReport(NamedTuple):
    """How a machine's part of a launch has ended.

    Attributes:
        line: The line to print, or "".
        code: The launcher's exit code.
        lost_peer: Whether its ranks failed only because another was gone.
    """

    line: str
    code: int
    lost_peer: bool = False


def report_failures(
    failures: Mapping[int, ProcessFailure],
    exit_times: Mapping[int, int],
    terminating_since: int,
    exited: Mapping[int, int] | None = None,
    still_running: Mapping[int, tuple[int, str]] | None = None,
) -> ExitReport:
    """Reports ranks that have failed.

    Args:
        failures: The failures by rank, at least one.
        exit_times: Process id -> when it ended, in nanoseconds since the epoch.
        terminating_since: When the launcher began to terminate the ranks, in nanoseconds; 0 if it has not.
        exited: Ranks that had exited with code 0 by then: rank -> process id.
        still_running: Ranks that were running by then: rank -> process id and state (`reaper.process_state`).
    """

    def blame_key(failure: ProcessFailure) -> tuple[bool, bool, bool, int]:
        """Sorts causes before symptoms, timeouts before the lost connections that they lead to, then by time."""
        moment, why = _failure_time(failure, exit_times), read_error_file(failure.error_file)
        return moment > terminating_since > 0, is_symptom(why), lost_peer(why), moment

    rank, failure = min(failures.items(), key=lambda item: blame_key(item[1]))
    why = read_error_file(failure.error_file)
    how, code = _describe_exit(failure.exitcode), failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    # It wrote its error file, and the launcher's signal came before it had exited.
    terminated = -failure.exitcode in (signal.SIGTERM, signal.SIGKILL)
    if why and terminated and exit_times.get(failure.pid, 0) > terminating_since > 0:
        how, code = "failed", 1
    line = f"rank {rank} (pid {failure.pid}) {how}{f': {why}' if why else ''}"
    # NCCL's watchdog aborts the process, and writes the reason to stderr only.
    aborted = failure.exitcode == -signal.SIGABRT and not why
    if is_symptom(why) or aborted:
        cause = _describe_absent_ranks(exited or {}, still_running or {}, only_certain=not timed_out(why))
        line = f"{cause}; {line}" if cause else line
    return ExitReport(line, code, lost_peer(why))


def is_symptom(why: str) -> bool:
    """Returns whether a rank's error is the effect of a peer that is gone, or that did not take part."""
    return lost_peer(why) or timed_out(why)


def _describe_absent_ranks(
    exited: Mapping[int, int], still_running: Mapping[int, tuple[int, str]], only_certain: bool
) -> str:
    """Describes the ranks for which others waited, or returns "".

    Args:
        exited: As for `report_failures`.
        still_running: As for `report_failures`.
        only_certain: Leave out ranks that were running, since others may not have waited for them.
    """
    stopped = {rank: pid for rank, (pid, state) in still_running.items() if state in HALTED_STATES}
    if stopped:
        return f"{_format_ranks(stopped)} {'is' if len(stopped) == 1 else 'are'} stopped (SIGSTOP)"
    if exited:
        return f"{_format_ranks(exited)} left early with code 0"
    if not still_running or only_certain:
        return ""
    running = _format_ranks({rank: pid for rank, (pid, _) in still_running.items()})
    if len(still_running) == 1:
        return f"{running} did not take part: it was still running"
    return f"one of {running} did not take part: they were still running"


def _format_ranks(ranks: Mapping[int, int]) -> str:
    return ", ".join(f"rank {rank} (pid {pid})" for rank, pid in sorted(ranks.items()))


def report_signal(number: signal.Signals, codes: Sequence[int | None] = (), too_late: bool = False) -> ExitReport:
    """Reports the end of a launcher that received a signal.

    Args:
        number: The signal.
        codes: Exit codes of the ranks.
        too_late: Whether all ranks had ended before the signal could reach them.
    """
    if SAVED_EXIT_CODE in codes and all(code in (0, SAVED_EXIT_CODE) for code in codes):
        return ExitReport(f"stopped by {number.name}; all ranks have saved: start it again", SAVED_EXIT_CODE)
    if codes and all(code == 0 for code in codes):
        after = f"all ranks ended with code 0 after {number.name}"
        return ExitReport(f"{number.name} came too late: all ranks had ended well" if too_late else after, 0)
    return ExitReport("interrupted" if number == signal.SIGINT else f"stopped by {number.name}", 128 + int(number))


def read_error_file(error_file: str) -> str:
    """Returns the first line of the error that a rank recorded, or ""."""
    try:
        found = json.loads(Path(error_file).read_text())["message"]
    except (OSError, ValueError, KeyError, TypeError):  # the rank did not get as far, or another program wrote it
        return ""
    text = str(found["message"] if isinstance(found, dict) and "message" in found else found).strip()
    first = text.splitlines()[0] if text else ""
    return first[:400]


def _failure_time(failure: ProcessFailure, exit_times: Mapping[int, int]) -> int:
    """Returns when a rank failed, in nanoseconds since the epoch: it writes its error before its peers can lose it.

    Integers throughout: a float holds today's times to 256 ns only.
    """
    rounded_up = failure.timestamp + 1  # from whole seconds, rounded down
    moments = [exit_times.get(failure.pid, rounded_up * 10**9)]
    if os.path.isfile(failure.error_file):
        moments.append(os.stat(failure.error_file).st_mtime_ns)
    return min(moments)


def _describe_exit(exitcode: int) -> str:
    if exitcode >= 0:
        return f"exited with code {exitcode}{_SAVED_HINT if exitcode == SAVED_EXIT_CODE else ''}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    return f"was killed by {name}{_LIKELY_CAUSES.get(-exitcode, '')}"
