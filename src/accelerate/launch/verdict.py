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

from .guard import lost_a_peer

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# What a script exits with when it has saved because it was asked to stop (`accelerate.checkpointing.EXIT_CODE`).
STOPPED = 75
_SAVED = " (it was asked to stop and has saved: start it again)"

_LIKELY: dict[int, str] = {
    signal.SIGKILL: " (by a person, or for want of memory)",
    signal.SIGABRT: " (gloo does so when ranks take part with tensors of different sizes: --debug compares them first)",
}


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
    failures: Mapping[int, ProcessFailure], deaths: Mapping[int, int], ending_since: int, one_ended_well: bool
) -> Verdict:
    """The verdict on ranks that have failed.

    Args:
        failures: The failures by rank, at least one.
        deaths: When processes ended: process id -> nanoseconds since the epoch.
        ending_since: When the launcher began to end the ranks, in nanoseconds; 0 when it has not.
        one_ended_well: Whether a rank had left with code 0 before.
    """

    def guilt(failure: ProcessFailure) -> tuple[bool, bool, float]:
        """Sorts the rank that failed first, and of itself, before the others."""
        moment = _moment(failure, deaths)
        ended_by_us = moment > ending_since > 0 and -failure.exitcode in (signal.SIGTERM, signal.SIGKILL)
        return ended_by_us, lost_a_peer(noted(failure.error_file)), moment

    rank, failure = min(failures.items(), key=lambda item: guilt(item[1]))
    why = noted(failure.error_file)
    line = f"rank {rank} (pid {failure.pid}) {_how(failure.exitcode)}{f': {why}' if why else ''}"
    lost = lost_a_peer(why)
    if lost and one_ended_well:
        line += " (another rank had ended before, with code 0)"
    return Verdict(line, failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode, lost)


def of_signal(number: signal.Signals, codes: Sequence[int | None] = ()) -> Verdict:
    """The verdict when the launcher was told to end.

    Args:
        number: The signal.
        codes: The ranks' exit codes.
    """
    if STOPPED in codes and all(code in (0, STOPPED) for code in codes):
        return Verdict(f"stopped by {number.name}; all ranks have saved: start it again", STOPPED)
    if codes and all(code == 0 for code in codes):  # they were through before it reached them
        return Verdict(f"{number.name} came too late: all ranks had ended well", 0)
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


def _moment(failure: ProcessFailure, deaths: Mapping[int, int]) -> float:
    """When a rank failed, in nanoseconds: it notes its error before its peers can see it go."""
    moments = [failure.timestamp * 1e9 + 1e9]  # whole seconds, rounded down
    if failure.pid in deaths:
        moments = [float(deaths[failure.pid])]
    if os.path.isfile(failure.error_file):
        moments.append(float(os.stat(failure.error_file).st_mtime_ns))
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
