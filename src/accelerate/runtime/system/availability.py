"""Checks for packages, versions and capabilities: the documented ``is_*_available`` functions and version comparisons.

Package checks do not import the package, and are cached. Only device checks import torch; importlib.metadata and packaging
are imported on first use, since their import takes longer than most callers run.
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
        requirement_version: The version on the right-hand side. If it has no local part (``+cpu``), that of the left-hand
            side is ignored: torch 2.13.0+cpu equals 2.13.0.

    Raises:
        ValueError: for another operation, or an invalid version on the right-hand side.
        importlib.metadata.PackageNotFoundError: if the library is not installed.

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
    """Returns whether `package` can be imported.

    A folder of that name in the working directory (such as ``wandb``) is importable as an empty namespace package, which
    counts only if one of `distributions` (by default `package`) is installed.
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
    """Returns whether the tracker aim is installed."""
    return _is_installed("aim")


def is_amdsmi_available() -> bool:
    """Returns whether AMD's management library is installed."""
    return _is_installed("amdsmi")


def is_bnb_available(min_version: str | None = None) -> bool:
    """Returns whether bitsandbytes is installed, at `min_version` or later if one is given."""
    return _is_installed("bitsandbytes") and (min_version is None or _is_at_least("bitsandbytes", min_version))


def is_4bit_bnb_available() -> bool:
    """Returns whether bitsandbytes is installed with 4-bit layers (0.39 or later)."""
    return is_bnb_available(min_version="0.39.0")


def is_8bit_bnb_available() -> bool:
    """Returns whether bitsandbytes is installed with 8-bit layers that can be saved (0.37.2 or later)."""
    return is_bnb_available(min_version="0.37.2")


def is_bitsandbytes_multi_backend_available() -> bool:
    """Returns whether the installed bitsandbytes supports devices other than CUDA; imports it."""
    if not is_bnb_available():
        return False
    return "multi_backend" in getattr(importlib.import_module("bitsandbytes"), "features", set())


def is_boto3_available() -> bool:
    """Returns whether the AWS SDK is installed."""
    return _is_installed("boto3")


def is_clearml_available() -> bool:
    """Returns whether the tracker ClearML is installed."""
    return _is_installed("clearml")


def is_comet_ml_available() -> bool:
    """Returns whether the tracker Comet is installed."""
    return _is_installed("comet_ml", "comet-ml")


def is_datasets_available() -> bool:
    """Returns whether datasets is installed."""
    return _is_installed("datasets")


def is_deepspeed_available() -> bool:
    """Returns whether DeepSpeed is installed."""
    return _is_installed("deepspeed")


def is_dvclive_available() -> bool:
    """Returns whether the tracker DVCLive is installed."""
    return _is_installed("dvclive")


def is_import_timer_available() -> bool:
    """Returns whether import-timer is installed."""
    return _is_installed("import_timer", "import-timer")


def is_lomo_available() -> bool:
    """Returns whether the LOMO optimizers are installed."""
    return _is_installed("lomo_optim", "lomo-optim")


def is_matplotlib_available() -> bool:
    """Returns whether matplotlib is installed."""
    return _is_installed("matplotlib")


def is_megatron_lm_available() -> bool:
    """Returns whether Megatron-LM is installed and enabled by the launcher (``ACCELERATE_USE_MEGATRON_LM``)."""
    return env.flag("ACCELERATE_USE_MEGATRON_LM") and _is_installed("megatron", "megatron-core", "megatron-lm")


def is_mlflow_available() -> bool:
    """Returns whether the tracker MLflow is installed, in full or as mlflow-skinny."""
    return _is_installed("mlflow", "mlflow", "mlflow-skinny")


def is_msamp_available() -> bool:
    """Returns whether MS-AMP is installed."""
    return _is_installed("msamp", "ms-amp")


def is_pandas_available() -> bool:
    """Returns whether pandas is installed."""
    return _is_installed("pandas")


def is_peft_available() -> bool:
    """Returns whether peft is installed."""
    return _is_installed("peft")


def is_pippy_available() -> bool:
    """Returns whether torch has ``torch.distributed.pipelining`` (2.4 or later)."""
    return is_torch_version(">=", "2.4.0")


def is_pynvml_available() -> bool:
    """Returns whether NVIDIA's management library is installed."""
    return _is_installed("pynvml", "nvidia-ml-py", "pynvml")


def is_pytest_available() -> bool:
    """Returns whether pytest is installed."""
    return _is_installed("pytest")


def is_rich_available() -> bool:
    """Returns whether rich is installed and enabled by ``ACCELERATE_ENABLE_RICH=true``."""
    return _is_installed("rich") and env.flag("ACCELERATE_ENABLE_RICH")


def is_sagemaker_available() -> bool:
    """Returns whether the SageMaker SDK is installed."""
    return _is_installed("sagemaker")


