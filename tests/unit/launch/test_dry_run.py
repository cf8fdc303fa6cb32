"""A plan as text for a shell: bash reads back what was meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerate.launch.dry_run import format_plan
from accelerate.launch.parse import parse
from accelerate.launch.plan import LaunchPlan, build_plan
from accelerate.settings.launcher import LaunchSettings

SAY = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ.get('X')]))"
# What a command line and a variable can hold: anything but a zero byte.
texts = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=8) | st.text(
    " '\"$`\\;&|<>*?[]{}~#!\n\t=()", max_size=8
)


def in_bash(text: str) -> Any:
    done = subprocess.run(["bash", "-c", text], env={"PATH": os.environ["PATH"]}, capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@given(st.lists(texts, max_size=4), texts)
@settings(max_examples=25, deadline=None)
def test_bash_reads_what_was_meant(words: list[str], value: str) -> None:
    plan = LaunchPlan("python", [sys.executable, "-Ic", SAY, *words], {"X": value})
    assert in_bash(format_plan(plan, LaunchSettings(), {})) == [words, value]


def test_variables_come_first_one_on_a_line() -> None:
    plan = LaunchPlan("python", ["python", "a b.py"], {"B": "1", "A": "x y", "OMP": "2"}, frozenset({"OMP", "B"}))
    assert format_plan(plan, LaunchSettings(), {"OMP": "7", "A": "old"}) == "A='x y' \\\nB=1 \\\npython 'a b.py'"


@pytest.mark.parametrize("flags", [[], ["--no_python"], ["--module"]])
def test_the_agents_macros_are_not_the_scripts(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    asked = parse(["--cpu", "--num_processes", "2", *flags, "s$x", "$HOME", "${local_rank}", "--role", "$$"])
    typed = format_plan(build_plan(asked), asked, {})
    script = "'s$x'" if "--no_python" in flags else "'s$$x'"  # the agent takes a program's name as it is
    assert typed.endswith(f"{script} '$$HOME' '$${{local_rank}}' --role '$$$$'")
