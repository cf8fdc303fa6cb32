"""Helpers for tests of code that runs on Accelerate: devices, skip decorators, subprocesses and base classes.

Test suites of other libraries import these names. They run under unittest and pytest; pytest itself is optional.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
import threading
import unittest
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, overload

import accelerate

from ..runtime import devices
from ..runtime.system import availability
from ..settings.env import get, parse_flag_from_env, snapshot
from ..state import AcceleratorState, GradientState, PartialState

if TYPE_CHECKING:
    import torch

_TestT = TypeVar("_TestT", bound=Callable[..., Any])


# Devices --------------------------------------------------------------------------------------------------------------


def get_backend() -> tuple[str, int, Callable[..., int]]:
    """Returns the default device type, the number of such devices, and a memory counter.

    Returns:
        The type (``"cuda"``, ``"cpu"`` …), how many devices of it this process sees (1 for the CPU), and a function
        that returns the bytes that torch has allocated on the current device (0 where torch does not count them).
    """
    kind = devices.default_kind()
    module = kind.torch_module()
    allocated = getattr(module, "memory_allocated", None) or getattr(module, "current_allocated_memory", None)
    return kind.name, kind.count(), allocated or _no_memory_allocated


def _no_memory_allocated(*_: Any, **__: Any) -> int:
    return 0


torch_device, device_count, memory_allocated_func = get_backend()


# Skipping -------------------------------------------------------------------------------------------------------------


class _Decorator(Protocol):
    def __call__(self, test_case: _TestT, /) -> _TestT: ...


def skip(test_case: _TestT) -> _TestT:
    """Decorator: skips a test or a test class."""
    return unittest.skip("skipped by its author")(test_case)


def slow(test_case: _TestT) -> _TestT:
    """Decorator: skips a slow test unless the variable ``RUN_SLOW`` is true."""
    return unittest.skipUnless(parse_flag_from_env("RUN_SLOW"), "slow: set RUN_SLOW=1 to run it")(test_case)


def _requires(what: str, is_met: Callable[[], bool]) -> _Decorator:
    def decorate(test_case: _TestT, /) -> _TestT:
        return unittest.skipUnless(is_met(), f"requires {what}")(test_case)

    decorate.__doc__ = f"Decorator: skips a test or a test class unless there is {what}."
    return decorate


def _has(*kinds: str) -> Callable[[], bool]:
    return lambda: torch_device in kinds


def _lacks(*kinds: str) -> Callable[[], bool]:
    return lambda: torch_device not in kinds


def _has_single(*kinds: str) -> Callable[[], bool]:
    return lambda: torch_device != "cpu" and device_count == 1 and (not kinds or torch_device in kinds)


def _has_several(*kinds: str) -> Callable[[], bool]:
    return lambda: device_count > 1 and (not kinds or torch_device in kinds)


require_cpu = _requires("no accelerator, only the CPU", _has("cpu"))
require_non_cpu = _requires("an accelerator", _lacks("cpu"))
require_cuda = _requires("a CUDA device", _has("cuda"))
require_xpu = _requires("an Intel GPU", _has("xpu"))
require_non_xpu = _requires("a device other than an Intel GPU", _lacks("xpu"))
require_hpu = _requires("an Intel Gaudi", _has("hpu"))
require_non_hpu = _requires("a device other than an Intel Gaudi", _lacks("hpu"))
require_cuda_or_hpu = _requires("a CUDA device or an Intel Gaudi", _has("cuda", "hpu"))
require_cuda_or_xpu = _requires("a CUDA device or an Intel GPU", _has("cuda", "xpu"))
require_mlu = _requires("a Cambricon MLU", _has("mlu"))
require_musa = _requires("a Moore Threads GPU", _has("musa"))
require_npu = _requires("an Ascend NPU", _has("npu"))
require_neuron = _requires("an AWS Neuron core", _has("neuron"))
require_sdaa = _requires("a Tecorigin SDAA device", _has("sdaa"))
require_mps = _requires("an Apple GPU", _has("mps"))
require_tpu = _requires("a TPU", lambda: availability.is_torch_xla_available(check_is_tpu=True))
require_non_torch_xla = _requires("a run without torch_xla", lambda: not availability.is_torch_xla_available())
require_single_device = _requires("exactly one accelerator", _has_single())
require_single_gpu = _requires("exactly one CUDA device", _has_single("cuda"))
require_single_xpu = _requires("exactly one Intel GPU", _has_single("xpu"))
require_multi_device = _requires("more than one accelerator", _has_several())
require_multi_gpu = _requires("more than one CUDA device", _has_several("cuda"))
require_multi_xpu = _requires("more than one Intel GPU", _has_several("xpu"))
require_multi_gpu_or_xpu = _requires("more than one CUDA device or Intel GPU", _has_several("cuda", "xpu"))

require_bf16 = _requires("a device that computes in bfloat16", availability.is_bf16_available)
require_fp16 = _requires("a device that computes in float16", availability.is_fp16_available)
require_fp8 = _requires("a library for fp8 training", availability.is_fp8_available)
require_fsdp = _requires("torch.distributed", availability.is_torch_distributed_available)
require_fsdp2 = _requires("torch 2.6 or later", lambda: availability.is_torch_version(">=", "2.6.0"))
require_tp = _requires("torch 2.3 or later", lambda: availability.is_torch_version(">=", "2.3.0"))
require_pippy = _requires("torch.distributed.pipelining", availability.is_pippy_available)

require_bnb = _requires("bitsandbytes", availability.is_bnb_available)
require_deepspeed = _requires("deepspeed", availability.is_deepspeed_available)
require_torchao = _requires("torchao", availability.is_torchao_available)
require_transformer_engine = _requires("TransformerEngine", availability.is_transformer_engine_available)
require_transformer_engine_mxfp8 = _requires("MXFP8 support", availability.is_transformer_engine_mxfp8_available)
require_transformers = _requires("transformers", availability.is_transformers_available)
require_huggingface_suite = _requires(
    "transformers and datasets",
    lambda: availability.is_transformers_available() and availability.is_datasets_available(),
)
require_timm = _requires("timm", availability.is_timm_available)
require_torchvision = _requires("torchvision", availability.is_torchvision_available)
require_triton = _requires("triton", availability.is_triton_available)
require_schedulefree = _requires("schedulefree", availability.is_schedulefree_available)
require_lomo = _requires("lomo-optim", availability.is_lomo_available)
require_import_timer = _requires("import-timer", availability.is_import_timer_available)
require_torchdata_stateful_dataloader = _requires(
    "torchdata with StatefulDataLoader", availability.is_torchdata_stateful_dataloader_available
)
require_pandas = _requires("pandas", availability.is_pandas_available)
require_matplotlib = _requires("matplotlib", availability.is_matplotlib_available)

require_aim = _requires("aim", availability.is_aim_available)
require_clearml = _requires("clearml", availability.is_clearml_available)
require_comet_ml = _requires("comet_ml", availability.is_comet_ml_available)
require_dvclive = _requires("dvclive", availability.is_dvclive_available)
require_mlflow = _requires("mlflow", availability.is_mlflow_available)
require_swanlab = _requires("swanlab", availability.is_swanlab_available)
require_tensorboard = _requires("tensorboard", availability.is_tensorboard_available)
require_trackio = _requires("trackio", availability.is_trackio_available)
require_wandb = _requires("wandb", availability.is_wandb_available)
require_trackers = _requires(
    "wandb or tensorboard", lambda: availability.is_wandb_available() or availability.is_tensorboard_available()
)


@overload
def require_torch_min_version(test_case: _TestT, version: str) -> _TestT: ...
@overload
def require_torch_min_version(test_case: None = None, *, version: str) -> Callable[[_TestT], _TestT]: ...


def require_torch_min_version(test_case: Any = None, version: str | None = None) -> Any:
    """Decorator: skips a test or a test class with an older torch; called with the version alone, returns the decorator.

    Args:
        test_case: The test or test class.
        version: The oldest torch the test runs with, such as ``"2.6.0"``.

    Raises:
        ValueError: when no version is given.
    """
    if version is None:
        raise ValueError('require_torch_min_version needs version="2.6.0" or another release.')
    decorator = _requires(f"torch {version} or later", lambda: availability.is_torch_version(">=", version))
    return decorator if test_case is None else decorator(test_case)


def run_first(test_case: _TestT) -> _TestT:
    """Decorator: marks a test for pytest-order to run before the others. Needs pytest."""
    import pytest

    marked: _TestT = pytest.mark.order(1)(test_case)
    return marked


# Subprocesses ---------------------------------------------------------------------------------------------------------


def get_launch_command(**kwargs: Any) -> list[str]:
    """Returns the words of ``accelerate launch`` with flags; append a script and its arguments.

    Args:
        **kwargs: Flags: ``True`` adds ``--name``, ``False`` and ``None`` add nothing, another value ``--name=value``.
    """
    command = ["accelerate", "launch"]
    for name, value in kwargs.items():
        if value is True:
            command.append(f"--{name}")
        elif value is not None and value is not False:
            command.append(f"--{name}={value}")
    return command


DEFAULT_LAUNCH_COMMAND = get_launch_command(num_processes=device_count, monitor_interval=0.1)


class SubprocessCallException(Exception):
    """Raised by `run_command` for a command that fails, with the command's output."""


