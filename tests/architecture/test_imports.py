"""Who may import whom, and what an import may cost."""

from __future__ import annotations

import ast
import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture import rules

CONTRACTS = rules.ROOT / "importlinter.ini"
SOURCES = rules.sources()
BACKENDS = {
    Path(path).stem for path, tree in SOURCES.items() if path.startswith("strategies/") and rules.strategy_classes(tree)
}


def lint_imports(where: Path, first_on_path: Path) -> subprocess.CompletedProcess[str]:
    """Runs import-linter on the package that a process would import with this folder first on its path."""
    program = "from importlinter.cli import lint_imports as lint\n"
    program += "raise SystemExit(lint(config_filename='importlinter.ini', no_cache=True))"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=where,
        env={**os.environ, "PYTHONPATH": str(first_on_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def needs_import_linter() -> None:
    pytest.importorskip(
        "importlinter", reason="the import contracts need import-linter: pip install 'accelerate[test]'"
    )


def test_contracts_hold() -> None:
    needs_import_linter()
    done = lint_imports(rules.ROOT, rules.ROOT / "src")
    assert done.returncode == 0, done.stdout + done.stderr


def test_contracts_can_fail(tmp_path: Path) -> None:
    needs_import_linter()
    package = tmp_path / "accelerate"
    (package / "strategies").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "strategies" / "__init__.py").touch()
    for backend in BACKENDS:
        (package / "strategies" / f"{backend}.py").touch()
    (package / "state.py").touch()
    (package / "settings.py").write_text("def late():\n    from accelerate import state\n")
    (tmp_path / "importlinter.ini").write_text(CONTRACTS.read_text())
    done = lint_imports(tmp_path, tmp_path)
    assert done.returncode != 0
    assert "accelerate.settings is not allowed to import accelerate.state" in done.stdout


def contracts() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(CONTRACTS)
    return parser


def test_the_list_of_backends_is_the_folder() -> None:
    listed = contracts()["importlinter:contract:backends"]["modules"].split()
    named = {line.removeprefix("accelerate.strategies.") for line in listed if not line.startswith("#")}
    assert named == BACKENDS


def test_strategies_never_import_each_other() -> None:
    for backend in BACKENDS:
        found = rules.imported_siblings(SOURCES[f"strategies/{backend}.py"], BACKENDS - {backend})
        assert not found, f"strategies/{backend}.py imports another strategy: {found}"


@pytest.mark.parametrize(
    "text",
    [
        "from .ddp import X",
        "from . import ddp",
        "import accelerate.strategies.ddp",
        "from accelerate.strategies import ddp",
    ],
)
def test_a_strategy_that_imports_another_is_caught(text: str) -> None:
    assert rules.imported_siblings(ast.parse(text), {"ddp"})


def test_every_layer_is_listed() -> None:
    listed = contracts()["importlinter:contract:layers"]["layers"]
    top = {Path(path).parts[0].removesuffix(".py") for path in SOURCES} - {"__init__", "__main__"}
    missing = sorted(name for name in top if f"({name})" not in listed)
    assert not missing, f"in no layer of importlinter.ini: {missing}"


def modules_below(*tops: str) -> list[str]:
    found = []
    for path in SOURCES:
        parts = [part for part in path.removesuffix(".py").split("/") if part != "__init__"]
        if parts and parts[0] in tops:
            found.append(".".join(["accelerate", *parts]))
    return found


def imported_with(modules: list[str]) -> dict[str, list[str]]:
    """Imports the modules one after the other in a fresh process; says after which of them torch or numpy was there."""
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    print(name, *sorted({'torch', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}


TORCH_FREE = [
    "accelerate",
    *modules_below("settings", "launch"),
    "accelerate.runtime.system.availability",
    "accelerate.runtime.devices",
    "accelerate.commands.accelerate_cli",
]


def test_importing_costs_nothing_until_used() -> None:
    heavy = {name: extra for name, extra in imported_with(TORCH_FREE).items() if extra}
    assert not heavy, f"torch or numpy was imported by (the first of) {heavy}"


def test_a_heavy_import_is_noticed() -> None:
    pytest.importorskip("torch", reason="torch is what must be noticed")
    assert imported_with(["json", "torch"]) == {"json": [], "torch": ["numpy", "torch"]}
