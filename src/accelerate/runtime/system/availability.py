"""Is a package, a version or a capability here? Every documented ``is_*_available`` and the version comparisons.

Packages are looked up, not imported, and the answer is kept. torch is imported only by the functions that ask about a
device; importlib.metadata and packaging, which take longer to import than most callers run, on first use too.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import operator
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ...settings import env
from .. import devices

if TYPE_CHECKING:
    from packaging.version import Version

_P = ParamSpec("_P")
_R = TypeVar("_R")

STR_OPERATION_TO_FUNC: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    "<": operator.lt,
}


# Versions -------------------------------------------------------------------------------------------------------------


def compare_versions(library_or_version: str | Version, operation: str, requirement_version: str) -> bool:
    """Compares a version, or that of an installed library, with a required one.

    Args:
        library_or_version: The name of an installed distribution (``"packaging"``), or a parsed version.
        operation: ``>``, ``>=``, ``==``, ``!=``, ``<=`` or ``<``.
        requirement_version: The version on the right-hand side. Without a local part (``+cpu``), that of the left-hand
            side does not count: torch 2.13.0+cpu equals 2.13.0.

    Raises:
        ValueError: for another operation, or a right-hand side that is no version.
        importlib.metadata.PackageNotFoundError: when the library is not installed.

    Example:
        >>> compare_versions("packaging", ">=", "1.0")
        True
    """
    from packaging.version import InvalidVersion, Version

    if operation not in STR_OPERATION_TO_FUNC:
        raise ValueError(f"operation={operation!r}: expected one of {', '.join(STR_OPERATION_TO_FUNC)}.")
    have = library_or_version if isinstance(library_or_version, Version) else _installed_version(library_or_version)
    try:
        need = Version(requirement_version)
    except InvalidVersion:
        raise ValueError(
            f"requirement_version={requirement_version!r} is not a version such as '2.4' or '1.0rc1'."
        ) from None
    if need.local is None:
        have = Version(have.public)
    return STR_OPERATION_TO_FUNC[operation](have, need)


def is_torch_version(operation: str, version: str) -> bool:
    """Compares the installed torch with a version; see `compare_versions`. Does not import torch."""
    return compare_versions("torch", operation, version)


@functools.lru_cache
def _installed_version(distribution: str) -> Version:
    import importlib.metadata

    from packaging.version import Version

    return Version(importlib.metadata.version(distribution))


# Packages -------------------------------------------------------------------------------------------------------------


@functools.lru_cache
def _is_installed(package: str, *distributions: str) -> bool:
    """Whether `package` can be imported.

    A folder of that name in the working directory (``wandb`` and ``mlruns`` leave such) imports as an empty namespace
    package; that counts only where one of `distributions` (else `package` itself) is installed.
    """
    if package in sys.modules:
        return sys.modules[package] is not None
    spec = importlib.util.find_spec(package)
    if spec is None:
        return False
    return spec.origin is not None or any(_has_distribution(name) for name in distributions or (package,))


def _has_distribution(name: str) -> bool:
    import importlib.metadata

    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _is_at_least(distribution: str, version: str) -> bool:
    return _has_distribution(distribution) and compare_versions(distribution, ">=", version)


def is_aim_available() -> bool:
    """Whether the tracker aim is installed."""
    return _is_installed("aim")


def is_amdsmi_available() -> bool:
    """Whether AMD's management library is installed."""
    return _is_installed("amdsmi")


def is_bnb_available(min_version: str | None = None) -> bool:
    """Whether bitsandbytes is installed, at `min_version` or later if one is given."""
    return _is_installed("bitsandbytes") and (min_version is None or _is_at_least("bitsandbytes", min_version))


def is_4bit_bnb_available() -> bool:
    """Whether bitsandbytes is installed and has 4-bit layers (0.39 or later)."""
    return is_bnb_available(min_version="0.39.0")


def is_8bit_bnb_available() -> bool:
    """Whether bitsandbytes is installed and has 8-bit layers that can be saved (0.37.2 or later)."""
    return is_bnb_available(min_version="0.37.2")


