"""Checks the table of options and tests: leaves one option out at a time and expects the test that is named for it to fail.

    python tools/ignored_options.py                       # the whole table: an hour
    python tools/ignored_options.py Accelerator.prepare   # options whose name begins so
    python tools/ignored_options.py tests/unit/test_state.py   # entries of one file

`tests/data/options.json` is the table. An option of a function is dropped when the function is called. A field of a
dataclass reads as its default wherever the package looks at it, and as given in tests: a test that only compares the
field with what it was set to does not notice. A flag of a command is reset after parsing. Ranks and other processes that
a test starts take part: their ``sitecustomize`` imports this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.abc
import importlib.machinery
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IGNORED, OWNERS, RESULTS, ENTRIES = (f"OPTIONS_{name}" for name in ("IGNORED", "OWNERS", "RESULTS", "ENTRIES"))
LIMIT_SECONDS = 120
WHEN_MADE = "when made:"
# Fields that the package looks at only while the object is made: they are dropped there.
LOOKED_AT_WHEN_MADE = {
    "BnbQuantizationConfig.load_in_4bit",
    "FullyShardedDataParallelPlugin.state_dict_config",
    "FullyShardedDataParallelPlugin.state_dict_type",
}
_PASSED_OVER = ("/dataclasses.py", "/copy.py", f"/{Path(__file__).name}")


# In every process: callables that drop the option ------------------------------------------------------------------------


def dropping(function: Callable[..., Any], owner: str, signature: inspect.Signature) -> Callable[..., Any]:
    """`function`, called without the option that is to be ignored."""
    prefix = f"{owner}."

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        ignored = os.environ.get(IGNORED, "")
        if ignored.startswith(prefix):
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:  # the function itself says what is wrong
                return function(*args, **kwargs)
            if bound.arguments.pop(ignored.removeprefix(prefix), None) is not None:
                args, kwargs = bound.args, bound.kwargs
        return function(*args, **kwargs)

    for name in ("cache_clear", "cache_info"):  # of functools.lru_cache
        if hasattr(function, name):
            setattr(call, name, getattr(function, name))
    return call


def hide_fields(cls: type, owner: str) -> None:
    """Makes the package read the default of the field that is to be ignored."""
    plain: Any = cls.__getattribute__
    prefix = f"{owner}."
    fields: Any = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    busy: list[str] = []

    def __getattribute__(self: Any, name: str) -> Any:
        if name not in fields or os.environ.get(IGNORED) != prefix + name or busy or not read_by_the_package():
            return plain(self, name)
        busy.append(name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return getattr(cls(), name)
        except (TypeError, ValueError):  # it cannot be made without arguments
            field = fields[name]
            return field.default_factory() if field.default is dataclasses.MISSING else field.default
        finally:
            busy.pop()

    cls.__getattribute__ = __getattribute__  # type: ignore[method-assign,assignment]


def read_by_the_package() -> bool:
    """Whether a field is read by the package, other than while the object is made."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.endswith(_PASSED_OVER):
        frame = frame.f_back
    if frame is None or "/src/accelerate/" not in frame.f_code.co_filename:
        return False
    for _ in range(6):
        if frame is None:
            break
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if name in ("__post_init__", "__eq__") or (name == "__init__" and "/settings/" in file):
            return False
        frame = frame.f_back
    return True


def instrument(module: Any, owners: Iterable[dict[str, str]]) -> None:
    """Wraps the callables of one module."""
    for owner in owners:
        *parents, last = owner["path"].split(".")
        holder = functools.reduce(getattr, parents, module)
        value, name = getattr(holder, last), owner["name"]
        if inspect.isclass(holder):
            home = next(base for base in holder.__mro__ if last in vars(base))
            static = vars(home)[last]
            inner = static.__func__ if isinstance(static, (staticmethod, classmethod)) else static
            new: Any = dropping(inner, name, inspect.signature(inner))
            setattr(holder, last, type(static)(new) if inner is not static else new)
        elif not inspect.isclass(value):
            setattr(holder, last, dropping(value, name, inspect.signature(value)))
        else:
            signature = inspect.signature(value)
            first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
            with_self = signature.replace(parameters=[first, *signature.parameters.values()])
            if dataclasses.is_dataclass(value):
                hide_fields(value, name)
                name = f"{WHEN_MADE} {name}"
            value.__init__ = dropping(value.__init__, name, with_self)  # type: ignore[misc]