def is_schedulefree_available() -> bool:
    """Returns whether the schedule-free optimizers are installed."""
    return _is_installed("schedulefree")


def is_swanlab_available() -> bool:
    """Returns whether the tracker SwanLab is installed."""
    return _is_installed("swanlab")


def is_tensorboard_available() -> bool:
    """Returns whether TensorBoard or tensorboardX is installed."""
    return _is_installed("tensorboard") or _is_installed("tensorboardX")


def is_timm_available() -> bool:
    """Returns whether timm is installed."""
    return _is_installed("timm")


def is_torchao_available() -> bool:
    """Returns whether torchao is installed in a version with float8 training (0.6.1 or later)."""
    return _is_installed("torchao") and _is_at_least("torchao", "0.6.1")


def is_torchdata_available() -> bool:
    """Returns whether torchdata is installed."""
    return _is_installed("torchdata")


def is_torchdata_stateful_dataloader_available() -> bool:
    """Returns whether torchdata is installed in a version with `StatefulDataLoader` (0.8 or later)."""
    return _is_installed("torchdata") and _is_at_least("torchdata", "0.8.0")


def is_torchvision_available() -> bool:
    """Returns whether torchvision is installed."""
    return _is_installed("torchvision")


def is_tqdm_available() -> bool:
    """Returns whether tqdm is installed."""
    return _is_installed("tqdm")


def is_trackio_available() -> bool:
    """Returns whether the tracker Trackio is installed."""
    return _is_installed("trackio")


def is_transformer_engine_available() -> bool:
    """Returns whether TransformerEngine is installed with its torch layers, which the main wheel alone lacks."""
    if not _is_installed("transformer_engine"):
        return False
    # Looks for the file: find_spec of a submodule imports the parent package, which loads CUDA libraries.
    spec = importlib.util.find_spec("transformer_engine")
    folders = spec.submodule_search_locations or [] if spec is not None else []
    return any((Path(folder) / "pytorch" / "__init__.py").is_file() for folder in folders)


def is_transformers_available() -> bool:
    """Returns whether transformers is installed."""
    return _is_installed("transformers")


def is_triton_available() -> bool:
    """Returns whether Triton is installed."""
    return _is_installed("triton", "triton", "pytorch-triton", "pytorch-triton-xpu")


def is_wandb_available() -> bool:
    """Returns whether the tracker Weights & Biases is installed."""
    return _is_installed("wandb")


def is_numpy_available(min_version: str = "1.25.0") -> bool:
    """Returns whether numpy is installed at `min_version` or later."""
    return _is_at_least("numpy", min_version)


# Devices --------------------------------------------------------------------------------------------------------------


def is_cuda_available() -> bool:
    """Returns whether an NVIDIA or AMD GPU is available; initializes no device, so that the process may still fork."""
    with env.patch_environment(PYTORCH_NVML_BASED_CUDA_CHECK="1"):
        return devices.DEVICES["cuda"].is_available()


def is_rocm_available() -> bool:
    """Returns whether torch was built for ROCm and an AMD GPU is available."""
    if not is_cuda_available():
        return False
    import torch

    return torch.version.hip is not None


def is_mps_available(min_version: str = "1.12") -> bool:
    """Returns whether Apple's GPU is available, with torch at `min_version` or later."""
    return is_torch_version(">=", min_version) and devices.DEVICES["mps"].is_available()


def _is_device_available(name: str, check_device: bool) -> bool:
    kind = devices.DEVICES[name]
    if check_device:
        return kind.count() > 0
    return kind.is_available()


@functools.lru_cache
def is_mlu_available(check_device: bool = False) -> bool:
    """Returns whether a Cambricon MLU is available; `check_device` also counts the devices."""
    return _is_device_available("mlu", check_device)


@functools.lru_cache
def is_musa_available(check_device: bool = False) -> bool:
    """Returns whether a Moore Threads GPU is available; `check_device` also counts the devices."""
    return _is_device_available("musa", check_device)


@functools.lru_cache
def is_npu_available(check_device: bool = False) -> bool:
    """Returns whether a Huawei Ascend NPU is available; `check_device` also counts the devices."""
    return _is_device_available("npu", check_device)


@functools.lru_cache
def is_sdaa_available(check_device: bool = False) -> bool:
    """Returns whether a Tecorigin SDAA device is available; `check_device` also counts the devices."""
    return _is_device_available("sdaa", check_device)


@functools.lru_cache
def is_neuron_available(check_device: bool = False) -> bool:
    """Returns whether an AWS Neuron core is available; `check_device` also counts the devices."""
    return _is_device_available("neuron", check_device)


@functools.lru_cache
def is_xpu_available(check_device: bool = False) -> bool:
    """Returns whether an Intel GPU is available; `check_device` also counts the devices."""
    return _is_device_available("xpu", check_device)


