"""The list of mutants (tools/mutants.txt) does not rot: each still applies to its file, and its tests exist."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.architecture.rules import ROOT


def load_runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tools" / "mutants.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["mutants"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutants = load_runner()


def test_every_mutant_applies() -> None:
    found = mutants.read()
    assert len(found) >= 100
    for mutant in found:
        text = (ROOT / mutants.PACKAGE / mutant.file).read_text(encoding="utf-8")
        ast.parse(mutant.applied(text), mutant.name)
        for test in mutant.tests:
            path, _, name = test.partition("::")
            assert (ROOT / "tests" / path).exists(), f"{mutant.name}: no tests/{path}"
            assert f"def {name.partition('[')[0]}(" in (ROOT / "tests" / path).read_text() if name else True, (
                mutant.name
            )


def test_a_mutant_that_no_longer_applies_is_named() -> None:
    mutant = mutants.Mutant("gone", "state.py", "not in the file", "", ("unit/test_state.py",))
    for text in ("", "not in the file, not in the file"):
        with pytest.raises(ValueError, match=f"'gone'.*occurs {text.count(',') * 2} times in state.py"):
            mutant.applied(text)


@pytest.mark.parametrize(
    "text", ["name\nstate.py <- \n- a\n+ b", "name\nstate.py <- unit\n+ b", "name\nstate.py <- unit\n- a\nb"]
)
def test_a_list_in_another_format_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "mutants.txt").write_text(text)
    with pytest.raises(ValueError, match="expected a name"):
        mutants.read(tmp_path / "mutants.txt")
    (tmp_path / "mutants.txt").write_text("# first\n\none\na.py <- unit\n- a\n\none\na.py <- unit\n- b\n+ c\n")
    with pytest.raises(ValueError, match="two mutants are called 'one'"):
        mutants.read(tmp_path / "mutants.txt")


def test_a_bug_is_killed_or_survives(tmp_path: Path) -> None:
    """The runner, on a tree of one file and one test."""
    (tmp_path / "src" / "accelerate").mkdir(parents=True)
    package = tmp_path / "src" / "accelerate" / "__init__.py"
    package.write_text("answer = 42\nunused = 1\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_answer.py").write_text(
        "import accelerate\ndef test_it(): assert accelerate.answer == 42\n"
    )
    (tmp_path / "tools").mkdir()
    runner = (ROOT / "tools" / "mutants.py").read_text(encoding="utf-8")
    (tmp_path / "tools" / "mutants.py").write_text(runner.replace("importlib.import_module(name)", "pass"))
    where = "__init__.py <- test_answer.py"
    (tmp_path / "tools" / "mutants.txt").write_text(
        f"first\n{where}\n- 42\n+ 41\n\nsecond\n{where}\n- unused = 1\n+ unused = 2\n"
    )
    command = [sys.executable, str(tmp_path / "tools" / "mutants.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    without, first, second, total = done.stdout.splitlines()
    assert without.startswith("survived") and "without any: 1 passed" in without
    assert done.returncode == 1 and total.startswith("1 of 2 killed")
    assert first.startswith("killed") and first.endswith("first: tests/test_answer.py::test_it")
    assert second.startswith("survived") and "second: 1 passed" in second
    assert package.read_text() == "answer = 42\nunused = 1\n"
    (tmp_path / "tests" / "test_answer.py").write_text("def test_it(): assert False\n")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (
        done.returncode == 1 and len(done.stdout.splitlines()) == 1 and "without any: tests/test_answer" in done.stdout
    )
