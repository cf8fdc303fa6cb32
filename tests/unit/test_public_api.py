"""The public windows: every name resolves, to the object in its home; importing costs nothing; stubs say the same."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import accelerate
import accelerate.utils

WINDOWS = {"accelerate": accelerate, "accelerate.utils": accelerate.utils}
# utils.tqdm is the function; a test of its own looks at that.
SUBMODULES = [f"{path}.{name}" for path, window in WINDOWS.items() for name in window._SUBMODULES if name != "tqdm"]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_costs_nothing():
    code = """
import sys
before = set(sys.modules)
import accelerate, accelerate.utils
dir(accelerate), dir(accelerate.utils), accelerate.__all__, accelerate.utils.__all__, accelerate.__version__
new = {name for name in set(sys.modules) - before if name.split(".")[0] == "accelerate"}
print(sorted(new), {"torch", "numpy", "tqdm", "dataclasses", "importlib.metadata"} & set(sys.modules))
"""
    ours = [f"accelerate{name}" for name in ("", ".runtime", ".runtime.progress_bar", ".utils", ".utils.tqdm")]
    assert run(code) == f"{ours} set()\n"


@pytest.mark.parametrize("name", sorted(accelerate._EXPORTS))
def test_a_name_of_accelerate(name):
    home = importlib.import_module(f"accelerate.{accelerate._EXPORTS[name]}")
    assert getattr(accelerate, name) is getattr(home, name)


@pytest.mark.parametrize("name", sorted(accelerate.utils._EXPORTS))
def test_a_name_of_utils(name):
    home = importlib.import_module(f"accelerate.{accelerate.utils._EXPORTS[name]}")
    assert getattr(accelerate.utils, name) is getattr(home, name)


@pytest.mark.parametrize("path", SUBMODULES)
def test_a_submodule_is_an_attribute(path):
    window, _, name = path.rpartition(".")
    module = WINDOWS[window].__getattr__(name)  # asked as if no import had set the attribute yet
    assert getattr(WINDOWS[window], name) is module is importlib.import_module(path)


def test_importing_accelerate_is_enough():
    assert run("import accelerate; print(accelerate.utils.constants.MODEL_NAME)") == "pytorch_model\n"


@pytest.mark.parametrize("name", accelerate.utils._SUBMODULES)
def test_a_shell_only_re_exports(name):
    shell = importlib.import_module(f"accelerate.utils.{name}")
    tree = ast.parse(inspect.getsource(shell))
    allowed = (ast.Expr, ast.ImportFrom, ast.Assign)
    assert all(isinstance(node, allowed) for node in tree.body)
    assert [node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)] == ["__all__"]
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported - {"annotations"} == set(shell.__all__)


def test_utils_has_what_its_shells_have_under_the_same_name():
    for sub in accelerate.utils._SUBMODULES:
        shell = importlib.import_module(f"accelerate.utils.{sub}")
        for name in set(shell.__all__) & set(accelerate.utils._EXPORTS):
            assert getattr(accelerate.utils, name) is getattr(shell, name)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_the_stub_lists_the_same_names_from_the_same_homes(window):
    stub = ast.parse(Path(window.__file__).with_suffix(".pyi").read_text())
    listed = {
        alias.asname: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    wanted = {name: f"accelerate.{home}" for name, home in window._EXPORTS.items()}
    wanted |= dict.fromkeys(window._SUBMODULES, window.__name__)
    if window is accelerate.utils:
        wanted["tqdm"] = "accelerate.runtime.progress_bar"
    assert listed == wanted


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_dir_and_all(window):
    assert set(window.__all__) - {"__version__"} <= set(dir(window))
    assert {*window._EXPORTS, *window._SUBMODULES} <= set(dir(window))
    assert set(window._EXPORTS) <= set(window.__all__)
    names: dict[str, object] = {}
    exec(f"from {window.__name__} import *", names)
    assert set(window.__all__) <= set(names)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_no_such_name(window):
    with pytest.raises(AttributeError, match=f"module '{window.__name__}' has no attribute 'nothing'"):
        _ = window.nothing
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec(f"from {window.__name__} import nothing")


def test_tqdm_is_a_function_and_a_module():
    code = (
        "import accelerate.utils.tqdm, accelerate.utils\n"
        "from accelerate.utils.tqdm import tqdm\n"
        "from accelerate.utils import tqdm as same\n"
        "print(tqdm is same is accelerate.utils.tqdm)"
    )
    assert run(code) == "True\n"
    assert isinstance(sys.modules["accelerate.utils.tqdm"], ModuleType)


def test_the_version_is_that_of_the_distribution():
    assert accelerate.__version__ == importlib.metadata.version("accelerate") == "2.0.0"


def test_the_former_home_of_the_batch_size_finder():
    from accelerate.memory_utils import find_executable_batch_size

    assert find_executable_batch_size is accelerate.find_executable_batch_size