def run_command(
    command: Sequence[str | Path], return_stdout: bool = False, env: Mapping[str, str] | None = None
) -> str | None:
    """Runs a command and waits for it.

    Args:
        command: The program and its arguments; no shell reads them.
        return_stdout: Return the output of the command, stdout and stderr.
        env: The command's whole environment. Defaults to this process's.

    Raises:
        SubprocessCallException: when the exit code is not 0.
    """
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(env) if env is not None else snapshot(),
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise SubprocessCallException(
            f"`{' '.join(words)}` failed with exit code {done.returncode} and this output:\n\n{done.stdout}"
        )
    return done.stdout if return_stdout else None


@dataclass
class SubprocessOutput:
    """Result of `execute_subprocess_async`.

    Attributes:
        returncode: The exit code.
        stdout: Lines of stdout, without their ends.
        stderr: Lines of stderr, without their ends.
    """

    returncode: int
    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)


def execute_subprocess_async(
    cmd: Sequence[str | Path],
    env: Mapping[str, str] | None = None,
    stdin: int | IO[Any] | None = None,
    timeout: float = 180,
    quiet: bool = False,
    echo: bool = True,
) -> SubprocessOutput:
    """Runs a command, waits for it and shows its output while it runs.

    Args:
        cmd: The program and its arguments; no shell reads them.
        env: The command's whole environment. Defaults to this process's.
        stdin: As in `subprocess.Popen`.
        timeout: Seconds after which the command is terminated.
        quiet: Do not show its output.
        echo: Print the command first.

    Raises:
        RuntimeError: when the exit code is not 0, with the output.
        TimeoutError: after the timeout, with the output so far.
    """
    words = [str(word) for word in cmd]
    if echo:
        print("\nRunning: ", " ".join(words))
    process = subprocess.Popen(
        words,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(env) if env is not None else None,
        text=True,
        errors="replace",
    )
    result = SubprocessOutput(returncode=0)
    outputs = ((process.stdout, result.stdout, sys.stdout), (process.stderr, result.stderr, sys.stderr))
    readers = [
        threading.Thread(target=_read_lines, args=(stream, lines, None if quiet else shown), daemon=True)
        for stream, lines, shown in outputs
    ]
    for reader in readers:
        reader.start()
    try:
        result.returncode = process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"`{' '.join(words)}` did not end within {timeout} s.{_quoted(result)}") from None
    finally:
        _end(process)
        for reader in readers:
            reader.join(10)  # not forever: a grandchild may have inherited the pipe
    if result.returncode != 0:
        raise RuntimeError(f"`{' '.join(words)}` failed with exit code {result.returncode}.{_quoted(result)}")
    return result


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    process.terminate()  # a launcher ends its ranks
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _read_lines(stream: IO[str], lines: list[str], shown: IO[str] | None) -> None:
    with stream:
        for line in stream:
            lines.append(line.rstrip("\n"))
            if shown is not None:
                shown.write(line)
                shown.flush()


