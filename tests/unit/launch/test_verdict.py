"""Which rank is named when several have failed, and in which words."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from accelerate.launch import verdict

LOST = "RuntimeError: Read error: Connection closed by peer"


def failure(folder: Path, rank: int, code: int, error: str = "") -> ProcessFailure:
    file = folder / f"error{rank}.json"
    if error:
        file.write_text(json.dumps({"message": {"message": error, "extraInfo": {"timestamp": "0"}}}))
    return ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=code, error_file=str(file))


def test_the_first_to_fail_of_itself_is_named(tmp_path: Path) -> None:
    failures = {0: failure(tmp_path, 0, 1, LOST), 1: failure(tmp_path, 1, 3), 2: failure(tmp_path, 2, 4)}
    found = verdict.of_failures(failures, {100: 10, 101: 30, 102: 20}, 0, one_ended_well=False)
    assert found == verdict.Verdict("rank 2 (pid 102) exited with code 4", 4)


def test_a_rank_that_the_launcher_has_ended_is_not_to_blame(tmp_path: Path) -> None:
    failures = {0: failure(tmp_path, 0, -signal.SIGTERM), 1: failure(tmp_path, 1, -signal.SIGKILL)}
    found = verdict.of_failures(failures, {100: 60, 101: 40}, 50, one_ended_well=False)
    assert found.line.startswith("rank 1 (pid 101) was killed by SIGKILL (by a person") and found.code == 128 + 9


def test_a_peer_that_is_gone(tmp_path: Path) -> None:
    failures = {1: failure(tmp_path, 1, 1, LOST + "\nmore")}
    found = verdict.of_failures(failures, {}, 0, one_ended_well=True)
    assert found.lost_a_peer and found.line.endswith(f"{LOST} (another rank had ended before, with code 0)")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"other": 1}'])
def test_a_note_that_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "error").write_text(text)
    assert verdict.noted(str(tmp_path / "error")) == "" == verdict.noted(str(tmp_path / "none"))


def test_signals() -> None:
    assert verdict.of_signal(signal.SIGINT) == verdict.Verdict("interrupted", 130)
    assert verdict.of_signal(signal.SIGTERM) == verdict.Verdict("stopped by SIGTERM", 143)


def test_a_launcher_that_was_stopped_says_whether_ranks_had_saved() -> None:
    saved = verdict.Verdict("stopped by SIGTERM; all ranks have saved: start it again", 75)
    assert verdict.of_signal(signal.SIGTERM, [75, 75]) == verdict.of_signal(signal.SIGTERM, [0, 75]) == saved
    done = verdict.Verdict("SIGTERM came too late: all ranks had ended well", 0)
    assert verdict.of_signal(signal.SIGTERM, [0, 0]) == done
    for codes in ([75, -15], [75, None], [0, None], [1, 75], []):
        assert verdict.of_signal(signal.SIGTERM, codes) == verdict.Verdict("stopped by SIGTERM", 143)
