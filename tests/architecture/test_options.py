"""Compares the table of options with the package: `tests/data/options.json` names a test that fails if an option is ignored.

An option that no test can notice, or none does yet, stands there under its reason. `python tools/ignored_options.py` checks
that the tests notice: it runs each with its option left out.
"""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Iterator
from typing import Any

from tests.architecture import options, rules
from tests.architecture.test_contract import CONTRACT, PARSERS, resolve

TABLE = json.loads((rules.ROOT / "tests" / "data" / "options.json").read_text(encoding="utf-8"))
TESTS: dict[str, dict[str, str]] = TABLE["tests"]
REASONS: dict[str, list[str]] = TABLE["reasons"]

# Documented names that contract_names.json holds as their modules only.
FURTHER = (
    "accelerate.big_modeling.attach_layerwise_casting_hooks",
    "accelerate.data_loader.SeedableRandomSampler",
    "accelerate.data_loader.SkipBatchSampler",
    "accelerate.data_loader.SkipDataLoader",
    "accelerate.hooks.LayerwiseCastingHook",
    "accelerate.hooks.UserCpuOffloadHook",
    "accelerate.local_sgd.LocalSGD",
    "accelerate.logging.MultiProcessAdapter",
)


def documented() -> Iterator[Any]:
    for path in (*CONTRACT["paths"], *FURTHER):
        try:
            yield resolve(path)
        except LookupError:
            assert path not in FURTHER, path  # others stand in not_yet.json


def of_the_package() -> list[str]:
    """Every option, as `Accelerator.prepare.device_placement` or `accelerate launch --cpu`."""
    found = [f"{owner.name}.{option}" for owner in options.owners(documented()).values() for option in owner.options]
    for command, path in PARSERS.items():
        flags = options.flags(resolve(f"accelerate.commands.{path}")(), f"accelerate {command}")
        found += dict.fromkeys(f"{name} --{dest}" for name, dest in flags)
    return found


def entries(tests: dict[str, dict[str, str]]) -> dict[str, str]:
    return {
        f"{owner} {option}" if option.startswith("--") else f"{owner}.{option}": test
        for owner, of_owner in tests.items()
        for option, test in of_owner.items()
    }


def difference(have: list[str], listed: list[str]) -> list[str]:
    """What is wrong with a list of the options that there are."""
    return [
        *(f"no test and no reason: {option}" for option in have if option not in listed),
        *(f"no such option: {option}" for option in listed if option not in have),
        *(f"listed twice: {option}" for option in sorted(set(listed)) if listed.count(option) > 1),
    ]


@functools.cache
def named_in(file: str) -> set[str]:
    tree = ast.parse((rules.ROOT / file).read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, functions) and node.name.startswith("test_")}


def absent(tests: dict[str, str]) -> Iterator[str]:
    """Entries whose test is not there."""
    for option, test in tests.items():
        file, _, name = test.partition("::")
        if not (rules.ROOT / file).is_file() or name not in named_in(file):
            yield f"{option}: there is no {test}"


def test_every_option_has_a_test_or_a_reason():
    listed = [*entries(TESTS), *(option for of_reason in REASONS.values() for option in of_reason)]
    assert difference(of_the_package(), listed) == []


def test_the_named_tests_are_there():
    assert list(absent(entries(TESTS))) == []


def test_a_new_option_is_noticed():
    class Plugin:
        __module__ = "accelerate.plugin"

        def __init__(self, needed: int, option: int = 1) -> None: ...

        def method(self, *args: int, _private: int = 2) -> None: ...

    name = Plugin.__qualname__
    have = [f"{owner.name}.{option}" for owner in options.owners([Plugin]).values() for option in owner.options]
    assert have == [f"{name}.option", f"{name}.method.args"]
    assert difference(have, [f"{name}.option", "Gone.option"]) == [
        f"no test and no reason: {name}.method.args",
        "no such option: Gone.option",
    ]
    missing = "tests/architecture/test_options.py::test_nothing"
    assert list(absent({"A.b": missing, "A.c": "tests/nothing.py::test_a"})) == [
        f"A.b: there is no {missing}",
        "A.c: there is no tests/nothing.py::test_a",
    ]