def reset_flags(_: Any) -> None:
    """Has parsers of the small commands reset the flag that is to be ignored."""
    parse: Any = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self: Any, args: Any = None, namespace: Any = None) -> Any:
        result, rest = parse(self, args, namespace)
        for action in self._actions:
            if os.environ.get(IGNORED) != f"{self.prog} --{action.dest}":
                continue
            if action.default is not argparse.SUPPRESS:
                setattr(result, action.dest, action.default)
            elif hasattr(result, action.dest):
                delattr(result, action.dest)
        return result, rest

    argparse.ArgumentParser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def drop_flags(module: Any) -> None:
    """Has the launcher's parser drop the flag that is to be ignored."""
    parse = module.split

    @functools.wraps(parse)
    def split(argv: Any) -> Any:
        words = parse(argv)
        words.flags.pop(os.environ.get(IGNORED, "").removeprefix("accelerate launch --"), None)
        return words

    module.split = split


class Finder(importlib.abc.MetaPathFinder):
    """Instruments modules as they are imported."""

    def __init__(self, owners: list[dict[str, str]]) -> None:
        self.hooks: dict[str, Callable[[Any], None]] = {
            module: functools.partial(instrument, owners=[owner for owner in owners if owner["module"] == module])
            for module in {owner["module"] for owner in owners}
        }
        self.hooks["accelerate.commands.parsers"] = reset_flags
        self.hooks["accelerate.launch.parse"] = drop_flags

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if fullname in self.hooks else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            self.hooks[fullname](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if OWNERS in os.environ:
    sys.meta_path.insert(0, Finder(json.loads(Path(os.environ[OWNERS]).read_text(encoding="utf-8"))))


# In pytest: each test once for each of its options -----------------------------------------------------------------------


def pytest_configure(config: Any) -> None:
    """Has pooled ranks hear of the option too."""
    from tests.helpers.ranks import RankPool

    variables = RankPool._variables

    def with_option(rank: int, size: int, port: int) -> dict[str, str]:
        return {**variables(rank, size, port), IGNORED: os.environ.get(IGNORED, "")}

    RankPool._variables = staticmethod(with_option)  # type: ignore[method-assign,assignment]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leaves only tests of the table."""
    wanted = set(json.loads(os.environ[ENTRIES]).values())
    items[:] = [item for item in items if entry_of(item) in wanted]


def entry_of(item: Any) -> str:
    return f"{item.nodeid.partition('::')[0]}::{item.originalname}"


def pytest_runtest_protocol(item: Any, nextitem: Any) -> bool:
    """Runs a test with nothing ignored, then with each of its options; any failure counts as noticed."""
    from _pytest.runner import runtestprotocol

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"{LIMIT_SECONDS} s are over")

    signal.signal(signal.SIGALRM, too_long)
    for option in ["", *(option for option, test in json.loads(os.environ[ENTRIES]).items() if test == entry_of(item))]:
        item._initrequest()
        os.environ[IGNORED] = f"{WHEN_MADE} {option}" if option in LOOKED_AT_WHEN_MADE else option
        signal.alarm(LIMIT_SECONDS)
        try:  # fixtures of wider scope are made anew, with the option ignored
            reports = runtestprotocol(item, nextitem=item.session, log=False)
        finally:
            signal.alarm(0)
            del os.environ[IGNORED]
        with open(os.environ[RESULTS], "a", encoding="utf-8") as file:
            file.write(json.dumps([option or entry_of(item), any(report.failed for report in reports)]) + "\n")
    return True


# The command -------------------------------------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    """Runs the tests of the table's entries that begin with one of the words, in name or test; of all without any."""
    sys.path.insert(0, str(ROOT))
    from tests.architecture import options
    from tests.architecture.test_options import TESTS, documented, entries

    def chosen(option: str, test: str) -> bool:
        return not words or any(option.startswith(word) or test.startswith(word) for word in words)

    table = {option: test for option, test in entries(TESTS).items() if chosen(option, test)}
    with tempfile.TemporaryDirectory() as folder:
        owners, results = Path(folder, "owners.json"), Path(folder, "results")
        found = [owner._asdict() for owner in options.owners(documented()).values()]
        owners.write_text(json.dumps(found), encoding="utf-8")
        results.touch()
        Path(folder, "sitecustomize.py").write_text(f"import {Path(__file__).stem}\n", encoding="utf-8")
        here = {OWNERS: str(owners), RESULTS: str(results), ENTRIES: json.dumps(table)}
        path = os.pathsep.join([folder, str(Path(__file__).parent), str(ROOT / "src")])
        for file in sorted({test.partition("::")[0] for test in table.values()}):
            command = [sys.executable, "-m", "pytest", "-q", "-p", Path(__file__).stem, "-p", "no:cacheprovider", file]
            subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path, **here},
                stdout=subprocess.DEVNULL,
                check=False,
            )
        noticed = {option for option, failed in map(json.loads, results.read_text().splitlines()) if failed}
    wrong = [f"{test} fails with no option ignored" for test in set(table.values()) & noticed]
    wrong += [f"{option} can be ignored: {test} passes" for option, test in table.items() if option not in noticed]
    print(*wrong, f"{len(table.keys() & noticed)} of {len(table)} options are noticed", sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
