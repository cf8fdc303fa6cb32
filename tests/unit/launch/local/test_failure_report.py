"""Which rank is named when several have failed, and in which words."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from accelerate.launch.local import failure_report

LOST = "RuntimeError: Read error: Connection closed by peer"


def failure(folder: Path, rank: int, code: int, error: str = "") -> ProcessFailure:
    file = folder / f"error{rank}.json"
    if error:
        file.write_text(json.dumps({"message": {"message": error, "extraInfo": {"timestamp": "0"}}}))
    return ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=code, error_file=str(file))


def test_the_first_to_fail_of_itself_is_named(tmp_path: Path) -> None:
    failures = {0: failure(tmp_path, 0, 1, LOST), 1: failure(tmp_path, 1, 3), 2: failure(tmp_path, 2, 4)}
    found = failure_report.report_failures(failures, {100: 10, 101: 30, 102: 20}, 0)
    assert found == failure_report.ExitReport("rank 2 (pid 102) exited with code 4", 4)


def test_a_rank_that_the_launcher_has_ended_is_not_to_blame(tmp_path: Path) -> None:
    failures = {0: failure(tmp_path, 0, -signal.SIGTERM), 1: failure(tmp_path, 1, -signal.SIGKILL)}
    found = failure_report.report_failures(failures, {100: 60, 101: 40}, 50)
    assert found.line.startswith("rank 1 (pid 101) was killed by SIGKILL (by a person") and found.code == 128 + 9


def test_a_peer_that_is_gone(tmp_path: Path) -> None:
    failures = {1: failure(tmp_path, 1, 1, LOST + "\nmore")}
    found = failure_report.report_failures(failures, {}, 0, exited={0: 100})
    line = f"rank 0 (pid 100) left early with code 0; rank 1 (pid 101) exited with code 1: {LOST}"
    assert found == failure_report.ExitReport(line, 1, lost_peer=True)


TIMED_OUT = (
    "RuntimeError: [/gloo/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
    "RuntimeError: [/gloo/unbound_buffer.cc:129] Timed out waiting 3000ms for send operation to complete",
    "DistBackendError: [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, OpType=ALLREDUCE)",
    "RuntimeError: rank 0 of 2 waited 2 s for rank 1 to join and gave up. Check the output of those processes",
    "DistStoreError: wait timeout after 2000ms, keys: /accelerate/0/complete",
)


@pytest.mark.parametrize("error", TIMED_OUT)
@pytest.mark.parametrize(
    ("alive", "cause"),
    [
        ({1: (101, "T")}, "rank 1 (pid 101) is stopped (SIGSTOP)"),
        ({1: (101, "S"), 2: (102, "T"), 3: (103, "t")}, "rank 2 (pid 102), rank 3 (pid 103) are stopped (SIGSTOP)"),
        ({1: (101, "D")}, "rank 1 (pid 101) did not take part: it was still running"),
        (
            {1: (101, "S"), 2: (102, "R")},
            "one of rank 1 (pid 101), rank 2 (pid 102) did not take part: they were still running",
        ),
    ],
)
def test_ranks_that_did_not_take_part(
    error: str, alive: dict[int, tuple[int, str]], cause: str, tmp_path: Path
) -> None:
    failures = {0: failure(tmp_path, 0, 1, error)}
    failures |= {rank: failure(tmp_path, rank, -signal.SIGKILL) for rank in alive}
    found = failure_report.report_failures(
        failures, {100: 10} | {pid: 60 for pid, _ in alive.values()}, 50, still_running=alive
    )
    assert found.line == f"{cause}; rank 0 (pid 100) exited with code 1: {error}" and found.code == 1


def test_what_is_not_known_is_not_claimed(tmp_path: Path) -> None:
    of_its_own = {0: failure(tmp_path, 0, 1, "ValueError: x")}
    alive = {1: (101, "S")}
    found = failure_report.report_failures(of_its_own, {100: 10}, 50, still_running=alive)
    assert found.line == "rank 0 (pid 100) exited with code 1: ValueError: x"
    aborted = {0: failure(tmp_path, 5, -signal.SIGABRT)}
    assert failure_report.report_failures(aborted, {105: 10}, 50, still_running=alive).line.startswith(
        "rank 0 (pid 105) was killed"
    )
    stopped = failure_report.report_failures(aborted, {105: 10}, 50, still_running={1: (101, "T")})
    assert stopped.line.startswith("rank 1 (pid 101) is stopped (SIGSTOP); rank 0 (pid 105) was killed by SIGABRT")


def test_a_failure_of_its_own_comes_before_a_symptom_that_came_first(tmp_path: Path) -> None:
    failures = {0: failure(tmp_path, 0, 1, TIMED_OUT[0]), 1: failure(tmp_path, 1, 3)}
    found = failure_report.report_failures(failures, {100: 10, 101: 30}, 50, still_running={2: (102, "T")})
    assert found == failure_report.ExitReport("rank 1 (pid 101) exited with code 3", 3)


def test_one_that_timed_out_comes_before_those_that_have_lost_it(tmp_path: Path) -> None:
    failures = {0: failure(tmp_path, 0, 1, TIMED_OUT[0]), 1: failure(tmp_path, 1, 1, LOST)}
    found = failure_report.report_failures(failures, {100: 20, 101: 10}, 50, still_running={2: (102, "S")})
    assert found.line.startswith("rank 2 (pid 102) did not take part: it was still running; rank 0 (pid 100) exited")
    lost = failure_report.report_failures({1: failures[1]}, {101: 10}, 50, still_running={2: (102, "S")})
    assert lost.line.startswith("rank 1 (pid 101) exited")


@pytest.mark.parametrize("code", [-signal.SIGTERM, 7])
def test_what_the_launchers_signal_leads_to_is_no_cause(code: int, tmp_path: Path) -> None:
    failures = {0: failure(tmp_path, 0, 1, LOST), 1: failure(tmp_path, 1, code)}
    found = failure_report.report_failures(failures, {100: 10, 101: 60}, 50)
    assert found == failure_report.ExitReport(f"rank 0 (pid 100) exited with code 1: {LOST}", 1, lost_peer=True)


def test_a_rank_that_noted_its_error_and_was_ended_before_it_was_gone(tmp_path: Path) -> None:
    failures = {0: failure(tmp_path, 0, 1, LOST), 1: failure(tmp_path, 1, -signal.SIGTERM, "ValueError: x")}
    # As a float this moment is 1_800_000_000_000_000_256: after the launcher's signal.
    noted = 1_800_000_000_000_000_200
    os.utime(failures[0].error_file, ns=(noted - 400, noted - 400))
    os.utime(failures[1].error_file, ns=(noted, noted))
    found = failure_report.report_failures(failures, {100: noted + 10, 101: noted + 60}, noted + 50)
    assert found == failure_report.ExitReport("rank 1 (pid 101) failed: ValueError: x", 1)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"other": 1}'])
def test_a_note_that_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "error").write_text(text)
    assert (
        failure_report.read_error_file(str(tmp_path / "error"))
        == ""
        == failure_report.read_error_file(str(tmp_path / "none"))
    )


def test_signals() -> None:
    assert failure_report.report_signal(signal.SIGINT) == failure_report.ExitReport("interrupted", 130)
    assert failure_report.report_signal(signal.SIGTERM) == failure_report.ExitReport("stopped by SIGTERM", 143)


def test_a_launcher_that_was_stopped_says_whether_ranks_had_saved() -> None:
    saved = failure_report.ExitReport("stopped by SIGTERM; all ranks have saved: start it again", 75)
    assert (
        failure_report.report_signal(signal.SIGTERM, [75, 75])
        == failure_report.report_signal(signal.SIGTERM, [0, 75])
        == saved
    )
    done = failure_report.ExitReport("SIGTERM came too late: all ranks had ended well", 0)
    assert failure_report.report_signal(signal.SIGTERM, [0, 0], too_late=True) == done
    after = failure_report.ExitReport("all ranks ended with code 0 after SIGTERM", 0)
    assert failure_report.report_signal(signal.SIGTERM, [0, 0], too_late=False) == after
    for codes in ([75, -15], [75, None], [0, None], [1, 75], []):
        assert failure_report.report_signal(signal.SIGTERM, codes) == failure_report.ExitReport(
            "stopped by SIGTERM", 143
        )
