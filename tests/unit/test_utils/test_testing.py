"""Helpers for other libraries' tests: names, skipping, subprocesses, base classes."""

from __future__ import annotations

import os
import subprocess
import sys
import unittest

import pytest
import torch

import accelerate.test_utils
from accelerate.state import AcceleratorState, PartialState
from accelerate.test_utils import testing

# What test suites of other libraries import.
NAMES = """
AccelerateTestCase DEFAULT_LAUNCH_COMMAND MockingTestCase SubprocessCallException TempDirTestCase
are_the_same_tensors assert_exception capture_call_output device_count execute_subprocess_async get_backend
get_launch_command memory_allocated_func parse_flag_from_env path_in_accelerate_package require_bnb require_cpu
require_cuda require_cuda_or_xpu require_deepspeed require_fsdp require_huggingface_suite require_mps
require_multi_device require_multi_gpu require_non_cpu require_non_torch_xla require_non_xpu require_npu
require_single_device require_single_gpu require_tensorboard require_torch_min_version require_tpu require_trackers
require_transformers require_wandb require_xpu run_command run_first skip slow torch_device
""".split()  # noqa: SIM905 - a list would take a line for each


@pytest.mark.parametrize("name", NAMES)
def test_both_modules_have_a_name(name):
    assert getattr(accelerate.test_utils, name) is getattr(testing, name)
    assert name in testing.__all__
    assert name in dir(accelerate.test_utils)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="require_luck"):
        _ = accelerate.test_utils.require_luck
    with pytest.raises(ImportError):
        exec("from accelerate.test_utils import subprocess")


