"""Every option of the launcher, from the command line and from the file, to whoever reads it at the far end.

`every_flag.ROWS` says where that is. A flag that is in no row, or whose value nobody reads, fails here.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import accelerate
from accelerate.launch.parse import parse
from accelerate.launch.plan import build_plan
from accelerate.settings import env
from accelerate.settings.launcher import LaunchSettings
from accelerate.settings.option import OptionSpec, SettingsError, option_specs
from tests.unit.launch.every_flag import LAUNCHERS_OWN, ONE_CHOICE, ROWS, UNSET, End, Row

OPTIONS = {entry.dest: entry for entry in option_specs(LaunchSettings)}
FROM_THE_COMMAND_LINE_ONLY = {"module", "no_python", "aws_access_key_id", "aws_secret_access_key"}
# What the file says of the kind of run, unless a row says otherwise: nothing that a flag here would have to overrule.
FILE = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU"}


def sample(entry: OptionSpec, row: Row) -> str:
    """A value that is not the default, as one types it."""
    if row.text is not UNSET:
        return row.text
    default = entry.option.default
    if entry.option.switch or entry.type == "bool":
        return "false" if default is True else "true"
    if entry.type in ("int", "float"):
        return {"int": str((default or 0) + 2), "float": str((default or 0) + 0.25)}[entry.type]
    return "sample"


def on_the_line(entry: OptionSpec, text: str) -> list[str]:
    return [entry.flags[0]] if entry.option.switch else [entry.flags[0], text]


def in_the_file(entry: OptionSpec, value: Any, row: Row) -> dict[str, Any]:
    """A configuration file that sets the option."""
    value = list(value) if isinstance(value, tuple) else value
    content = {**FILE, **row.file}
    if entry.section is None or entry.section.key is None:
        return {**content, entry.key: value}
    return {**content, entry.section.key: {entry.key: value}}


def read(words: list[str], row: Row, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is read at the far end of a command line."""
    settings = parse(words)
    end = End(settings, build_plan(settings))
    with env.clear_environment(), monkeypatch.context() as patch:
        for name, value in end.plan.environment.items():
            patch.setenv(name, value)
        return row.read(end)


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """A function: words and a file's content, if there is one, to what the row reads."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # no file of the developer's own

    def run(words: list[str], row: Row, content: dict[str, Any] | None = None) -> Any:
        if content is not None or row.file:
            path = tmp_path / "config.yaml"
            path.write_text(yaml.safe_dump(content if content is not None else {**FILE, **row.file}))
            words = ["--config_file", str(path), *words]
        return read([*words, *row.around, "train.py"], row, monkeypatch)

    return run


def expected(entry: OptionSpec, row: Row) -> Any:
    if row.value is not UNSET:
        return row.value
    return entry.convert(sample(entry, row), entry.dest)


@pytest.mark.parametrize("dest", ROWS)
def test_a_flag_comes_out(dest, launched):
    entry, row = OPTIONS[dest], ROWS[dest]
    assert launched(on_the_line(entry, sample(entry, row)), row) == expected(entry, row)


@pytest.mark.parametrize("dest", ROWS)
def test_without_it_something_else_comes_out(dest, launched):
    """Or the test above could not fail."""
    try:
        found = launched([], ROWS[dest])
    except SettingsError:
        return  # the option is needed there
    assert found != expected(OPTIONS[dest], ROWS[dest])


@pytest.mark.parametrize("dest", [dest for dest in ROWS if dest not in FROM_THE_COMMAND_LINE_ONLY])
def test_a_key_of_the_file_comes_out(dest, launched):
    entry, row = OPTIONS[dest], ROWS[dest]
    value = entry.convert(sample(entry, row), entry.dest)
    assert launched([], row, in_the_file(entry, value, row)) == expected(entry, row)


@pytest.mark.parametrize("dest", [dest for dest in ROWS if dest not in FROM_THE_COMMAND_LINE_ONLY])
def test_of_both_the_flag_wins(dest, launched):
    entry, row = OPTIONS[dest], ROWS[dest]
    other = entry.option.default if row.other is UNSET else row.other
    words = on_the_line(entry, sample(entry, row))
    if other is not None:
        assert launched(words, row, in_the_file(entry, other, row)) == expected(entry, row)
    else:  # no default to write: another sample will do
        assert launched(words, row, in_the_file(entry, another(entry, row), row)) == expected(entry, row)


def another(entry: OptionSpec, row: Row) -> Any:
    """A value that is neither the default nor the sample."""
    taken = entry.convert(sample(entry, row), entry.dest)
    candidates = [*entry.option.choices, 7, 0.7, False, True, "another"]
    kinds = {"int": int, "float": float, "bool": bool, "str": str}
    return next(c for c in candidates if type(c) is kinds[entry.type] and c != taken)


def test_every_option_is_in_the_table():
    rows = {*ROWS, *LAUNCHERS_OWN, *ONE_CHOICE, *ELSEWHERE}
    assert rows == OPTIONS.keys(), "an option without a row: who reads it? Or a row whose option is gone."
    assert not ROWS.keys() & LAUNCHERS_OWN.keys() & ONE_CHOICE.keys()


# Rows that need a test of their own, below.
ELSEWHERE = {"use_parallelism_config", "deepspeed_config_file"}


@pytest.mark.parametrize("dest", LAUNCHERS_OWN)
def test_the_launchers_own_options_are_asked_for(dest):
    """These change what the launcher itself does; the test named in the table looks at that."""
    module, test = LAUNCHERS_OWN[dest]
    tree = ast.parse((Path(accelerate.__file__).parent / module).read_text(encoding="utf-8"))
    asked = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert dest in asked | words
    place = Path(__file__).parents[3] / test
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    spellings = {*OPTIONS[dest].flags, *(flag.replace("_", "-") for flag in OPTIONS[dest].flags)}
    assert any(f'"{flag}"' in file.read_text(encoding="utf-8") for file in files for flag in spellings)


@pytest.mark.parametrize("dest", ONE_CHOICE)
def test_where_there_is_one_choice_it_is_read_and_others_are_refused(dest, monkeypatch):
    make, name = ONE_CHOICE[dest]
    entry = OPTIONS[dest]
    settings = parse(["--use_parallelism_config", *on_the_line(entry, entry.option.choices[0]), "train.py"])
    monkeypatch.setenv(entry.variable, build_plan(settings).environment[entry.variable])
    assert getattr(make(), name) == entry.option.choices[0]
    monkeypatch.setenv(entry.variable, "another")
    with pytest.raises(ValueError, match=f"{entry.variable}: expected one of"):
        make()


@pytest.mark.parametrize("how", ["flag", "file"])
def test_the_mesh_is_used_when_asked_for(how, tmp_path, monkeypatch):
    from accelerate.parallelism_config import resolve_parallelism_config

    path = tmp_path / "config.yaml"
    sizes = {"parallelism_config": {"parallelism_config_tp_size": 2}} if how == "file" else {}
    path.write_text(yaml.safe_dump({**FILE, **sizes}))
    words = ["--use_parallelism_config", "--parallelism_config_tp_size", "2"] if how == "flag" else []
    row = Row(lambda _: resolve_parallelism_config())
    found = read(["--config_file", str(path), *words, "train.py"], row, monkeypatch)
    assert found is not None and found.tp_size == 2 and found.tp_handler is not None
    path.write_text(yaml.safe_dump(FILE))
    assert read(["--config_file", str(path), "train.py"], row, monkeypatch) is None


def test_deepspeeds_own_file_comes_out(launched, tmp_path):
    from accelerate.settings.plugins.deepspeed import DeepSpeedPlugin

    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    second.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    row = Row(lambda _: DeepSpeedPlugin().zero_stage, around=("--use_deepspeed",))
    entry = OPTIONS["deepspeed_config_file"]
    assert launched([], row) == 2
    assert launched(on_the_line(entry, str(first)), row) == 1
    assert launched([], row, in_the_file(entry, str(second), row)) == 3
    assert launched(on_the_line(entry, str(first)), row, in_the_file(entry, str(second), row)) == 1
