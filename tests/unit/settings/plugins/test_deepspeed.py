"""DeepSpeed's plugin and configuration: the documented scenarios, and what contradicts what. Needs no DeepSpeed."""

from __future__ import annotations

import base64
import json
import subprocess
import sys

import pytest
from torch import nn

from accelerate.settings.plugins.deepspeed import DeepSpeedPlugin, get_active_deepspeed_plugin
from accelerate.settings.plugins.deepspeed_config import HfDeepSpeedConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DummyOptim, DummyScheduler

INF = float("inf")


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """A function: words after `accelerate launch` and a file's deepspeed_config; sets the child's environment."""
    import yaml

    from accelerate.launch.plan import plan

    def run(*words: str, **section: object) -> None:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "deepspeed_config": section}))
        for name, value in plan(["--config_file", str(path), *words, "s.py"]).environment.items():
            monkeypatch.setenv(name, value)

    return run


@pytest.fixture
def config_file(tmp_path):
    """A function: DeepSpeed's configuration to the path of a file that holds it."""

    def write(content: dict) -> str:
        path = tmp_path / "ds_config.json"
        path.write_text(json.dumps(content))
        return str(path)

    return write


def test_importing_it_leaves_torch_and_deepspeed_out():
    code = "import sys, accelerate.settings.plugins.deepspeed as d; d.DeepSpeedPlugin()"
    code += "; print({'torch', 'deepspeed'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# Without a configuration of its own ----------------------------------------------------------------------------------


def test_defaults():
    plugin = DeepSpeedPlugin()
    assert plugin.deepspeed_config == {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "none"},
            "offload_param": {"device": "none"},
            "stage3_gather_16bit_weights_on_model_save": False,
        },
        "steps_per_print": INF,
        "zero_allow_untested_optimizer": True,
    }
    assert plugin.hf_ds_config.config is plugin.deepspeed_config and plugin.hf_ds_config.is_zero2()
    assert plugin.zero3_init_flag is False and plugin.enable_msamp is False and not plugin.selected


def test_an_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "auto")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu")
    plugin = DeepSpeedPlugin()
    assert (plugin.zero_stage, plugin.gradient_clipping, plugin.offload_param_device) == (3, "auto", "cpu")
    assert plugin.zero3_init_flag and plugin.is_zero3_init_enabled() and plugin.hf_ds_config.is_offload()
    plugin = DeepSpeedPlugin(zero_stage=1, gradient_clipping=0.5, offload_param_device="none", zero3_init_flag=True)
    assert (plugin.zero_stage, plugin.gradient_clipping, plugin.offload_param_device) == (1, 0.5, "none")
    assert plugin.zero3_init_flag and not plugin.is_zero3_init_enabled()  # it counts in stage 3 only


def test_nvme_needs_a_folder():
    with pytest.raises(ValueError, match="needs a folder on NVMe: set offload_optimizer_nvme_path"):
        DeepSpeedPlugin(offload_optimizer_device="nvme")
    plugin = DeepSpeedPlugin(zero_stage=3, offload_param_device="nvme", offload_param_nvme_path="/nvme")
    assert plugin.get_value("zero_optimization.offload_param") == {"device": "nvme", "nvme_path": "/nvme"}


# With one: the scenarios of the guide --------------------------------------------------------------------------------

_DOCUMENTED = {
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": False,
        "offload_optimizer": {"device": "none"},
        "offload_param": {"device": "none"},
    },
    "gradient_clipping": 1.0,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 10,
    "steps_per_print": 2000000,
}


def test_the_file_must_not_say_what_deepspeeds_own_decides(launched, config_file):
    launched(
        gradient_accumulation_steps=1,
        gradient_clipping=1.0,
        offload_optimizer_device="cpu",
        offload_param_device="cpu",
        zero3_init_flag=True,
        zero3_save_16bit_model=True,
        zero_stage=3,
        deepspeed_config_file=config_file(_DOCUMENTED),
    )
    with pytest.raises(ValueError, match="When using `deepspeed_config_file`") as caught:
        DeepSpeedPlugin()
    ignored = (
        "['gradient_accumulation_steps', 'gradient_clipping', 'zero_stage', 'offload_optimizer_device', "
        "'offload_param_device', 'zero3_save_16bit_model', 'mixed_precision']."
    )
    assert ignored in str(caught.value) and "`accelerate config`" in str(caught.value)


