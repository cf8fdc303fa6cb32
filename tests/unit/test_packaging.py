"""The distribution as other programs find it: name, version, home page, commands, extras, types."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import accelerate

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [entry for entry in importlib.metadata.entry_points(group="console_scripts") if entry.dist is not None]
OURS = sorted((entry for entry in COMMANDS if entry.dist.name == "accelerate"), key=lambda entry: entry.name)


def test_the_version_is_the_same_everywhere() -> None:
    assert importlib.metadata.version("accelerate") == accelerate.__version__
    assert f'version = "{accelerate.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_libraries_recognize_the_distribution() -> None:
    metadata = importlib.metadata.metadata("accelerate")
    assert metadata["Name"] == "accelerate"
    # sentence-transformers takes a distribution without this for another package of the same name.
    assert "huggingface" in metadata["Home-page"]
    assert metadata["License-Expression"] == "Apache-2.0"


def test_every_documented_command_is_installed() -> None:
    names = ["config", "env", "estimate-memory", "launch", "merge-weights", "test"]
    assert [entry.name for entry in OURS] == ["accelerate", *(f"accelerate-{name}" for name in names)]


@pytest.mark.parametrize("entry", OURS, ids=lambda entry: entry.name)
def test_a_command_explains_itself(entry: importlib.metadata.EntryPoint) -> None:
    # As the script that pip writes would: sys.exit(main()), with nothing handed to it.
    program = (
        f"import sys; from {entry.module} import {entry.attr}; sys.argv[0] = {entry.name!r}; sys.exit({entry.attr}())"
    )
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_types_are_shipped() -> None:
    assert (Path(accelerate.__file__).parent / "py.typed").is_file()


def test_extras_that_messages_name_exist() -> None:
    extras = set(importlib.metadata.metadata("accelerate").get_all("Provides-Extra") or [])
    named = {
        (path.name, extra)
        for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
        for extras_named in re.findall(r"accelerate\[([a-z0-9_,-]+)\]", path.read_text(encoding="utf-8"))
        for extra in extras_named.split(",")
    }
    assert not {(name, extra) for name, extra in named if extra not in extras}