def _quoted(result: SubprocessOutput) -> str:
    return "\n\nstdout:\n" + "\n".join(result.stdout) + "\n\nstderr:\n" + "\n".join(result.stderr)


def pytest_xdist_worker_id() -> int:
    """Returns the number of the pytest-xdist worker that this process is; 0 without pytest-xdist."""
    return int((get("PYTEST_XDIST_WORKER") or "gw0").removeprefix("gw"))


def get_torch_dist_unique_port() -> int:
    """Returns a rendezvous port that no other pytest-xdist worker on this host uses: 29500 plus the worker's number."""
    return 29500 + pytest_xdist_worker_id()


def path_in_accelerate_package(*components: str) -> Path:
    """Returns the path of a file inside the installed package."""
    return Path(accelerate.__file__).parent.joinpath(*components)


# Assertions and base classes ------------------------------------------------------------------------------------------


@contextmanager
def assert_exception(exception_class: type[BaseException], msg: str | None = None) -> Iterator[None]:
    """Context in which an exception must be raised.

    Args:
        exception_class: The expected class or a base class of it.
        msg: Text that the exception's message must contain.

    Raises:
        AssertionError: when nothing, an exception of another class or one with another message is raised.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, exception_class):
            raise AssertionError(f"expected {exception_class.__name__}, got {type(error).__name__}: {error}") from error
        if msg is not None and msg not in str(error):
            raise AssertionError(f"expected a message with {msg!r}, got {str(error)!r}") from error
    else:
        raise AssertionError(f"expected {exception_class.__name__}, and nothing was raised")


def capture_call_output(func: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Returns the output of a call to stdout."""
    output = io.StringIO()
    with redirect_stdout(output):
        func(*args, **kwargs)
    return output.getvalue()


