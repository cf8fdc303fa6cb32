"""What is installed, in which version, on which device."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from accelerate.runtime import devices
from accelerate.runtime.system import availability
from accelerate.settings import env

CASES = json.loads((Path(__file__).parents[3] / "data" / "settings_behaviors.json").read_text())
ON_A_CPU_BOX = next(case["output"] for case in CASES if case["name"] == "is_available_functions_cpu_box")
# Installed for these tests, but not where the case was observed.
INSTALLED_HERE = {
    f"is_{name}_available"
    for name in (
        *("datasets", "pandas", "peft", "pytest", "torchdata", "transformers", "matplotlib", "boto3", "timm"),
        "triton",  # comes with torch's builds for CUDA
    )
} | {name for name in ON_A_CPU_BOX if "bnb" in name or "bitsandbytes" in name}
PROBES = sorted(name for name in dir(availability) if name.startswith("is_") and name not in ("is_torch_version",))


@pytest.mark.parametrize("name", sorted(set(ON_A_CPU_BOX) - INSTALLED_HERE))
def test_as_observed_on_a_cpu_box(name):
    if availability.is_cuda_available() and ("cuda" in name or "bf16" in name):
        pytest.skip("observed on a machine without a GPU")
    # Observed: None where a package is missing. Ours says False.
    assert getattr(availability, name)() is bool(ON_A_CPU_BOX[name])


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_answers_true_or_false_without_arguments(name):
    assert getattr(availability, name)() in (True, False)
    assert all(
        parameter.default is not inspect.Parameter.empty
        for parameter in inspect.signature(getattr(availability, name)).parameters.values()
    )


def test_installed_packages_are_found():
    assert availability.is_torchdata_stateful_dataloader_available()
    assert availability.is_pytest_available() and availability.is_tqdm_available() and availability.is_numpy_available()


def test_packages_are_looked_up_without_torch():
    names = [name for name in PROBES if name not in {*DEVICE_PROBES, *IMPORTING}]
    code = (
        "import sys; from accelerate.runtime.system import availability\n"
        f"[getattr(availability, name)() for name in {names!r}]\n"
        "print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


IMPORTING = {"is_torch_distributed_available", "is_bitsandbytes_multi_backend_available"}
DEVICE_PROBES = {
    "is_cuda_available",
    "is_rocm_available",
    "is_mps_available",
    "is_mlu_available",
    "is_musa_available",
    "is_npu_available",
    "is_sdaa_available",
    "is_neuron_available",
    "is_xpu_available",
    "is_hpu_available",
    "is_habana_gaudi1",
    "is_torch_xla_available",
    "is_xccl_available",
    "is_bf16_available",
    "is_fp16_available",
    "is_transformer_engine_mxfp8_available",
}


class TestPackages:
    @pytest.fixture(autouse=True)
    def fresh(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        availability._is_installed.cache_clear()
        availability._installed_version.cache_clear()
        yield
        availability._is_installed.cache_clear()
        availability._installed_version.cache_clear()

    def install(self, folder, package, distribution=None, version="1.0"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("raise ImportError('looked up, not imported')")
        if distribution:
            info = folder / f"{distribution}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")

    def test_a_folder_of_that_name_is_no_package(self, tmp_path):
        (tmp_path / "wandb").mkdir()
        assert not availability.is_wandb_available()

    def test_a_package_is(self, tmp_path):
        self.install(tmp_path, "wandb")
        assert availability.is_wandb_available()

    @pytest.mark.parametrize(
        ("check", "package", "distribution", "version", "here"),
        [
            ("is_bnb_available", "bitsandbytes", "bitsandbytes", "0.37.0", True),
            ("is_8bit_bnb_available", "bitsandbytes", "bitsandbytes", "0.37.2", True),
            ("is_4bit_bnb_available", "bitsandbytes", "bitsandbytes", "0.38.9", False),
            ("is_4bit_bnb_available", "bitsandbytes", "bitsandbytes", "0.39.0", True),
            ("is_torchao_available", "torchao", "torchao", "0.6.0", False),
            ("is_fp8_available", "torchao", "torchao", "0.18.0", True),
            ("is_ipex_available", "intel_extension_for_pytorch", "intel_extension_for_pytorch", "2.0.1", False),
            ("is_tensorboard_available", "tensorboardX", "tensorboardX", "2.6", True),
        ],
    )
    def test_versions_count(self, tmp_path, check, package, distribution, version, here):
        self.install(tmp_path, package, distribution, version)
        assert getattr(availability, check)() is here

    def test_transformer_engine_without_its_layers_for_torch(self, tmp_path):
        self.install(tmp_path, "transformer_engine", "transformer_engine")
        assert not availability.is_transformer_engine_available()
        self.install(tmp_path / "transformer_engine", "pytorch")
        assert availability.is_transformer_engine_available()

    def test_megatron_only_where_it_is_asked_for(self, tmp_path):
        self.install(tmp_path, "megatron")
        assert not availability.is_megatron_lm_available()
        with env.patch_environment(ACCELERATE_USE_MEGATRON_LM="true"):
            assert availability.is_megatron_lm_available()

    def test_decorators_say_what_to_install(self, tmp_path):
        @availability.deepspeed_required
        def engine(size):
            return size

        @availability.torchao_required
        def convert():
            pass

        with pytest.raises(
            ImportError, match="engine needs DeepSpeed, which is not installed: `pip install deepspeed`"
        ):
            engine(1)
        with pytest.raises(ImportError, match="convert needs torchao 0.6.1 or later.*`pip install torchao`"):
            convert()
        self.install(tmp_path, "deepspeed")
        availability._is_installed.cache_clear()
        assert engine(size=2) == 2


def test_rich_only_where_it_is_asked_for():
    assert not availability.is_rich_available()
    with env.patch_environment(ACCELERATE_ENABLE_RICH="1"):
        assert availability.is_rich_available()


class TestVersions:
    RELEASES = st.lists(st.integers(0, 30), min_size=1, max_size=3).map(lambda parts: ".".join(map(str, parts)))

    @given(RELEASES, st.sampled_from(sorted(availability.STR_OPERATION_TO_FUNC)), RELEASES)
    def test_as_packaging_compares(self, have, operation, need):
        expected = availability.STR_OPERATION_TO_FUNC[operation](Version(have), Version(need))
        assert availability.compare_versions(Version(have), operation, need) is expected
        assert availability.compare_versions(Version(f"{have}+cpu"), operation, need) is expected

    def test_a_local_part_counts_where_it_is_asked_for(self):
        assert not availability.compare_versions(Version("2.4+cpu"), "==", "2.4+cu121")
        assert availability.compare_versions(Version("2.4+cpu"), "==", "2.4+cpu")

    def test_pre_releases_come_before(self):
        assert availability.compare_versions(Version("2.4rc1"), "<", "2.4")

    def test_torch_is_not_imported(self):
        code = (
            "import sys; from accelerate.runtime.system.availability import is_torch_version\n"
            "print(is_torch_version('>=', '2.4'), 'torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True False\n"

    def test_this_torch(self):
        release = importlib.metadata.version("torch").split("+")[0]
        assert availability.is_torch_version("==", release) and availability.is_torch_version("<=", release)

    def test_wrong_words(self):
        with pytest.raises(ValueError, match="operation='=>': expected one of >, >=, ==, !=, <=, <"):
            availability.compare_versions("torch", "=>", "2.0")
        with pytest.raises(ValueError, match="requirement_version='two' is not a version"):
            availability.is_torch_version(">=", "two")
        with pytest.raises(importlib.metadata.PackageNotFoundError, match="no-such-library"):
            availability.compare_versions("no-such-library", ">", "1")


class TestDevices:
    def test_they_agree_with_the_table(self):
        for name in ("cuda", "mps", "xpu", "npu", "mlu", "musa", "sdaa", "neuron", "hpu"):
            assert getattr(availability, f"is_{name}_available")() is devices.DEVICES[name].is_available()

    @pytest.mark.parametrize("name", ["xpu", "npu", "mlu", "musa", "sdaa", "neuron"])
    def test_counting_devices_asks_for_more(self, name):
        check = getattr(availability, f"is_{name}_available")
        assert check(check_device=True) is (devices.DEVICES[name].count() > 0)

    def test_a_tpu_and_a_gpu_exclude_each_other(self):
        with pytest.raises(ValueError, match="check_is_tpu and check_is_gpu exclude each other"):
            availability.is_torch_xla_available(check_is_tpu=True, check_is_gpu=True)
        assert availability.is_torch_xla_available(check_is_tpu=True) is False

    def test_the_cpu_computes_in_halves(self):
        with env.patch_environment(ACCELERATE_TORCH_DEVICE="cpu"):
            assert availability.is_bf16_available() and availability.is_bf16_available(ignore_tpu=True)
        assert availability.is_fp16_available() and not availability.is_habana_gaudi1()