def is_bitsandbytes_multi_backend_available() -> bool:
    """Whether the installed bitsandbytes computes on more than CUDA devices; imports it."""
    if not is_bnb_available():
        return False
    return "multi_backend" in getattr(importlib.import_module("bitsandbytes"), "features", set())


def is_boto3_available() -> bool:
    """Whether the AWS SDK is installed."""
    return _is_installed("boto3")


def is_clearml_available() -> bool:
    """Whether the tracker ClearML is installed."""
    return _is_installed("clearml")


def is_comet_ml_available() -> bool:
    """Whether the tracker Comet is installed."""
    return _is_installed("comet_ml", "comet-ml")


def is_datasets_available() -> bool:
    """Whether datasets is installed."""
    return _is_installed("datasets")


def is_deepspeed_available() -> bool:
    """Whether DeepSpeed is installed."""
    return _is_installed("deepspeed")


def is_dvclive_available() -> bool:
    """Whether the tracker DVCLive is installed."""
    return _is_installed("dvclive")


def is_import_timer_available() -> bool:
    """Whether import-timer is installed."""
    return _is_installed("import_timer", "import-timer")


def is_lomo_available() -> bool:
    """Whether the LOMO optimizers are installed."""
    return _is_installed("lomo_optim", "lomo-optim")


def is_matplotlib_available() -> bool:
    """Whether matplotlib is installed."""
    return _is_installed("matplotlib")


def is_megatron_lm_available() -> bool:
    """Whether Megatron-LM is installed and the launcher asked for it (``ACCELERATE_USE_MEGATRON_LM``)."""
    return env.flag("ACCELERATE_USE_MEGATRON_LM") and _is_installed("megatron", "megatron-core", "megatron-lm")


def is_mlflow_available() -> bool:
    """Whether the tracker MLflow is installed, in full or as mlflow-skinny."""
    return _is_installed("mlflow", "mlflow", "mlflow-skinny")


def is_msamp_available() -> bool:
    """Whether MS-AMP is installed."""
    return _is_installed("msamp", "ms-amp")


def is_pandas_available() -> bool:
    """Whether pandas is installed."""
    return _is_installed("pandas")


def is_peft_available() -> bool:
    """Whether peft is installed."""
    return _is_installed("peft")


def is_pippy_available() -> bool:
    """Whether torch can run pipelines (``torch.distributed.pipelining``, since 2.4)."""
    return is_torch_version(">=", "2.4.0")


def is_pynvml_available() -> bool:
    """Whether NVIDIA's management library is installed."""
    return _is_installed("pynvml", "nvidia-ml-py", "pynvml")


def is_pytest_available() -> bool:
    """Whether pytest is installed."""
    return _is_installed("pytest")


def is_rich_available() -> bool:
    """Whether rich is installed and asked for with ``ACCELERATE_ENABLE_RICH=true``."""
    return _is_installed("rich") and env.flag("ACCELERATE_ENABLE_RICH")


def is_sagemaker_available() -> bool:
    """Whether the SageMaker SDK is installed."""
    return _is_installed("sagemaker")


def is_schedulefree_available() -> bool:
    """Whether the schedule-free optimizers are installed."""
    return _is_installed("schedulefree")


def is_swanlab_available() -> bool:
    """Whether the tracker SwanLab is installed."""
    return _is_installed("swanlab")


def is_tensorboard_available() -> bool:
    """Whether TensorBoard, or its stand-in tensorboardX, is installed."""
    return _is_installed("tensorboard") or _is_installed("tensorboardX")


def is_timm_available() -> bool:
    """Whether timm is installed."""
    return _is_installed("timm")


def is_torchao_available() -> bool:
    """Whether torchao is installed in a version with float8 training (0.6.1 or later)."""
    return _is_installed("torchao") and _is_at_least("torchao", "0.6.1")


def is_torchdata_available() -> bool:
    """Whether torchdata is installed."""
    return _is_installed("torchdata")


def is_torchdata_stateful_dataloader_available() -> bool:
    """Whether torchdata is installed in a version with `StatefulDataLoader` (0.8 or later)."""
    return _is_installed("torchdata") and _is_at_least("torchdata", "0.8.0")


def is_torchvision_available() -> bool:
    """Whether torchvision is installed."""
    return _is_installed("torchvision")