@functools.lru_cache
def is_hpu_available(init_hccl: bool = False) -> bool:
    """Returns whether an Intel Gaudi is available; `init_hccl` also loads its communication library."""
    if not devices.DEVICES["hpu"].is_available():
        return False
    if init_hccl:
        importlib.import_module("habana_frameworks.torch.distributed.hccl")
    return True


def is_habana_gaudi1() -> bool:
    """Returns whether the Intel Gaudi is of the first generation, which does not support fp16."""
    if not is_hpu_available():
        return False
    hpu = importlib.import_module("habana_frameworks.torch.hpu")
    return "GAUDI2" not in (name := str(hpu.get_device_name()).upper()) and "GAUDI3" not in name


@functools.lru_cache
def is_torch_xla_available(check_is_tpu: bool = False, check_is_gpu: bool = False) -> bool:
    """Returns whether torch_xla is installed and enabled (``USE_TORCH_XLA``), and its device is a TPU or GPU if requested.

    Raises:
        ValueError: if both are set.
    """
    if check_is_tpu and check_is_gpu:
        raise ValueError("check_is_tpu and check_is_gpu exclude each other: set one of them.")
    if not devices.DEVICES["xla"].is_available() or not env.flag("USE_TORCH_XLA", default=True):
        return False
    if not (check_is_tpu or check_is_gpu):
        return True
    hardware = importlib.import_module("torch_xla.runtime").device_type()
    return hardware == "TPU" if check_is_tpu else hardware in ("GPU", "CUDA")


def is_xccl_available() -> bool:
    """Returns whether torch was built with Intel's xccl backend (2.7 or later)."""
    if is_torch_version("<", "2.7.0"):
        return False
    import torch.distributed

    return bool(torch.distributed.is_available() and torch.distributed.is_xccl_available())


def is_ipex_available() -> bool:
    """Returns whether Intel's extension is installed with the major and minor version of torch."""
    if not (_is_installed("intel_extension_for_pytorch") and _has_distribution("intel_extension_for_pytorch")):
        return False
    extension, torch = (_installed_version("intel_extension_for_pytorch"), _installed_version("torch"))
    return (extension.major, extension.minor) == (torch.major, torch.minor)


# Capabilities ---------------------------------------------------------------------------------------------------------


def is_torch_distributed_available() -> bool:
    """Returns whether torch was built with torch.distributed."""
    import torch.distributed

    return torch.distributed.is_available()


def is_weights_only_available() -> bool:
    """Returns whether ``torch.load(weights_only=True)`` supports additional safe classes (2.4 or later)."""
    return is_torch_version(">=", "2.4.0")


def is_bf16_available(ignore_tpu: bool = False) -> bool:
    """Returns whether the default device supports bfloat16.

    Args:
        ignore_tpu: Return False on a TPU.
    """
    kind = devices.default_kind()
    if kind.name == "xla":
        return not (ignore_tpu and is_torch_xla_available(check_is_tpu=True))
    return supports_bf16(kind)


def supports_bf16(kind: devices.DeviceKind) -> bool:
    """Returns whether the current device of a type supports bfloat16, natively or by emulation."""
    if kind.name == "mps":
        return int(platform.mac_ver()[0].split(".")[0] or 0) >= 14
    supported = getattr(kind.torch_module(), "is_bf16_supported", None)
    return True if supported is None else bool(supported())


def is_fp16_available() -> bool:
    """Returns whether the device supports float16, as all but the first Gaudi do."""
    return not is_habana_gaudi1()


def is_fp8_available() -> bool:
    """Returns whether a library for fp8 training is installed: MS-AMP, TransformerEngine or torchao."""
    return is_msamp_available() or is_transformer_engine_available() or is_torchao_available()


def is_transformer_engine_mxfp8_available() -> bool:
    """Returns whether TransformerEngine supports MXFP8 (scaling by blocks) on this device; imports it."""
    if not (is_transformer_engine_available() and is_cuda_available()):
        return False
    fp8 = importlib.import_module("transformer_engine.pytorch.fp8")
    supported, _ = fp8.check_mxfp8_support()
    return bool(supported)


# Requirements ---------------------------------------------------------------------------------------------------------


def deepspeed_required(func: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: the function raises ImportError if DeepSpeed is not installed."""
    return _required(func, is_deepspeed_available, "DeepSpeed", "deepspeed")


def torchao_required(func: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: the function raises ImportError if torchao is not installed."""
    return _required(func, is_torchao_available, "torchao 0.6.1 or later", "torchao")


def _required(func: Callable[_P, _R], is_here: Callable[[], bool], library: str, package: str) -> Callable[_P, _R]:
    @functools.wraps(func)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not is_here():
            name = getattr(func, "__qualname__", repr(func))
            raise ImportError(f"{name} needs {library}, which is not installed: `pip install {package}`.")
        return func(*args, **kwargs)

    return wrapped