def test_deepspeeds_own_file_alone(launched, config_file):
    launched(deepspeed_config_file=config_file(_DOCUMENTED), zero3_init_flag=False)
    state = AcceleratorState(cpu=True)
    assert state.mixed_precision == "bf16"
    assert state.deepspeed_plugin.deepspeed_config == {
        **_DOCUMENTED,
        "steps_per_print": INF,
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
    }
    assert "Distributed environment: DistributedType.DEEPSPEED" in repr(state) and "ds_config: {'bf16'" in repr(state)
    plugin = get_active_deepspeed_plugin(state)
    assert (plugin.gradient_accumulation_steps, plugin.gradient_clipping, plugin.zero_stage) == (10, 1.0, 3)


def test_flags_fill_in_what_is_auto(launched, config_file):
    content = {
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": "auto",
            "stage3_gather_16bit_weights_on_model_save": "auto",
            "offload_optimizer": {"device": "auto"},
            "offload_param": {"device": "auto"},
        },
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "steps_per_print": 2000000,
    }
    flags = "--mixed_precision=fp16 --zero_stage=3 --gradient_accumulation_steps=5 --gradient_clipping=1.0"
    flags += " --offload_param_device=cpu --offload_optimizer_device=nvme --zero3_save_16bit_model=true"
    flags += " --zero3_init_flag=false"
    launched(*flags.split(), deepspeed_config_file=config_file(content))
    state = AcceleratorState(cpu=True)
    assert state.mixed_precision == "fp16"
    assert state.deepspeed_plugin.deepspeed_config == {
        "bf16": {"enabled": False},
        "zero_optimization": {
            "stage": 3,
            "stage3_gather_16bit_weights_on_model_save": True,
            "offload_optimizer": {"device": "nvme"},
            "offload_param": {"device": "cpu"},
        },
        "gradient_clipping": 1.0,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 5,
        "steps_per_print": INF,
        "fp16": {"enabled": True, "auto_cast": True},
        "zero_allow_untested_optimizer": True,
    }


def test_a_flag_that_contradicts_the_file(launched, config_file):
    launched("--zero_stage", "2", deepspeed_config_file=config_file(_DOCUMENTED))
    with pytest.raises(ValueError, match="zero_stage=2, but zero_optimization.stage is 3"):
        DeepSpeedPlugin()


def test_what_the_file_leaves_out_is_filled_in_or_deepspeeds_default():
    plugin = DeepSpeedPlugin(hf_ds_config={"train_micro_batch_size_per_gpu": 1}, gradient_clipping=0.5)
    assert (plugin.zero_stage, plugin.gradient_accumulation_steps) == (0, 1)
    assert plugin.get_value("gradient_clipping") == 0.5 and plugin.get_value("gradient_accumulation_steps") == 1
    auto = {"zero_optimization": {"offload_param": {"device": "cpu", "nvme_path": "auto"}}}
    assert "nvme_path" not in DeepSpeedPlugin(hf_ds_config=auto).get_value("zero_optimization.offload_param")


# Filling in on prepare -----------------------------------------------------------------------------------------------


def test_every_auto_is_filled_or_named():
    config = {"optimizer": {"params": {"lr": "auto", "eps": 1e-8}}, "train_batch_size": "auto", "zero_optimization": {}}
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    with pytest.raises(ValueError, match=r"optimizer.params.lr is 'auto'.*write a value"):
        plugin.deepspeed_config_process()
    values = {"optimizer.params.lr": 0.1, "optimizer.params.eps": 1e-8, "train_batch_size": 8}
    plugin.deepspeed_config_process(**values)
    assert plugin.get_value("optimizer.params.lr") == 0.1 and not plugin.is_auto("train_batch_size")
    with pytest.raises(ValueError, match=r"train_batch_size is 8, but 16 follows"):
        plugin.deepspeed_config_process(**{**values, "train_batch_size": 16})
    plugin.deepspeed_config_process(must_match=False, **{**values, "train_batch_size": 16})


