"""Puts the bugs of `mutants.txt` into a copy of the tree, one at a time, and runs the tests that should notice each.

`make mutants` runs all of them, `make mutants ONLY=ddp` those whose names contain a word. The checkout itself is never
changed. The exit code is 1 if fewer than 95 % of the mutants are killed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("mutants.txt")
PACKAGE = "src/accelerate"
WANTED = 0.95
_WITHOUT = 3600.0
"""How many seconds all tests may take that are named, before there is a mutant."""
_IMPORTED = ("pytest", "hypothesis", "xdist.plugin", "torch.distributed.fsdp", "torch.testing", "safetensors.torch")
"""Imported once: the processes that run tests are forked, since most of a test's time would be these imports."""
_LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", "site", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes:
        name: Unique; describes the bug.
        file: The path below `PACKAGE`.
        old: Text that occurs in the file exactly once.
        new: Text to put in its place.
        tests: Paths below ``tests``, or other arguments of pytest such as ``file.py::test``.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, text: str) -> str:
        """Returns the text of the file with the bug in it.

        Raises:
            ValueError: if `old` does not occur exactly once.
        """
        found = text.count(self.old)
        if found != 1:
            raise ValueError(f"mutant {self.name!r}: its old text occurs {found} times in {self.file}, expected once")
        return text.replace(self.old, self.new)


def read(path: Path = LIST) -> list[Mutant]:
    """Reads a list of mutants; the format is described at the top of `mutants.txt`.

    Raises:
        ValueError: for a block that is not in that format, or a name that is there twice.
    """
    mutants: list[Mutant] = []
    for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        lines = [line for line in block.strip("\n").split("\n") if line and not line.startswith("#")]
        if not lines:
            continue
        name, *where = lines[:2]
        file, _, tests = "".join(where).partition(" <- ")
        old = [line[2:] for line in lines[2:] if line.startswith("- ")]
        new = [line[2:] for line in lines[2:] if line.startswith("+ ")]
        if not old or not tests.split() or len(old) + len(new) != len(lines) - 2:
            raise ValueError(
                f"{path}: expected a name, 'FILE <- TESTS', lines of '- ' and lines of '+ '; found\n{block}"
            )
        if any(mutant.name == name for mutant in mutants):
            raise ValueError(f"{path}: two mutants are called {name!r}")
        mutants.append(Mutant(name, file.strip(), "\n".join(old), "\n".join(new), tuple(tests.split())))
    return mutants


@dataclass(frozen=True)
class Outcome:
    """How the tests of a mutant ended.

    Attributes:
        verdict: ``killed``, ``survived``, or ``error`` if no test ran.
        by: The test that failed, or the reason.
        seconds: How long it took.
    """

    verdict: str
    by: str
    seconds: float


def copy_of_tree(folder: Path) -> Path:
    """Copies the checkout to a folder below `folder`, with compiled modules that Python validates by their content."""
    copy = folder / "tree"
    shutil.copytree(ROOT, copy, ignore=_LEFT_OUT, symlinks=True)
    compile_all = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "src", "tests"]
    subprocess.run(compile_all, cwd=copy, check=True)
    return copy


def run(mutant: Mutant, copy: Path, seconds: float, tests: Sequence[str] = ()) -> Outcome:
    """Puts a mutant into a copy of the tree, runs its tests (or `tests`), and takes it out again."""
    file = copy / PACKAGE / mutant.file
    text = file.read_text(encoding="utf-8")
    file.write_text(mutant.applied(text), encoding="utf-8")
    try:
        return _tested(copy, tests or mutant.tests, seconds)
    finally:
        file.write_text(text, encoding="utf-8")


def _tested(copy: Path, tests: Sequence[str], seconds: float) -> Outcome:
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            _run_pytest(copy, [f"tests/{path}" for path in tests], output.fileno())
        try:
            code = _exit_code(child, began + seconds)
        finally:  # what it has started stays otherwise
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        took = time.monotonic() - began
        output.seek(0)
        lines = output.read().splitlines()
    if code is None:
        return Outcome("killed", f"no end after {seconds:g} s", took)
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    if code == 0:
        return Outcome("survived", lines[-1] if lines else "", took)
    if code in (1, 2) and failed:
        return Outcome("killed", failed[0].split(" - ")[0].split(" ", 1)[1], took)
    return Outcome("error", f"pytest ended with {code}: {' | '.join(lines[-3:])}", took)


def _run_pytest(copy: Path, tests: Sequence[str], output: int) -> NoReturn:
    """Runs tests of a copy in a forked process, and ends it."""
    code = 3
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(copy)
        os.environ.update(PYTHONPATH=str(copy / "src"), PYTHONDONTWRITEBYTECODE="1")
        sys.dont_write_bytecode = True
        sys.path[:0] = [str(copy), str(copy / "src")]
        import pytest

        code = int(pytest.main(["-x", "-q", "-rfE", "-p", "no:cacheprovider", "--tb=no", *tests]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def _exit_code(child: int, deadline: float) -> int | None:
    """Returns how a child ended; None if it has not by the deadline."""
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the mutants that the command line selects; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutants whose name or file contains one of these")
    parser.add_argument("--tests", nargs="+", default=[], help="run these below tests/ instead of each mutant's own")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a mutant counts as killed")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    mutants = [
        mutant for mutant in read() if not options.words or any(w in mutant.name + mutant.file for w in options.words)
    ]
    for mutant in mutants:
        mutant.applied((ROOT / PACKAGE / mutant.file).read_text(encoding="utf-8"))
    outcomes: list[Outcome] = []
    for name in _IMPORTED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = copy_of_tree(Path(folder))
        tests = dict.fromkeys(test for mutant in mutants for test in options.tests or mutant.tests)
        whole = [test for test in tests if "::" not in test or test.partition("::")[0] not in tests]
        before = _tested(copy, whole, _WITHOUT)
        print(f"{before.verdict:8} {before.seconds:5.0f} s  without any: {before.by}", flush=True)
        if before.verdict != "survived":  # it would kill every mutant
            return 1
        for mutant in mutants:
            outcome = run(mutant, copy, options.timeout, options.tests)
            outcomes.append(outcome)
            print(f"{outcome.verdict:8} {outcome.seconds:5.0f} s  {mutant.name}: {outcome.by}", flush=True)
    killed = sum(outcome.verdict == "killed" for outcome in outcomes)
    print(f"{killed} of {len(mutants)} killed; {sum(outcome.seconds for outcome in outcomes):.0f} s")
    return 0 if mutants and killed >= WANTED * len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