def is_tqdm_available() -> bool:
    """Whether tqdm is installed."""
    return _is_installed("tqdm")


def is_trackio_available() -> bool:
    """Whether the tracker Trackio is installed."""
    return _is_installed("trackio")


def is_transformer_engine_available() -> bool:
    """Whether TransformerEngine is installed with its layers for torch (the main wheel alone has none)."""
    if not _is_installed("transformer_engine"):
        return False
    # A look at the folder: find_spec of a submodule would import its parent, which loads CUDA libraries.
    spec = importlib.util.find_spec("transformer_engine")
    folders = spec.submodule_search_locations or [] if spec is not None else []
    return any((Path(folder) / "pytorch" / "__init__.py").is_file() for folder in folders)


def is_transformers_available() -> bool:
    """Whether transformers is installed."""
    return _is_installed("transformers")


def is_triton_available() -> bool:
    """Whether Triton is installed."""
    return _is_installed("triton", "triton", "pytorch-triton", "pytorch-triton-xpu")


def is_wandb_available() -> bool:
    """Whether the tracker Weights & Biases is installed."""
    return _is_installed("wandb")


def is_numpy_available(min_version: str = "1.25.0") -> bool:
    """Whether numpy is installed at `min_version` or later."""
    return _is_at_least("numpy", min_version)


# Devices --------------------------------------------------------------------------------------------------------------


def is_cuda_available() -> bool:
    """Whether an NVIDIA or AMD GPU can be used; sets no device up, so that forking stays possible."""
    with env.patch_environment(PYTORCH_NVML_BASED_CUDA_CHECK="1"):
        return devices.DEVICES["cuda"].is_available()


def is_rocm_available() -> bool:
    """Whether torch was built for AMD's ROCm and sees such a GPU."""
    if not is_cuda_available():
        return False
    import torch

    return torch.version.hip is not None


def is_mps_available(min_version: str = "1.12") -> bool:
    """Whether Apple's GPU can be used, with torch at `min_version` or later."""
    return is_torch_version(">=", min_version) and devices.DEVICES["mps"].is_available()


def _is_device_available(name: str, check_device: bool) -> bool:
    kind = devices.DEVICES[name]
    if check_device:
        return kind.count() > 0
    return kind.is_available()


@functools.lru_cache
def is_mlu_available(check_device: bool = False) -> bool:
    """Whether a Cambricon MLU can be used; `check_device` also counts the devices."""
    return _is_device_available("mlu", check_device)


@functools.lru_cache
def is_musa_available(check_device: bool = False) -> bool:
    """Whether a Moore Threads GPU can be used; `check_device` also counts the devices."""
    return _is_device_available("musa", check_device)


@functools.lru_cache
def is_npu_available(check_device: bool = False) -> bool:
    """Whether a Huawei Ascend NPU can be used; `check_device` also counts the devices."""
    return _is_device_available("npu", check_device)


@functools.lru_cache
def is_sdaa_available(check_device: bool = False) -> bool:
    """Whether a Tecorigin SDAA device can be used; `check_device` also counts the devices."""
    return _is_device_available("sdaa", check_device)


@functools.lru_cache
def is_neuron_available(check_device: bool = False) -> bool:
    """Whether an AWS Neuron core can be used; `check_device` also counts the devices."""
    return _is_device_available("neuron", check_device)


@functools.lru_cache
def is_xpu_available(check_device: bool = False) -> bool:
    """Whether an Intel GPU can be used; `check_device` also counts the devices."""
    return _is_device_available("xpu", check_device)


@functools.lru_cache
def is_hpu_available(init_hccl: bool = False) -> bool:
    """Whether an Intel Gaudi can be used; `init_hccl` also loads its communication library."""
    if not devices.DEVICES["hpu"].is_available():
        return False
    if init_hccl:
        importlib.import_module("habana_frameworks.torch.distributed.hccl")
    return True


def is_habana_gaudi1() -> bool:
    """Whether the Gaudi here is of the first generation, which knows no fp16."""
    if not is_hpu_available():
        return False
    hpu = importlib.import_module("habana_frameworks.torch.hpu")
    return "GAUDI2" not in (name := str(hpu.get_device_name()).upper()) and "GAUDI3" not in name


