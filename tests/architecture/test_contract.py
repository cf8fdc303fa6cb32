"""The public names, flags, variables and file names that scripts and libraries rely on are there.

`tests/data/contract_names.json` lists them. What this version does not have yet stands in `tests/data/not_yet.json`, under
the reason; a name that appears must be struck off that list, so that the list stays true.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

from accelerate.settings.planned import Placeholder
from tests.architecture import rules

DATA = rules.ROOT / "tests" / "data"
CONTRACT = json.loads((DATA / "contract_names.json").read_text(encoding="utf-8"))
NOT_YET: dict[str, list[str]] = json.loads((DATA / "not_yet.json").read_text(encoding="utf-8"))

PARSERS = {
    "checkpoint": "checkpoint.checkpoint_command_parser",
    "env": "env.env_command_parser",
    "estimate-memory": "estimate.estimate_command_parser",
    "launch": "launch.launch_command_parser",
    "merge-weights": "merge.merge_command_parser",
    "test": "test.test_command_parser",
    "to-fsdp2": "to_fsdp2.to_fsdp2_command_parser",
    "tpu-config": "tpu.tpu_command_parser",
    "config": "config.get_config_parser",
}


def resolve(path: str) -> Any:
    """The object at a dotted path; raises LookupError where there is none."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
            continue
        if count == len(parts) > 1 and path == "accelerate.utils.tqdm":  # a function that shares its module's name
            found = importlib.import_module("accelerate.utils").tqdm
        for part in parts[count:]:
            if not hasattr(found, part):
                raise LookupError(path)
            found = getattr(found, part)
        return found
    raise LookupError(path)


def missing_names(paths: dict[str, dict[str, list[str]]]) -> Iterator[str]:
    for path, facts in paths.items():
        try:
            found = resolve(path)
        except LookupError:
            yield path
            continue
        if inspect.isclass(found) and issubclass(found, Placeholder):  # a placeholder
            yield path
            continue
        for member in facts.get("members", []):
            if not hasattr(found, member) and member not in getattr(found, "__annotations__", {}):
                yield f"{path}.{member}"
        if "params" not in facts or not callable(found):
            continue
        have = inspect.signature(found).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in have.values()):
            yield from (f"{path}({name}=)" for name in facts["params"] if name not in have)


def options(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, set[str]]]:
    yield name, {option for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subcommand, subparser in action.choices.items():
                yield from options(subparser, f"{name} {subcommand}")


def missing_flags(flags: dict[str, list[str]]) -> Iterator[str]:
    have: dict[str, set[str]] = {}
    for command, path in PARSERS.items():
        try:
            maker = resolve(f"accelerate.commands.{path}")
        except LookupError:
            continue
        have.update(options(maker(), command))
    for command, wanted in flags.items():
        yield from (f"accelerate {command} {flag}" for flag in wanted if flag not in have.get(command, set()))


def strings() -> set[str]:
    """Every string written in the package's sources, docstrings aside, and the words within it."""
    found: set[str] = set()
    for tree in rules.sources().values():
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                found.update((node.value, *node.value.split()))
    return found


def missing_variables(variables: list[str]) -> Iterator[str]:
    settings = importlib.import_module("accelerate.settings.launcher").LaunchSettings
    options = importlib.import_module("accelerate.settings.option").option_specs(settings)
    known = strings() | {entry.variable for entry in options}
    yield from (f"${name}" for name in variables if name not in known)


def missing_files(files: list[str]) -> Iterator[str]:
    enums = importlib.import_module("accelerate.settings.enums")
    known = {value for name, value in vars(enums).items() if name.endswith("_NAME") and isinstance(value, str)}
    for file in files:
        stem = re.split(r"[-_]N|\.", file)[0]
        if not any(value == stem or value.startswith((f"{stem}.", f"{stem}_", f"{stem}{{")) for value in known):
            yield f"checkpoint: {file}"


def missing() -> set[str]:
    return {
        *missing_names(CONTRACT["paths"]),
        *missing_flags(CONTRACT["flags"]),
        *missing_variables(CONTRACT["variables"]),
        *missing_files(CONTRACT["checkpoint_files"]),
    }


def test_what_is_missing_is_listed_with_its_reason() -> None:
    absent, listed = missing(), {name for names in NOT_YET.values() for name in names}
    assert not absent - listed, f"gone, or never there, and not in not_yet.json: {sorted(absent - listed)}"
    assert not listed - absent, f"there by now, strike off not_yet.json: {sorted(listed - absent)}"


def test_every_reason_is_one() -> None:
    assert all(len(reason) > 10 and names for reason, names in NOT_YET.items())
    listed = [name for names in NOT_YET.values() for name in names]
    assert len(listed) == len(set(listed))


def test_an_absence_is_noticed() -> None:
    paths = {
        "accelerate.nothing": {},
        "accelerate.settings.enums.DistributedType": {"members": ["NO", "NOTHING"]},
        "accelerate.settings.env.get": {"params": ["name", "nothing"]},
    }
    assert set(missing_names(paths)) == {
        "accelerate.nothing",
        "accelerate.settings.enums.DistributedType.NOTHING",
        "accelerate.settings.env.get(nothing=)",
    }
    assert list(missing_flags({"launch": ["--cpu", "--nothing"]})) == ["accelerate launch --nothing"]
    assert list(missing_variables(["ACCELERATE_NOTHING"])) == ["$ACCELERATE_NOTHING"]
    assert list(missing_files(["optimizer.bin", "nothing.bin"])) == ["checkpoint: nothing.bin"]
