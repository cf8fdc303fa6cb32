"""Kills a save with SIGKILL at chosen system calls (strace's injection) and loads what is left: `make crash`.

For each point, processes are forked that save under strace and of which one (or all) is killed, then others that resume as
a new start would. The state found must be the one before or the one after, whole, and train on. With one rank, the
children inherit a run that was set up before; with two, they set themselves up, and meet over gloo.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CALLS = ("openat", "write", "pwrite64", "fsync", "rename", "unlink", "unlinkat", "mkdir", "rmdir")
ALONE = ("numbered", "over", "notes", "background")
TOGETHER = ("numbered", "over", "background")
INHERITED = (
    "tests.helpers.resuming",
    "accelerate.strategies.ddp",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torchdata.stateful_dataloader",
)
"""Imported before children are forked, so that they need not."""
LONGEST = 120.0
"""Seconds after which a save or a load is taken for one that hangs."""


def main() -> None:
    """Runs the points and prints what came of them; exits with 1 if any left no whole state."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--sharded", action="store_true", help="two ranks, each with its shards (FSDP 2)")
    chosen = parser.parse_args()
    outcome = crash(chosen.points, 2 if chosen.sharded else chosen.ranks, chosen.sharded)
    print(json.dumps(outcome))
    sys.exit(outcome["lost"] > 0)