@functools.lru_cache
def is_torch_xla_available(check_is_tpu: bool = False, check_is_gpu: bool = False) -> bool:
    """Whether torch_xla is installed and allowed (``USE_TORCH_XLA``), and drives a TPU or a GPU if that is asked.

    Raises:
        ValueError: when both are asked.
    """
    if check_is_tpu and check_is_gpu:
        raise ValueError("check_is_tpu and check_is_gpu exclude each other: ask for one of them.")
    if not devices.DEVICES["xla"].is_available() or not env.flag("USE_TORCH_XLA", default=True):
        return False
    if not (check_is_tpu or check_is_gpu):
        return True
    hardware = importlib.import_module("torch_xla.runtime").device_type()
    return hardware == "TPU" if check_is_tpu else hardware in ("GPU", "CUDA")


def is_xccl_available() -> bool:
    """Whether torch was built with Intel's communication library (2.7 or later)."""
    if is_torch_version("<", "2.7.0"):
        return False
    import torch.distributed

    return bool(torch.distributed.is_available() and torch.distributed.is_xccl_available())


def is_ipex_available() -> bool:
    """Whether Intel's extension is installed for this very torch: both share major and minor version."""
    if not (_is_installed("intel_extension_for_pytorch") and _has_distribution("intel_extension_for_pytorch")):
        return False
    extension, torch = (_installed_version("intel_extension_for_pytorch"), _installed_version("torch"))
    return (extension.major, extension.minor) == (torch.major, torch.minor)


# Capabilities ---------------------------------------------------------------------------------------------------------


def is_torch_distributed_available() -> bool:
    """Whether torch was built with its distributed package."""
    import torch.distributed

    return torch.distributed.is_available()


def is_weights_only_available() -> bool:
    """Whether ``torch.load(weights_only=True)`` can be told which classes to allow (2.4 or later)."""
    return is_torch_version(">=", "2.4.0")


def is_bf16_available(ignore_tpu: bool = False) -> bool:
    """Whether the device that a process takes by default computes in bfloat16.

    Args:
        ignore_tpu: Say False on a TPU.
    """
    kind = devices.default_kind()
    if kind.name == "xla":
        return not (ignore_tpu and is_torch_xla_available(check_is_tpu=True))
    return supports_bf16(kind)


def supports_bf16(kind: devices.DeviceKind) -> bool:
    """Returns whether the current device of a kind computes in bfloat16, if only by emulation."""
    if kind.name == "mps":
        return int(platform.mac_ver()[0].split(".")[0] or 0) >= 14
    supported = getattr(kind.torch_module(), "is_bf16_supported", None)
    return True if supported is None else bool(supported())


def is_fp16_available() -> bool:
    """Whether the device here computes in float16: all do but the first Gaudi."""
    return not is_habana_gaudi1()


def is_fp8_available() -> bool:
    """Whether a library for 8-bit floating point training is installed: MS-AMP, TransformerEngine or torchao."""
    return is_msamp_available() or is_transformer_engine_available() or is_torchao_available()


def is_transformer_engine_mxfp8_available() -> bool:
    """Whether TransformerEngine can scale by blocks (MXFP8) here; imports it."""
    if not (is_transformer_engine_available() and is_cuda_available()):
        return False
    fp8 = importlib.import_module("transformer_engine.pytorch.fp8")
    supported, _ = fp8.check_mxfp8_support()
    return bool(supported)


# Requirements ---------------------------------------------------------------------------------------------------------


def deepspeed_required(func: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: calling the function without DeepSpeed raises ImportError saying what to install."""
    return _required(func, is_deepspeed_available, "DeepSpeed", "deepspeed")


def torchao_required(func: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: calling the function without torchao raises ImportError saying what to install."""
    return _required(func, is_torchao_available, "torchao 0.6.1 or later", "torchao")


def _required(func: Callable[_P, _R], is_here: Callable[[], bool], library: str, package: str) -> Callable[_P, _R]:
    @functools.wraps(func)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not is_here():
            name = getattr(func, "__qualname__", repr(func))
            raise ImportError(f"{name} needs {library}, which is not installed: `pip install {package}`.")
        return func(*args, **kwargs)

    return wrapped
