"""The help of the launcher: every flag is in it once its group is turned on, and it fits a terminal."""

from __future__ import annotations

import os

import pytest

from accelerate.commands.launch_help import format_help
from accelerate.launch.parse import split_args
from accelerate.settings.launcher import LaunchSettings
from accelerate.settings.option import option_specs

GROUPS = {
    "--use_deepspeed": "DeepSpeed Arguments",
    "--use_fsdp": "FSDP Arguments",
    "--use_megatron_lm": "Megatron-LM Arguments",
    "--fp8_backend te": "FP8 Arguments",
    "--mixed_precision fp8": "FP8 Arguments",
    "--mpirun_hostfile hosts": "MPI Arguments",
    "--use_parallelism_config": "ParallelismConfig Arguments",
    "--aws_access_key_id key": "AWS Arguments",
    "--tpu": "TPU",
    "--zero_stage 2": "DeepSpeed Arguments",
}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "get_terminal_size", lambda: os.terminal_size((80, 24)))


def shown(line: str) -> str:
    words = split_args([*line.split(), "-h"])
    assert words.help
    return format_help(words.flags)


@pytest.mark.parametrize(("line", "group"), GROUPS.items())
def test_a_group_is_shown_once_it_matters(line: str, group: str) -> None:
    assert f"\n{group}:\n" in shown(line)
    assert f"\n{group}:\n" not in shown("")
    assert group in shown("")  # but how to see it is said
    assert [other for other in set(GROUPS.values()) - {group} if f"\n{other}:\n" in shown(line)] == []


def test_every_flag_is_in_the_help_of_its_group() -> None:
    text = shown(" ".join(GROUPS))
    missing = [
        flag
        for entry in option_specs(LaunchSettings)
        for flag in entry.flags
        if flag not in text.replace(",", " ").split()
    ]
    assert missing == []


@pytest.mark.parametrize("line", ["", *GROUPS])
def test_it_fits_80_columns(line: str) -> None:
    assert [text for text in shown(line).splitlines() if len(text) > 80] == []


def test_flags_that_turn_groups_on_are_shown_as_one_types_them() -> None:
    for text in shown("").partition("turns it on:")[2].split("\n\n")[0].strip().splitlines():
        typed = text.strip()[:26]
        assert split_args([*typed.replace("FILE", "f").replace("WORD", "w").split(), "s.py"]).script == "s.py", typed


def test_defaults_are_spelled_as_one_types_them() -> None:
    text = shown(" ".join(GROUPS))
    assert "(default false)" in text and "true,false,true (default false,false,false)" in text
    assert "False" not in text and "True" not in text