def crash(points: int, ranks: int = 1, sharded: bool = False) -> dict[str, Any]:
    """Kills `points` saves, spread over the calls of each mode and, of several ranks, each of them and all.

    Returns:
        How many were killed, how many left the old and the new state, and how many were lost.
    """
    import torch

    torch.set_num_threads(1)  # forked processes do not have the threads of torch's pool
    tally: Counter[str] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        bench: Bench | Pair = Bench(Path(scratch)) if ranks == 1 else Pair(Path(scratch), sharded)
        kinds = [(mode, who) for mode in bench.modes for who in bench.victims]
        share = -(-points // len(kinds))
        for mode, who in kinds[: -(-points // share)]:
            every = [
                (call, number) for call, most in bench.calls_of(mode, who).items() for number in range(1, most + 1)
            ]
            for place in range(min(share, points - tally["points"])):
                call, number = every[place * len(every) // share]
                tally["points"] += 1
                tally[bench.try_point(mode, who, call, number)] += 1
    return {
        "ranks": ranks,
        "sharded": sharded,
        "points": tally["points"],
        "killed": tally["old"] + tally["new"] + tally["lost"],
        "old": tally["old"],
        "new": tally["new"],
        "not reached": tally["not reached"],
        "lost": tally["lost"],
        "seconds": round(time.monotonic() - began),
    }


# Children ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Child:
    """What a forked process does.

    Attributes:
        prepare: Its first part, outside of strace.
        act: Its second part, given what the first returned; returns the exit code.
        strace: Options to trace the second part with; none: it is not traced.
    """

    act: Callable[[Any], int]
    prepare: Callable[[], Any] = lambda: None
    strace: Sequence[str] = ()


def forked(children: Sequence[Child], fall_together: bool = False) -> list[int]:
    """Runs children beside each other; gives their exit codes, negative where a signal ended them.

    Args:
        children: What they do.
        fall_together: When one is killed, the others are too, as a launcher does it.

    Raises:
        TimeoutError: when one hangs.
    """
    started = [_start(child) for child in children]
    tracers = []
    for (process, ready, _), child in zip(started, children, strict=True):
        os.read(ready, 1)  # b"" if it failed: its exit code will tell
        if child.strace:
            tracers.append(_attached(process, child.strace))
    for _, ready, go in started:
        os.close(ready)
        os.write(go, b"x")
        os.close(go)
    codes = _wait([process for process, _, _ in started], fall_together)
    for tracer in tracers:
        tracer.communicate()
    return codes


def _start(child: Child) -> tuple[int, int, int]:
    is_ready, ready = os.pipe()
    may_go, go = os.pipe()
    process = os.fork()
    if process:
        os.close(ready)
        os.close(may_go)
        return process, is_ready, go
    code = 99
    try:
        os.close(go)
        context = child.prepare()
        os.write(ready, b"x")
        os.read(may_go, 1)
        code = child.act(context)
    except BaseException as error:  # the child must not go on as the parent
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    os._exit(code)


def _attached(process: int, options: Sequence[str]) -> subprocess.Popen[str]:
    command = ["strace", "-f", "-p", str(process), *options]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert tracer.stderr is not None
    line = tracer.stderr.readline()
    assert "attached" in line, line
    return tracer


def _wait(processes: Sequence[int], fall_together: bool) -> list[int]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + LONGEST
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes and (status := os.waitpid(process, os.WNOHANG))[0]:
                codes[process] = os.waitstatus_to_exitcode(status[1])
        late = time.monotonic() > deadline
        if late or (fall_together and any(code < 0 for code in codes.values())):
            for process in processes:
                if process not in codes:
                    os.kill(process, signal.SIGKILL)
                    codes[process] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if late:
            raise TimeoutError(f"a child did not end within {LONGEST:.0f} s")
        time.sleep(0.005)
    return [codes[process] for process in processes]


def count_calls(log: Path) -> dict[str, int]:
    """How often one thread of a traced process made each call, at most."""
    counts: Counter[tuple[str, str]] = Counter()
    for line in log.read_text().splitlines():
        thread, _, rest = line.partition(" ")
        call = rest.strip().split("(")[0]
        if call in CALLS:
            counts[thread, call] += 1
    return {call: max((n for (_, name), n in counts.items() if name == call), default=0) for call in CALLS}


def listing(log: Path) -> tuple[str, ...]:
    """strace's options to record the calls."""
    return "-o", str(log), "-e", f"trace={','.join(CALLS)}"


def injection(call: str, number: int) -> tuple[str, ...]:
    """strace's options to kill a process before its `number`-th `call`."""
    return "-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"


class Ballast:
    """A registered object that is large enough to be written in stretches, by threads."""

    def state_dict(self) -> Any:
        import torch

        return {"held": torch.ones(5 * 2**20)}

    def load_state_dict(self, state: Any) -> None:
        """There is nothing to take up."""


class Folders:
    """The project's folder, and a copy of what it held before the save.

    Attributes:
        scratch: Where both are.
        project: The project.
        mine: A checkpoint in it with a name of the user's.
    """

    modes: tuple[str, ...]
    victims: tuple[str, ...]

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.project = scratch / "project"
        self.mine = self.project / "mine"

    def keep(self) -> None:
        """Makes the copy."""
        shutil.copytree(self.project, self.scratch / "pristine")

    def reset(self, mode: str) -> None:
        """Brings the project back to what it was."""
        shutil.rmtree(self.project)
        shutil.copytree(self.scratch / "pristine", self.project)
        if mode == "notes":
            (self.mine / "notes.txt").write_text("mine")

    def save(self, accelerator: Any, mode: str) -> int:
        """Saves as `mode` says."""
        target = None if mode in ("numbered", "background") else self.mine
        accelerator.save_state(target, asynchronous=mode == "background")
        accelerator.wait_for_checkpoint()
        return 0

    def look(self, run: Any, mode: str, old: Any, new: Any) -> int:
        """Resumes and trains on; 1: the state was the old one, 2: the new one."""
        import torch

        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.zero_()
        numbered = mode in ("numbered", "background")
        report = run.accelerator.resume() if numbered else run.accelerator.load_state(self.mine)
        if report is None or report.problems:
            return 3
        weights = run.weights()
        run.train(1)
        run.accelerator.save_state(None if numbered else self.mine)
        if mode == "notes" and (self.mine / "notes.txt").read_text() != "mine":
            return 4
        return 1 if torch.equal(weights, old) else 2 if torch.equal(weights, new) else 5

    def judged(self, codes: Sequence[int], where: str) -> str:
        """What the exit codes of those that looked say."""
        outcome = {1: "old", 2: "new"}.get(codes[0], "lost") if len(set(codes)) == 1 else "lost"
        if outcome == "lost":
            left = sorted(str(path.relative_to(self.project)) for path in self.project.rglob("*"))
            print(f"LOST: {where}: {list(codes)}, {left}", file=sys.stderr)
        return outcome


# One rank ---------------------------------------------------------------------------------------------------------------


class Bench(Folders):
    """A trained run that children are forked from."""

    modes = ALONE
    victims = ("it",)

    def __init__(self, scratch: Path) -> None:
        from tests.helpers.resuming import Recipe, Training

        super().__init__(scratch)
        self.run = Training.start(Recipe(str(self.project), limit=1)).train(3)
        self.accelerator = self.run.accelerator
        self.accelerator.register_for_checkpointing(Ballast())
        self.old = self.run.weights()
        self.accelerator.save_state()
        self.accelerator.save_state(self.mine)
        self.run.train(2)
        self.new = self.run.weights()
        self.keep()

    def calls_of(self, mode: str, who: str) -> dict[str, int]:
        """How often one thread makes each call in a save, at most."""
        self.reset(mode)
        log = self.scratch / "trace"
        forked([Child(lambda _: self.save(self.accelerator, mode), strace=listing(log))])
        return count_calls(log)

    def try_point(self, mode: str, who: str, call: str, number: int) -> str:
        """Kills a save before its `number`-th `call`; says which state a new start finds."""
        self.reset(mode)
        (code,) = forked([Child(lambda _: self.save(self.accelerator, mode), strace=injection(call, number))])
        if code >= 0:
            return "not reached"
        codes = forked([Child(lambda _: self.look(self.run, mode, self.old, self.new))])
        return self.judged(codes, f"{mode}, {call} {number}")


# Two ranks --------------------------------------------------------------------------------------------------------------


class Pair(Folders):
    """Runs of two ranks, each set up anew."""

    modes = TOGETHER
    victims = ("rank 0", "rank 1", "both")

    def __init__(self, scratch: Path, sharded: bool) -> None:
        import torch

        self.sharded = sharded
        for module in INHERITED:
            importlib.import_module(module)
        assert threading.active_count() == 1
        super().__init__(scratch)

        def first(run: Any) -> int:
            run.train(3)
            run.accelerator.save_state()
            run.accelerator.save_state(self.mine)
            if run.accelerator.is_main_process:
                self.keep()
            return note("old", run)

        def note(name: str, run: Any) -> int:
            weights = run.weights()
            if run.accelerator.is_main_process:
                torch.save(weights, scratch / name)
            return 0

        assert forked(self._ranks(first)) == [0, 0]
        assert forked(self._ranks(lambda run: note("new", run), resumed=True)) == [0, 0]
        self.old, self.new = (torch.load(scratch / name, weights_only=True) for name in ("old", "new"))

    def _ranks(
        self, act: Callable[[Any], int], resumed: bool = False, straces: Sequence[Sequence[str]] = ((), ())
    ) -> list[Child]:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]

        def prepare(rank: int) -> Any:
            from tests.helpers.resuming import Recipe, Training

            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
            run = Training.start(Recipe(str(self.project), limit=1, sharded=self.sharded))
            run.accelerator.register_for_checkpointing(Ballast())
            if resumed:
                run.accelerator.resume()
                run.train(2)
            return run

        # The names are bound here, since both ranks' functions are made in one loop.
        return [
            Child(act, lambda rank=rank: prepare(rank), strace)  # type: ignore[misc]
            for rank, strace in enumerate(straces)
        ]

    def _save(self, run: Any, mode: str) -> int:
        from accelerate.checkpointing import SaveError

        try:
            return self.save(run.accelerator, mode)
        except SaveError:  # what the rank that was not killed has to be told
            return 10

    def calls_of(self, mode: str, who: str) -> dict[str, int]:
        """How often one thread of the victim makes each call in a save, at most."""
        self.reset(mode)
        log = self.scratch / "trace"
        straces = [(), listing(log)] if who == "rank 1" else [listing(log), ()]
        forked(self._ranks(lambda run: self._save(run, mode), True, straces))
        return count_calls(log)

    def try_point(self, mode: str, who: str, call: str, number: int) -> str:
        """Kills a rank (or all, when rank 0 gets there) before its `number`-th `call`, and says the same."""
        self.reset(mode)
        kill = injection(call, number)
        straces = [(), kill] if who == "rank 1" else [kill, ()]
        codes = forked(self._ranks(lambda run: self._save(run, mode), True, straces), fall_together=who == "both")
        if all(code >= 0 for code in codes):
            return "not reached"
        where = f"{mode}, {who}, {call} {number}"
        if not all(code in (0, 10) or code < 0 for code in codes):
            return self.judged(codes, where)
        return self.judged(forked(self._ranks(lambda run: self.look(run, mode, self.old, self.new))), where)


if __name__ == "__main__":
    main()
