"""Kills a save with SIGKILL at chosen system calls (strace's injection) and loads what is left: `make crash`.

One process is set up and trained; for each point it forks a child that saves under strace and is killed, then another
that resumes as a new start would. The state found must be the one before or the one after, whole, and train on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

CALLS = ("openat", "write", "fsync", "rename", "unlink", "unlinkat", "mkdir", "rmdir")
MODES = ("numbered", "over", "notes", "background")


def main() -> None:
    """Runs the points and prints what came of them; exits with 1 if any left no whole state."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=200)
    chosen = parser.parse_args()
    outcome = crash(chosen.points)
    print(json.dumps(outcome))
    sys.exit(outcome["lost"] > 0)


def crash(points: int) -> dict[str, Any]:
    """Kills `points` saves, spread over the calls of each mode.

    Returns:
        How many were killed, how many left the old and the new state, and how many were lost.
    """
    tally: Counter[str] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch))
        share = -(-points // len(MODES))
        for mode in MODES:
            every = [(call, number) for call, most in bench.calls_of(mode).items() for number in range(1, most + 1)]
            for place in range(min(share, points - tally["points"])):
                call, number = every[place * len(every) // share]
                tally["points"] += 1
                tally[bench.try_point(mode, call, number)] += 1
    return {
        "points": tally["points"],
        "killed": tally["old"] + tally["new"] + tally["lost"],
        "old": tally["old"],
        "new": tally["new"],
        "not reached": tally["not reached"],
        "lost": tally["lost"],
        "seconds": round(time.monotonic() - began),
    }


class Bench:
    """A trained run that children are forked from, and the folder they save to."""

    def __init__(self, scratch: Path) -> None:
        from tests.helpers.resuming import Recipe, Training

        self.scratch = scratch
        self.project = scratch / "project"
        self.run = Training.start(Recipe(str(self.project), limit=1)).train(3)
        self.accelerator = self.run.accelerator
        self.mine = self.project / "mine"
        self.old = self.run.weights()
        self.accelerator.save_state()
        self.accelerator.save_state(self.mine)
        self.run.train(2)
        self.new = self.run.weights()
        shutil.copytree(self.project, scratch / "pristine")

    def _reset(self, mode: str) -> None:
        shutil.rmtree(self.project)
        shutil.copytree(self.scratch / "pristine", self.project)
        if mode == "notes":
            (self.mine / "notes.txt").write_text("mine")

    def _save(self, mode: str) -> int:
        target = None if mode in ("numbered", "background") else self.mine
        self.accelerator.save_state(target, asynchronous=mode == "background")
        self.accelerator.wait_for_checkpoint()
        return 0

    def _forked(self, work: Any, *strace: str) -> int:
        """Runs `work` in a child, traced from its first step on; gives the child's status."""
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(write)
            os.read(read, 1)
            try:
                os._exit(work())
            except BaseException as error:  # the child must not go on as the parent
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                os._exit(99)
        os.close(read)
        tracer = None
        if strace:
            tracer = subprocess.Popen(
                ["strace", "-f", "-p", str(child), *strace],
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
            assert tracer.stderr is not None
            line = tracer.stderr.readline()
            assert "attached" in line, line
        os.write(write, b"x")
        os.close(write)
        status = os.waitpid(child, 0)[1]
        if tracer is not None:
            tracer.communicate()
        return status

    def calls_of(self, mode: str) -> dict[str, int]:
        """How often one thread makes each call in a save, at most."""
        self._reset(mode)
        log = self.scratch / "trace"
        self._forked(lambda: self._save(mode), "-o", str(log), "-e", f"trace={','.join(CALLS)}")
        counts: Counter[tuple[str, str]] = Counter()
        for line in log.read_text().splitlines():
            thread, _, rest = line.partition(" ")
            call = rest.strip().split("(")[0]
            if call in CALLS:
                counts[thread, call] += 1
        return {call: max((n for (_, name), n in counts.items() if name == call), default=0) for call in CALLS}

    def try_point(self, mode: str, call: str, number: int) -> str:
        """Kills a save before its `number`-th `call`; says which state a new start finds."""
        self._reset(mode)
        inject = ("-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}")
        status = self._forked(lambda: self._save(mode), *inject)
        if not os.WIFSIGNALED(status):
            return "not reached"
        found = os.waitstatus_to_exitcode(self._forked(lambda: self._look(mode)))
        outcome = {1: "old", 2: "new"}.get(found, "lost")
        if outcome == "lost":
            print(f"LOST: {mode}, {call} {number}: {sorted(str(p) for p in self.project.rglob('*'))}", file=sys.stderr)
        return outcome

    def _look(self, mode: str) -> int:
        import torch

        with torch.no_grad():
            for parameter in self.run.model.parameters():
                parameter.zero_()
        numbered = mode in ("numbered", "background")
        report = self.accelerator.resume() if numbered else self.accelerator.load_state(self.mine)
        if report is None or report.problems:
            return 3
        weights = self.run.weights()
        self.run.train(1)
        self.accelerator.save_state()
        if mode == "notes" and (self.mine / "notes.txt").read_text() != "mine":
            return 4
        return 1 if torch.equal(weights, self.old) else 2 if torch.equal(weights, self.new) else 5


if __name__ == "__main__":
    main()