def test_filling_one_in():
    plugin = DeepSpeedPlugin(hf_ds_config={"train_batch_size": "auto"})
    mismatches: list[str] = []
    plugin.fill_match("not.there", mismatches, **{"not.there": 1})
    plugin.fill_match("train_batch_size", mismatches, train_batch_size=4)
    plugin.fill_match("train_batch_size", mismatches, train_batch_size=5)
    assert mismatches == ["train_batch_size is 4, but 5 follows from the rest"]
    assert plugin.get_value("not.there", "default") == "default"


# Number formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "wanted", "result"),
    [
        ({}, "no", "no"),
        ({}, "bf16", "bf16"),
        ({"fp16": {"enabled": True}}, "fp16", "fp16"),
        ({"fp16": {"enabled": True}}, "no", "fp16"),
        ({"fp16": {"enabled": "auto"}}, "no", "no"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "bf16", "bf16"),
    ],
)
def test_precision(config, wanted, result):
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    plugin.set_mixed_precision(wanted)
    assert plugin.mixed_precision == result
    assert {name: plugin.get_value(f"{name}.enabled") for name in ("fp16", "bf16")} == {
        name: result == name for name in ("fp16", "bf16")
    }


@pytest.mark.parametrize("config", [{"bf16": {"enabled": True}}, {"fp16": {"enabled": False}}])
def test_precisions_that_contradict_each_other(config):
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    before = json.dumps(plugin.deepspeed_config)
    with pytest.raises(ValueError, match="mixed_precision='fp16', but the DeepSpeed configuration has"):
        plugin.set_mixed_precision("fp16")
    assert json.dumps(plugin.deepspeed_config) == before


def test_msamp():
    plugin = DeepSpeedPlugin(enable_msamp=True, msamp_opt_level="O2")
    assert plugin.deepspeed_config["msamp"] == {"enabled": True, "opt_level": "O2"}
    assert DeepSpeedPlugin(hf_ds_config={"msamp": {"enabled": True}}).msamp_opt_level == "O1"
    with pytest.raises(ValueError, match="MS-AMP does not work with zero_stage=3"):
        DeepSpeedPlugin(zero_stage=3, enable_msamp=True)


# What needs DeepSpeed ------------------------------------------------------------------------------------------------


def test_what_to_install_is_said_when_it_is_needed():
    pytest.importorskip("transformers")
    without_deepspeed()
    plugin = DeepSpeedPlugin(zero_stage=3, transformer_moe_cls_names="Linear")
    with pytest.raises(ImportError, match=r'zero3_init_flag needs DeepSpeed.*pip install "accelerate\[deepspeed\]"'):
        plugin.set_deepspeed_weakref()
    with pytest.raises(ImportError, match="transformer_moe_cls_names needs DeepSpeed"):
        plugin.set_moe_leaf_modules(nn.Sequential(nn.Linear(1, 1)))
    plugin.zero3_init_flag = False
    with pytest.raises(ImportError, match="needs DeepSpeed"), plugin.zero3_init_context_manager(enable=True):
        pass
    with plugin.zero3_init_context_manager(enable=False):
        assert not plugin.is_zero3_init_enabled()


def without_deepspeed() -> None:
    import importlib.util

    if importlib.util.find_spec("deepspeed") is not None:
        pytest.skip("DeepSpeed is installed")


def test_layers_that_are_not_there():
    plugin = DeepSpeedPlugin(zero_stage=3, transformer_moe_cls_names="Linear, Experts")
    with pytest.raises(ValueError, match="Sequential has no Experts; it is built of Linear, Sequential"):
        plugin.set_moe_leaf_modules(nn.Sequential(nn.Linear(1, 1)))
    DeepSpeedPlugin(zero_stage=2, transformer_moe_cls_names="Experts").set_moe_leaf_modules(nn.Sequential())