def test_a_run_does_not_import_it():
    code = """
import sys, accelerate, accelerate.test_utils
assert not {"torch", "unittest", "accelerate.test_utils.testing"} & set(sys.modules)
accelerate.Accelerator(cpu=True)
assert "accelerate.test_utils.testing" not in sys.modules
import accelerate.test_utils.scripts
from accelerate.test_utils import scripts
assert "torch_device" in dir(accelerate.test_utils)
print(accelerate.test_utils.torch_device)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == testing.torch_device


def test_backend():
    device, count, memory = testing.get_backend()
    assert torch.zeros(1, device=device).device.type == device == testing.torch_device
    assert count == testing.device_count >= 1
    before = memory()
    kept = torch.zeros(1 << 20, device=device)
    assert memory() - before == (0 if device == "cpu" else kept.nbytes)


def run_case(case: type[unittest.TestCase]) -> unittest.TestResult:
    return unittest.defaultTestLoader.loadTestsFromTestCase(case).run(unittest.TestResult())


def skipped(decorator) -> bool:
    class Case(unittest.TestCase):
        @decorator
        def test(self):
            pass

    @decorator
    class WholeCase(unittest.TestCase):
        def test(self):
            pass

    results = [run_case(case) for case in (Case, WholeCase)]
    assert all(result.wasSuccessful() and result.testsRun == 1 for result in results)
    (first, second) = (bool(result.skipped) for result in results)
    assert first is second
    return first


@pytest.mark.parametrize("name", [name for name in testing.__all__ if name.startswith("require_")])
def test_a_requirement_decides_once(name):
    decorator = getattr(testing, name)
    if name == "require_torch_min_version":
        decorator = decorator(version="2.6.0")
    assert isinstance(skipped(decorator), bool)


@pytest.mark.parametrize("name", ["require_cpu", "require_transformers", "require_huggingface_suite", "require_fsdp"])
def test_what_is_here_runs(name):
    if name == "require_cpu" and testing.torch_device != "cpu":
        pytest.skip("there is an accelerator")
    if name == "require_huggingface_suite":
        pytest.importorskip("datasets")
    assert not skipped(getattr(testing, name))


@pytest.mark.parametrize("name", ["require_npu", "require_musa", "require_multi_gpu_or_xpu", "require_aim"])
def test_what_is_missing_is_skipped_with_a_reason(name):
    if name == "require_multi_gpu_or_xpu" and testing.device_count > 1:
        pytest.skip("there are several")
    decorator = getattr(testing, name)
    assert skipped(decorator)

    class Case(unittest.TestCase):
        @decorator
        def test(self):
            pass

    assert run_case(Case).skipped[0][1].startswith("requires ")


def test_a_decorated_function_runs_under_pytest_too():
    @testing.require_aim
    def test():
        raise AssertionError

    with pytest.raises(unittest.SkipTest, match="aim"):
        test()


def test_torch_version():
    assert skipped(testing.require_torch_min_version(version="99.0"))
    assert not skipped(testing.require_torch_min_version(version="2.0.0"))
    assert not skipped(lambda test: testing.require_torch_min_version(test, "2.0.0"))
    with pytest.raises(ValueError, match="version"):
        testing.require_torch_min_version(lambda: None)


@pytest.mark.parametrize(("value", "expected"), [(None, True), ("0", True), ("1", False), ("yes", False)])
def test_slow(monkeypatch, value, expected):
    monkeypatch.delenv("RUN_SLOW", raising=False)
    if value is not None:
        monkeypatch.setenv("RUN_SLOW", value)
    assert skipped(testing.slow) is expected
    assert skipped(testing.skip)


def test_launch_command():
    command = testing.get_launch_command(num_processes=2, cpu=True, multi_gpu=False, config_file=None)
    assert command == ["accelerate", "launch", "--num_processes=2", "--cpu"]
    assert testing.DEFAULT_LAUNCH_COMMAND[:2] == ["accelerate", "launch"]
    assert f"--num_processes={testing.device_count}" in testing.DEFAULT_LAUNCH_COMMAND


def test_run_command():
    assert testing.run_command([sys.executable, "-c", "print('a')"]) is None
    assert testing.run_command([sys.executable, "-c", "print('a b')"], return_stdout=True) == "a b\n"
    code = "import os; print(os.environ.get('GREETING'))"
    env = {**os.environ, "GREETING": "hello"}
    assert testing.run_command([sys.executable, "-c", code], return_stdout=True, env=env) == "hello\n"
    with pytest.raises(testing.SubprocessCallException, match=r"(?s)exit code 3.*on stderr"):
        testing.run_command([sys.executable, "-c", "import sys; print('on stderr', file=sys.stderr); sys.exit(3)"])


def test_execute_subprocess_async(capfd):
    code = "import sys; print('out'); print('more'); print('err', file=sys.stderr)"
    result = testing.execute_subprocess_async([sys.executable, "-c", code], env=dict(os.environ))
    assert (result.returncode, result.stdout, result.stderr) == (0, ["out", "more"], ["err"])
    shown = capfd.readouterr()
    assert "Running: " in shown.out
    assert "out\nmore\n" in shown.out
    assert shown.err == "err\n"
    assert testing.execute_subprocess_async([sys.executable, "-c", code], quiet=True, echo=False) == result
    assert capfd.readouterr() == ("", "")


def test_a_failing_or_endless_subprocess_raises_with_its_output():
    with pytest.raises(RuntimeError, match=r"(?s)exit code 3.*what went wrong"):
        testing.execute_subprocess_async(
            [sys.executable, "-c", "raise SystemExit(print('what went wrong') or 3)"], quiet=True
        )
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"
    with pytest.raises(TimeoutError, match="did not end within 5 s") as caught:
        testing.execute_subprocess_async([sys.executable, "-c", code], timeout=5, quiet=True)
    process = int(str(caught.value).split("stdout:\n")[1].split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_launched_script_is_run_to_its_end(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from accelerate import PartialState\nprint('ranks', PartialState(cpu=True).num_processes)\n")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *testing.get_launch_command(cpu=True)[1:]]
    result = testing.execute_subprocess_async([*command, "--num_processes=1", script], quiet=True)
    assert "ranks 1" in result.stdout


def test_assertions():
    with testing.assert_exception(ValueError, "two"):
        raise ValueError("one two three")
    for raised, match in ((ValueError("other"), "message with 'two'"), (KeyError("two"), "got KeyError")):
        with pytest.raises(AssertionError, match=match), testing.assert_exception(ValueError, "two"):
            raise raised
    with pytest.raises(AssertionError, match="nothing was raised"), testing.assert_exception(ValueError):
        pass
    assert testing.capture_call_output(print, "a", "b", sep="-") == "a-b\n"
    assert testing.path_in_accelerate_package("test_utils", "testing.py").samefile(testing.__file__)


def test_ports_of_xdist_workers(monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert testing.get_torch_dist_unique_port() == 29500
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw3")
    assert testing.get_torch_dist_unique_port() == 29503


def compare(same: bool) -> bool:
    rank = PartialState(cpu=True).process_index
    return testing.are_the_same_tensors(torch.tensor([1.0, 0.0 if same else rank]))


def test_tensors_of_ranks_are_compared(run_ranks):
    assert run_ranks(2, compare, True) == [True, True]
    assert run_ranks(2, compare, False) == [False, False]


def test_a_test_case_resets_the_state():
    class Case(testing.AccelerateTestCase):
        def test(self):
            accelerate.Accelerator(cpu=True)

    assert run_case(Case).wasSuccessful()
    assert not AcceleratorState._shared_state
    assert not PartialState._shared_state


def test_a_temporary_folder_is_emptied_and_removed():
    folders = []

    class Case(testing.TempDirTestCase):
        def test_one(self):
            folders.append(self.tmpdir)
            assert not list(self.tmpdir.iterdir())
            (self.tmpdir / "file").write_text("")
            (self.tmpdir / "folder").mkdir()

        test_two = test_one

    class Keeping(Case):
        clear_on_setup = False

        def test_one(self):
            (self.tmpdir / "file").write_text("")

        def test_two(self):
            assert (self.tmpdir / "file").exists()

    assert run_case(Case).wasSuccessful()
    assert run_case(Keeping).wasSuccessful()
    assert len(folders) == 2
    assert not any(folder.exists() for folder in folders)


def test_mocks_are_undone():
    from unittest import mock

    class Case(testing.MockingTestCase):
        def test_one(self):
            self.add_mocks(mock.patch.object(Case, "attribute", 2, create=True))
            self.add_mocks([mock.patch.dict(os.environ, {"MOCKED": "1"})])
            assert (Case.attribute, os.environ["MOCKED"]) == (2, "1")

    assert run_case(Case).wasSuccessful()
    assert not hasattr(Case, "attribute")
    assert "MOCKED" not in os.environ
