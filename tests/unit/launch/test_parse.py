"""The command line: which words are the launcher's, which are the script's, and what is said about a mistake."""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerate.commands.launch import launch_command_parser
from accelerate.launch import parse
from accelerate.settings.launcher import LaunchSettings
from accelerate.settings.option import OptionSpec, SettingsError, option_specs


@pytest.fixture(autouse=True)
def no_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))


def other_value(entry: OptionSpec) -> Any:
    """A value that is not the option's default."""
    if entry.option.choices:
        return next((choice for choice in reversed(entry.option.choices) if choice != entry.option.default), "torch")
    return {
        "bool": not entry.option.default,
        "int": 7,
        "float": 0.75,
        "str": "some; $words",
        "tuple[str, ...]": ("one", "two"),
        "tuple[bool, bool, bool]": (True, False, True),
    }[entry.type]


def as_flags(entry: OptionSpec, value: Any) -> list[str]:
    if entry.option.switch:
        return [entry.flags[0]]
    values = value if entry.type == "tuple[str, ...]" else [value]
    return [word for one in values for word in (entry.flags[0], str(one))]


@pytest.mark.parametrize("entry", option_specs(LaunchSettings), ids=lambda entry: entry.dest)
def test_a_flag_arrives_in_the_settings(entry: OptionSpec) -> None:
    value = {"dynamo_backend": "inductor"}.get(entry.dest, other_value(entry))
    if entry.dest == "parallelism_config_sp_backend":
        value = entry.option.default  # the only one
    if entry.dest == "config_file":
        return  # names a file, which is read at once
    flags = as_flags(entry, value)
    assert entry.get(parse.parse([*flags, "script.py"])) == value
    dashed = [word.replace("_", "-") if word.startswith("--") else word for word in flags]
    assert entry.get(parse.parse([*dashed, "script.py"])) == value


def test_values_may_follow_an_equals_sign() -> None:
    settings = parse.parse(["--num_processes=2", "--rdzv_conf=a=1,b=2", "script.py"])
    assert (settings.num_processes, settings.rdzv_conf) == (2, "a=1,b=2")


def test_short_flags() -> None:
    settings = parse.parse(["-q", "-t3", "-m", "package.module", "-q"])
    assert settings.quiet and settings.module and settings.tee == "3"
    assert (settings.script, settings.script_args) == ("package.module", ("-q",))
    assert parse.parse(["-t", "1", "s.py"]).tee == "1"


def test_the_last_of_two_flags_counts_and_lists_grow() -> None:
    assert parse.parse(["--num_processes", "2", "--num_processes", "3", "s.py"]).num_processes == 3
    assert parse.parse(["--vm", "a", "--vm", "b", "s.py"]).tpus.vm == ("a", "b")
    assert not parse.parse(["--tpu_cluster", "--no_tpu_cluster", "s.py"]).tpus.tpu_use_cluster


@given(st.lists(st.text()))
def test_what_follows_the_script_is_the_scripts(words: list[str]) -> None:
    split = parse.split_args(["--cpu", "script.py", *words])
    assert (split.script, split.script_args) == ("script.py", tuple(words))
    split = parse.split_args(["--cpu", "--", "script.py", *words])
    assert (split.script, split.script_args) == ("script.py", tuple(words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--zzz", "s.py"], "unknown flag --zzz"),
        (["--num_proceses", "2", "s.py"], "Did you mean --num_processes?"),
        (["-x", "s.py"], "unknown flag -x"),
        (["--num_processes"], "--num_processes needs a value"),
        (["--num_processes", "--cpu", "s.py"], "--num_processes needs a value"),
        (["--num_processes", "-1", "s.py"], "--num_processes: expected at least 1, found '-1'"),
        (["--num-processes", "two", "s.py"], "--num-processes: expected a whole number, found 'two'"),
        (["--mixed_precision", "zz", "s.py"], "--mixed_precision: expected one of no, fp16, bf16, fp8, found 'zz'"),
        (["--cpu=yes", "s.py"], "--cpu takes no value"),
        (["--cpu", "--multi_gpu", "s.py"], "--cpu and --multi_gpu contradict each other"),
        (["--gradient_accumulation_steps", "0", "s.py"], "expected at least 1"),
    ],
)
def test_a_mistake_is_one_message(words: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse.parse(words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelled_backend_of_older_releases_is_understood() -> None:
    for spelling in ("torhchxla_trace_once", "torchxla_trace_once", "TORCHXLA_TRACE_ONCE"):
        assert parse.parse(["--dynamo_backend", spelling, "s.py"]).dynamo.backend == "torchxla_trace_once"


DOCUMENTED: list[dict[str, Any]] = json.loads((Path(__file__).parents[2] / "data" / "launch_flags.json").read_text())


@pytest.mark.parametrize("fact", DOCUMENTED, ids=lambda fact: fact["options"][0])
def test_documented_flags_choices_and_defaults(fact: dict[str, Any]) -> None:
    actions = launch_command_parser()._option_string_actions
    assert all(option in actions for option in fact["options"])
    action = actions[fact["options"][0]]
    assert set(map(str, fact["choices"] or ())) <= set(map(str, action.choices or fact["choices"] or ()))
    if fact["dest"] == "help" or fact["options"][0] == "--no_tpu_cluster":
        return
    entry = next(entry for entry in option_specs(LaunchSettings) if entry.dest == fact["dest"])
    documented = ast.literal_eval(fact["default"])
    if documented is None:  # not said; ours may say what that means
        assert entry.option.default in (None, False, (), "no")
    else:
        assert entry.convert(documented, entry.dest) == entry.option.default


# The parser that other programs use ----------------------------------------------------------------------------------


def test_the_parser_gives_what_the_command_line_gives() -> None:
    words = ["--num-processes", "2", "--vm", "a", "--fsdp_version", "2", "--use_fsdp", "s.py", "--num_processes", "9"]
    namespace = launch_command_parser().parse_args(words)
    assert (namespace.num_processes, namespace.vm, namespace.fsdp_version) == (2, ("a",), 2)
    assert (namespace.training_script, namespace.training_script_args) == ("s.py", ["--num_processes", "9"])
    assert namespace.main_process_port is None and namespace.tee == "0"
    assert parse.from_namespace(namespace) == parse.split_args(words)


def test_a_flag_with_the_defaults_value_was_given_nevertheless() -> None:
    namespace = launch_command_parser().parse_args(["--fsdp_version", "1", "s.py"])
    assert parse.from_namespace(namespace).flags == {"fsdp_version": 1}


def test_a_changed_namespace_is_followed() -> None:
    namespace = launch_command_parser().parse_args(["s.py"])
    namespace.num_processes = 4
    assert parse.from_namespace(namespace).flags == {"num_processes": 4}


def test_the_parser_can_be_one_of_several() -> None:
    whole = argparse.ArgumentParser()
    launch_command_parser(whole.add_subparsers())
    namespace = whole.parse_args(["launch", "--num-processes", "2", "--vm", "a", "s.py", "--x"])
    assert parse.from_namespace(namespace).flags == {"num_processes": 2, "vm": ("a",)}
    assert (namespace.training_script, namespace.training_script_args) == ("s.py", ["--x"])


def test_the_parser_refuses_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--zzz", "s.py"], []):
        with pytest.raises(SystemExit) as caught:
            launch_command_parser().parse_args(words)
        assert caught.value.code == 2
        assert capsys.readouterr().err.startswith("accelerate launch: ")