# Several -------------------------------------------------------------------------------------------------------------


def test_one_of_several_is_in_use():
    plugins = {"student": DeepSpeedPlugin(zero_stage=2), "teacher": DeepSpeedPlugin(zero_stage=1)}
    state = AcceleratorState(cpu=True, deepspeed_plugin=plugins)
    assert get_active_deepspeed_plugin(state) is state.deepspeed_plugin is plugins["student"]
    state.select_deepspeed_plugin("teacher")
    assert state.deepspeed_plugin is plugins["teacher"] is state.get_deepspeed_plugin("teacher")
    assert plugins["teacher"].selected and not plugins["student"].selected
    with pytest.raises(ValueError, match="no DeepSpeed plugin 'other': it has 'student', 'teacher'"):
        state.select_deepspeed_plugin("other")
    assert AcceleratorState(deepspeed_plugin=plugins).deepspeed_plugin is plugins["teacher"]
    with pytest.raises(ValueError, match="other settings than this deepspeed_plugins"):
        AcceleratorState(deepspeed_plugin=DeepSpeedPlugin(zero_stage=1))


def test_selecting_goes_through_the_state():
    plugin = DeepSpeedPlugin()
    with pytest.raises(ValueError, match="select_deepspeed_plugin"):
        plugin.select()
    with pytest.raises(ValueError, match="select_deepspeed_plugin"):
        plugin.selected = True
    with pytest.raises(ValueError, match="started without DeepSpeed"):
        get_active_deepspeed_plugin(AcceleratorState(cpu=True))


# DeepSpeed's configuration -------------------------------------------------------------------------------------------


def test_a_configuration_comes_from_a_mapping_a_file_or_base64(config_file):
    content = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "fp16": {"enabled": False}}
    text = base64.urlsafe_b64encode(json.dumps(content).encode()).decode()
    for source in (content, config_file(content), text):
        config = HfDeepSpeedConfig(source)
        assert config.config == content and config.config is not content
        assert config.is_zero3() and not config.is_zero2() and config.is_offload()
        assert config.is_false("fp16.enabled") and not config.is_true("fp16.enabled")
        assert not config.is_false("bf16.enabled")


def test_asking_and_changing_it():
    config = HfDeepSpeedConfig({"a": {"b": 1}})
    assert config.find_config_node("a.b") == ({"b": 1}, "b") and config.find_config_node("x.b") == (None, "b")
    assert config.get_value("a.b") == 1 and config.get_value("a.b.c", 7) == 7
    config.del_config_sub_tree("a.b")
    config.del_config_sub_tree("a.b")
    with pytest.raises(ValueError, match="has no 'a.b' to remove"):
        config.del_config_sub_tree("a.b", must_exist=True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.json", "nowhere.json does not exist"),
        (7, "is 7: expected a mapping"),
        (base64.b64encode(b"[1]").decode(), "expected keys and values at the top, found list"),
    ],
)
def test_sources_that_are_none(source, message):
    with pytest.raises(ValueError, match=message):
        HfDeepSpeedConfig(source)


def test_a_file_that_is_no_json(tmp_path):
    (tmp_path / "ds.json").write_text("{,}")
    with pytest.raises(ValueError, match=r"ds.json is not valid json"):
        DeepSpeedPlugin(hf_ds_config=str(tmp_path / "ds.json"))


def test_what_stands_in_for_deepspeeds_objects():
    optimizer = DummyOptim([1], lr=0.1, betas=(0.9, 0.99))
    assert (optimizer.params, optimizer.lr, optimizer.weight_decay) == ([1], 0.1, 0)
    assert optimizer.kwargs == {"betas": (0.9, 0.99)}
    scheduler = DummyScheduler(optimizer, 10, 2, last=1)
    assert (scheduler.total_num_steps, scheduler.warmup_num_steps, scheduler.kwargs) == (10, 2, {"last": 1})