def are_the_same_tensors(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor has the same values on every rank; every rank calls it with the same shape and dtype."""
    from ..runtime.collectives import gather

    everywhere = gather(tensor.detach().to(PartialState().device).unsqueeze(0))
    return bool((everywhere == everywhere[:1]).all())


class AccelerateTestCase(unittest.TestCase):
    """Test case that resets the shared state after every test, so that each creates its own `Accelerator`."""

    def tearDown(self) -> None:
        """Resets the shared state."""
        super().tearDown()
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


class TempDirTestCase(unittest.TestCase):
    """Test case with one temporary folder for its class.

    Attributes:
        clear_on_setup: Empty the folder before every test.
        tmpdir: The folder.
    """

    clear_on_setup: ClassVar[bool] = True
    tmpdir: ClassVar[Path]

    @classmethod
    def setUpClass(cls) -> None:
        """Creates the folder."""
        super().setUpClass()
        cls.tmpdir = Path(tempfile.mkdtemp())

    @classmethod
    def tearDownClass(cls) -> None:
        """Removes the folder."""
        shutil.rmtree(cls.tmpdir, ignore_errors=True)
        super().tearDownClass()

    def setUp(self) -> None:
        """Empties the folder."""
        super().setUp()
        if self.clear_on_setup:
            for path in self.tmpdir.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


class MockingTestCase(unittest.TestCase):
    """Test case that undoes its patches after every test."""

    def add_mocks(self, mocks: Any) -> None:
        """Starts a patcher of `unittest.mock`, or several; each is stopped after the test."""
        for patcher in mocks if isinstance(mocks, (list, tuple)) else [mocks]:
            patcher.start()
            self.addCleanup(patcher.stop)


__all__ = sorted(  # noqa: PLE0605 - names are computed
    [name for name in globals() if name.startswith("require_")]
    + [
        "DEFAULT_LAUNCH_COMMAND",
        "AccelerateTestCase",
        "MockingTestCase",
        "SubprocessCallException",
        "SubprocessOutput",
        "TempDirTestCase",
        "are_the_same_tensors",
        "assert_exception",
        "capture_call_output",
        "device_count",
        "execute_subprocess_async",
        "get_backend",
        "get_launch_command",
        "get_torch_dist_unique_port",
        "memory_allocated_func",
        "parse_flag_from_env",
        "path_in_accelerate_package",
        "pytest_xdist_worker_id",
        "run_command",
        "run_first",
        "skip",
        "slow",
        "torch_device",
    ]
)
