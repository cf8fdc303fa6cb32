"""A flag, then the file, then the default, for every option; and every spelling of its flag and of its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from accelerate.launch import config_file
from accelerate.launch.parse import SourcedValue, merge_values, parse, split_args
from accelerate.settings.launcher import LaunchSettings
from accelerate.settings.option import OptionSpec, option_specs
from tests.unit.launch.test_parse import as_flags, other_value

IN_FILES = {
    entry.dest
    for table in (config_file.key_tables()[0], *config_file.key_tables()[1].values())
    for entry in table.values()
}
OPTIONS = [entry for entry in option_specs(LaunchSettings) if entry.dest in IN_FILES]
# What a file says of the kind of run, so that nothing else is implied.
KIND = {"distributed_type": "MULTI_GPU"}


@pytest.fixture(autouse=True)
def no_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))


def in_a_file(entry: OptionSpec, value: Any, key: str, folder: Path) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    section = entry.section.key if entry.section is not None else None
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**KIND, **({key: plain} if section is None else {section: {key: plain}})}))
    return str(path)


def two_values(entry: OptionSpec) -> tuple[Any, Any]:
    """Two values of the option; the first can be given on the command line."""
    value = {"dynamo_backend": "inductor"}.get(entry.dest, other_value(entry))
    if entry.option.switch:
        return True, False
    if len(entry.option.choices) == 1:
        return entry.option.default, entry.option.default
    others = {"int": 9, "float": 2.5, "str": "else", "tuple[str, ...]": ("three",)}
    if entry.option.choices:
        return value, next(choice for choice in entry.option.choices if choice != value)
    return value, not value if entry.type == "bool" else others.get(entry.type, entry.option.default)


@pytest.mark.parametrize("entry", OPTIONS, ids=lambda entry: entry.dest)
def test_of_both_the_flag_wins_and_is_named(entry: OptionSpec, tmp_path: Path) -> None:
    value, other = two_values(entry)
    file = in_a_file(entry, other, entry.key, tmp_path)
    assert entry.get(parse(["--config_file", file, "s.py"])) == other or entry.dest == "multi_gpu"
    words = ["--config_file", file, *as_flags(entry, value), "s.py"]
    assert entry.get(parse(words)) == value
    found = config_file.load_config(file)
    where = entry.key if entry.section is None or entry.section.key is None else f"{entry.section.key}.{entry.key}"
    if entry.dest != "multi_gpu":  # which the kind of run implies
        assert merge_values({}, found)[entry.dest] == SourcedValue(other, "file", where)
    assert merge_values(split_args(words).flags, found)[entry.dest] == SourcedValue(value, "flag")


@pytest.mark.parametrize("entry", OPTIONS, ids=lambda entry: entry.dest)
def test_every_spelling_of_a_key_and_of_a_flag(entry: OptionSpec, tmp_path: Path) -> None:
    value, _ = two_values(entry)
    for key in entry.keys:
        assert entry.get(parse(["--config_file", in_a_file(entry, value, key, tmp_path), "s.py"])) == value, key
    for flag in entry.flags:
        words = [flag if word == entry.flags[0] else word for word in as_flags(entry, value)]
        assert entry.get(parse([*words, "s.py"])) == value, flag


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--ipex"], ("ipex",), True),
        (["--use_xpu"], ("use_xpu",), True),
        (["--fsdp_backward_prefetch_policy", "BACKWARD_POST"], ("fsdp", "backward_prefetch"), "BACKWARD_POST"),
        (["--tpu_cluster"], ("tpus", "tpu_use_cluster"), True),
        (["--fsdp_sharding_strategy", "2"], ("fsdp", "sharding_strategy"), "2"),
    ],
)
def test_flags_of_earlier_releases(words: list[str], path: tuple[str, ...], value: Any) -> None:
    entry = next(entry for entry in option_specs(LaunchSettings) if entry.path == path)
    assert entry.get(parse([*words, "s.py"])) == value


@pytest.mark.parametrize(
    ("content", "path", "value"),
    [
        ({"ipex_config": {"ipex": True}}, ("ipex",), True),
        ({"ipex_config": {"use_xpu": True}}, ("use_xpu",), True),
        (
            {"fsdp_config": {"fsdp_backward_prefetch_policy": "NO_PREFETCH"}},
            ("fsdp", "backward_prefetch"),
            "NO_PREFETCH",
        ),
        ({"fsdp_config": {"fsdp_cpu_offload": True}}, ("fsdp", "offload_params"), True),
        ({"fsdp_config": {"fsdp_sharding_strategy": 3}}, ("fsdp", "sharding_strategy"), "3"),
        ({"mpirun_config": {"mpirun_ccl": "4"}}, ("mpirun", "ccl"), "4"),
        ({"dynamo_backend": "INDUCTOR"}, ("dynamo", "backend"), "inductor"),
        ({"fp8_config": {"amax_compute_algorithm": "max"}}, ("fp8", "amax_compute_algo"), "max"),
        ({"fp8_config": {"amax_history_length": 9}}, ("fp8", "amax_history_len"), 9),
        ({"fp8_config": {"optimization_level": "O1"}}, ("fp8", "opt_level"), "O1"),
        ({"fp8_config": {"override_linear_precision": False}}, ("fp8", "override_linear_precision"), (False,) * 3),
        ({"fp8_config": {"backend": "TE"}}, ("fp8", "backend"), "te"),
    ],
)
def test_keys_of_earlier_releases(content: dict[str, Any], path: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    entry = next(entry for entry in option_specs(LaunchSettings) if entry.path == path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**KIND, **content}))
    assert entry.get(parse(["--config_file", str(tmp_path / "c.yaml"), "s.py"])) == value
