"""The Accelerator on one process."""

from __future__ import annotations

import copy
import gc
import json
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerate import Accelerator, ParallelismConfig, PartialState, disk_offload
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.settings import env
from accelerate.settings.enums import DistributedType, RNGType
from accelerate.settings.fp8 import FP8RecipeKwargs
from accelerate.settings.handlers import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    ProfileKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
)
from accelerate.settings.parallel import TorchTensorParallelPlugin
from accelerate.settings.plugins.deepspeed import DeepSpeedPlugin, DummyOptim, DummyScheduler
from accelerate.settings.plugins.fsdp import FullyShardedDataParallelPlugin
from accelerate.settings.plugins.megatron import MegatronLMDummyScheduler, MegatronLMPlugin
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker


def small_loader(n: int = 8, batch_size: int = 2) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(n, dtype=torch.float32).view(n, 1)), batch_size=batch_size)


def test_defaults():
    accelerator = Accelerator(cpu=True)
    assert accelerator.distributed_type is DistributedType.NO
    assert accelerator.device == torch.device("cpu")
    assert (accelerator.num_processes, accelerator.process_index, accelerator.local_process_index) == (1, 0, 0)
    assert accelerator.mixed_precision == "no" and accelerator.scaler is None and not accelerator.native_amp
    assert accelerator.gradient_accumulation_steps == 1 and accelerator.sync_gradients
    assert accelerator.rng_types == ["generator"]
    assert accelerator.dataloader_config == DataLoaderConfiguration()
    assert accelerator.project_dir is None and accelerator.logging_dir is None and accelerator.save_iteration == 0
    assert accelerator.trackers == [] and accelerator.log_with == []
    assert not accelerator.multi_device and accelerator.should_save_model
    assert not accelerator.optimizer_step_was_skipped and accelerator.step == 0
    assert accelerator.parallelism_config is None and accelerator.torch_device_mesh is None


def test_prepare_gives_back_in_order_and_leaves_prepared_objects_alone():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loader = small_loader()
    s, m, nothing, o, d = accelerator.prepare(scheduler, model, None, optimizer, loader)
    assert isinstance(s, AcceleratedScheduler) and isinstance(o, AcceleratedOptimizer)
    assert m is model and nothing is None and isinstance(d, DataLoader) and d is not loader
    assert s.optimizers == [o]
    again = accelerator.prepare(m, o, s, d)
    assert all(a is b for a, b in zip(again, (m, o, s, d), strict=True))
    assert [len(known) for known in (accelerator._models, accelerator._optimizers, accelerator._dataloaders)] == [1] * 3
    assert accelerator.prepare(model) is model


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        ([nn.Linear(1, 1)], "unpack it"),
        ({"model": 1}, "unpack it"),
        (nn.Linear, "pass an instance"),
        (TensorDataset(torch.zeros(1)), "DataLoader first"),
        (torch.zeros(1), "tensor.to"),
        ("model", "plain value"),
        (3, "plain value"),
        ((p for p in ()), "IterableDataset"),
    ],
)
def test_prepare_returns_what_it_does_not_prepare_with_one_warning(wrong, advice, caplog):
    model = nn.Linear(1, 1)
    prepared = Accelerator(cpu=True).prepare(wrong, model, wrong, None)
    assert prepared[0] is wrong and prepared[1] is model and prepared[2] is wrong and prepared[3] is None
    [record] = caplog.records
    assert advice in record.getMessage() and type(wrong).__name__ in record.getMessage()


def everything_of_ours(accelerator, tmp_path):
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, small_loader())
    for _ in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 4)).sum())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    accelerator.save_state(tmp_path / "state")
    accelerator.load_state(tmp_path / "state")
    assert not accelerator.should_stop
    # A forward that is wrapped for mixed precision belongs to the instance, which makes a cycle of the model with itself.
    models = [model] if accelerator.mixed_precision == "no" else []
    return [accelerator, accelerator.strategy, optimizer, loader, *models]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_accelerator_is_freed_without_the_collector(precision, tmp_path):
    # Once beforehand: what is imported on use may catch exceptions, which hold frames until they are collected.
    everything_of_ours(Accelerator(cpu=True, mixed_precision=precision), tmp_path)
    gc.collect()
    gc.disable()
    try:
        references = [
            weakref.ref(each) for each in everything_of_ours(Accelerator(cpu=True, mixed_precision=precision), tmp_path)
        ]
        assert [type(each()).__name__ for each in references if each() is not None] == []
    finally:
        gc.enable()


def test_settings_of_loading_can_be_replaced():
    accelerator = Accelerator(cpu=True)
    accelerator.dataloader_config = DataLoaderConfiguration(split_batches=True)
    assert accelerator.split_batches and accelerator.strategy.config.dataloader_config.split_batches
    accelerator.rng_types = ["torch"]
    assert accelerator.prepare(small_loader()).rng_types == [RNGType.TORCH]


def test_fully_sharded_training_of_a_lone_process_trains_unsharded(caplog):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert "trains unsharded" in caplog.text and accelerator.distributed_type is DistributedType.NO
    assert not accelerator.is_fsdp2
    again = Accelerator(fsdp_plugin=plugin)
    model, optimizer, loader = again.prepare(
        net := nn.Linear(4, 2), torch.optim.SGD(net.parameters(), lr=0.1), small_loader()
    )
    before = model.weight.detach().clone()
    for _ in loader:
        again.backward(model(torch.ones(1, 4)).sum())
        optimizer.step()
    assert model is net and not torch.equal(model.weight, before)
    assert caplog.text.count("trains unsharded") == 1


def test_prepare_checks_before_it_changes():
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match=r"'weight' of Linear is on the meta device.*to_empty"):
        accelerator.prepare(nn.Linear(1, 1, device="meta"))
    with pytest.raises(ValueError, match="run one batch through the model"):
        accelerator.prepare(nn.LazyLinear(2))
    lazy = nn.LazyLinear(2)
    with pytest.raises(ValueError, match="then create the optimizer"):
        accelerator.prepare(nn.Linear(1, 1), torch.optim.SGD(lazy.parameters(), lr=1))
    with pytest.raises(ValueError, match="one entry for each of the 1 objects"):
        accelerator.prepare(nn.Linear(1, 1), device_placement=[True, False])
    with pytest.raises(ValueError, match=r"create the optimizer after `model\.to_empty"):
        meta = nn.Linear(1, 1, device="meta")
        accelerator.prepare(torch.optim.SGD(meta.parameters(), lr=1))
    assert accelerator._models == []
    meta = accelerator.prepare(nn.Linear(1, 1, device="meta"), device_placement=[False])
    assert meta.weight.is_meta


@pytest.mark.parametrize("device_placement", [True, False])
def test_offloaded_parameters_are_trained_only_when_frozen(tmp_path, device_placement):
    accelerator = Accelerator(cpu=True, device_placement=device_placement)
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    disk_offload(second, tmp_path, execution_device="cpu")
    model = nn.Sequential(first, second)
    with pytest.raises(ValueError, match=r"'1\.weight' of Sequential is offloaded .*1 others.*requires_grad_\(False\)"):
        accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1))
    assert accelerator._models == []
    second.requires_grad_(False)
    before = first.weight.detach().clone()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1))
    accelerator.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    assert second.weight.is_meta and not torch.equal(first.weight, before)


def test_an_offloaded_model_without_a_device_map_is_prepared_where_it_is(tmp_path):
    whole = nn.Linear(2, 2)
    model = disk_offload(copy.deepcopy(whole), tmp_path, execution_device="cpu")
    prepared = Accelerator(cpu=True).prepare(model)
    assert prepared.weight.is_meta
    assert torch.equal(prepared(torch.ones(1, 2)), whole(torch.ones(1, 2)))


def test_models_of_every_kind():
    accelerator = Accelerator(cpu=True)
    frozen = nn.Linear(1, 1).requires_grad_(False)
    integers = nn.Module()
    integers.register_buffer("table", torch.arange(3))
    integers.weight = nn.Parameter(torch.arange(3), requires_grad=False)
    assert accelerator.prepare(frozen, integers) == (frozen, integers)
    assert accelerator.prepare_model(nn.Linear(1, 1), evaluation_mode=True).weight.device.type == "cpu"


# Accumulation --------------------------------------------------------------------------------------------------------


def accumulated(batches: int, **plugin: object) -> list[list[object]]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=GradientAccumulationPlugin(**plugin))
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    loader = DataLoader(TensorDataset(torch.ones(batches, 1)), batch_size=1)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    seen = []
    for (x,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).sum())
            gradient = model.weight.grad.item()
            optimizer.step()
            scheduler.step()
            seen.append([accelerator.sync_gradients, gradient, model.weight.item(), scheduler.last_epoch])
            seen[-1].append(accelerator.step)
            optimizer.zero_grad()
    return seen


def test_accumulation_steps_come_from_argument_plugin_or_environment():
    env.publish({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": 4})
    assert Accelerator(cpu=True).gradient_accumulation_steps == 4
    assert Accelerator(cpu=True, gradient_accumulation_steps=2).gradient_accumulation_steps == 2
    accelerator = Accelerator(cpu=True)
    accelerator.gradient_accumulation_steps = 8
    assert accelerator.gradient_accumulation_steps == 8
    with pytest.raises(ValueError, match="num_steps=-1"):
        Accelerator(cpu=True, gradient_accumulation_steps=-1)
    with pytest.raises(ValueError, match="both given"):
        plugin = GradientAccumulationPlugin(num_steps=2)
        Accelerator(cpu=True, gradient_accumulation_steps=2, gradient_accumulation_plugin=plugin)


def test_backward_with_num_items_is_the_mean_over_all_items():
    torch.manual_seed(0)
    data = torch.randn(11, 3, dtype=torch.float64)
    model = nn.Linear(3, 1).double()
    whole = copy.deepcopy(model)
    whole(data).pow(2).mean().backward()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = accelerator.prepare(model)
    for part in data.split([2, 8, 1]):
        with accelerator.accumulate(model):
            accelerator.backward(model(part).pow(2).sum(), num_items=len(part))
    torch.testing.assert_close(model.weight.grad, whole.weight.grad, rtol=0, atol=1e-14)
    torch.testing.assert_close(model.bias.grad, whole.bias.grad, rtol=0, atol=1e-14)


def test_backward_says_what_it_needs():
    accelerator = Accelerator(cpu=True)
    with pytest.raises(TypeError, match="loss as a tensor, found float"):
        accelerator.backward(0.5)
    with pytest.raises(ValueError, match="num_items must not be negative"):
        accelerator.backward(torch.zeros((), requires_grad=True), num_items=-1)
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        accelerator.backward(torch.zeros((), requires_grad=True), num_items=torch.ones(2))
    with pytest.raises(ValueError, match="LOMO"):
        accelerator.lomo_backward(torch.zeros(()), 0.1)


def test_no_items_at_all_change_nothing():
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(nn.Linear(1, 1))
    accelerator.backward(model(torch.ones(1, 1)).sum() * 0, num_items=torch.tensor(0))
    assert model.weight.grad.item() == 0


# Precision -------------------------------------------------------------------------------------------------------------


def test_bf16_computes_in_half_and_returns_float():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            y = self.layer(x)
            seen.append(y.dtype)
            return {"y": y, "list": [y]}

    model = accelerator.prepare(Model())
    out = model(torch.ones(1, 2))
    assert seen == [torch.bfloat16] and out["y"].dtype == out["list"][0].dtype == torch.float32
    assert model.layer.weight.dtype == torch.float32 and hasattr(model, "_original_forward")
    with accelerator.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with accelerator.autocast(AutocastKwargs(enabled=False)):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert plain(torch.ones(1, 2))["y"].dtype == torch.float32 and seen[-1] == torch.float32
    assert not hasattr(plain, "_original_forward")


def test_a_forward_within_a_forward_under_autocast():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")

    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x, depth=2):
            y = self.layer(x)
            assert y.dtype == torch.bfloat16
            return self(y, depth - 1) if depth else y

    model = accelerator.prepare(Recursive())
    assert model(torch.ones(1, 2)).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_fp16_scales_the_loss_and_reports_skipped_steps():
    handlers = [GradScalerKwargs(init_scale=2.0**10, growth_interval=1)]
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=handlers)
    model = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch))
    before = model.weight.detach().clone()
    accelerator.backward(model(torch.ones(1, 2)).sum())
    assert model.weight.grad.abs().max() > 100, "scaled"
    assert accelerator.clip_grad_norm_(model.parameters(), 1.0) < 10, "unscaled before it is clipped"
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    assert not accelerator.optimizer_step_was_skipped and not torch.equal(before, model.weight)
    assert scheduler.last_epoch == 1
    accelerator.backward(model(torch.full((1, 2), 1e30)).sum() * 1e30)
    before = model.weight.detach().clone()
    optimizer.step()
    scheduler.step()
    assert accelerator.optimizer_step_was_skipped and optimizer.step_was_skipped
    assert torch.equal(before, model.weight) and scheduler.last_epoch == 1


def test_precisions_that_are_not_there():
    with pytest.raises(ValueError, match="'zz' is unknown"):
        Accelerator(cpu=True, mixed_precision="zz")
    with pytest.raises(ValueError, match="fp8.*not part of this version"):
        Accelerator(cpu=True, mixed_precision="fp8")


# Settings that contradict each other -------------------------------------------------------------------------------------


def test_bad_settings_say_what_is_wrong():
    with pytest.raises(TypeError, match="kwargs_handlers takes instances of"):
        Accelerator(cpu=True, kwargs_handlers=[object()])
    with pytest.raises(ValueError, match="two AutocastKwargs"):
        Accelerator(cpu=True, kwargs_handlers=[AutocastKwargs(), AutocastKwargs()])
    with pytest.raises(ValueError, match="both given"):
        Accelerator(cpu=True, dynamo_backend="eager", dynamo_plugin=TorchDynamoPlugin())
    with pytest.raises(TypeError, match="dispatch_batches"):
        Accelerator(cpu=True, dispatch_batches=True)
    with pytest.raises(ValueError, match=r"rng_types=\['zz'\]"):
        Accelerator(cpu=True, rng_types=["zz"])
    with pytest.raises(TypeError, match="fsdp_plugin must be an instance of FullyShardedDataParallelPlugin"):
        Accelerator(cpu=True, fsdp_plugin=object())
    with pytest.raises(ValueError, match="deepspeed_plugin and deepspeed_plugins are both given"):
        Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(), deepspeed_plugins={"a": DeepSpeedPlugin()})


@pytest.mark.parametrize(
    ("given", "variable", "message"),
    [
        ({"deepspeed_plugin": DeepSpeedPlugin}, "DEEPSPEED", r"deepspeed_plugin \(--use_deepspeed\).*not part of this"),
        ({"megatron_lm_plugin": MegatronLMPlugin}, "MEGATRON_LM", r"megatron_lm_plugin \(--use_mega.*not part of this"),
    ],
)
def test_what_this_version_cannot_train_with_is_refused_before_anything_changes(given, variable, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        Accelerator(cpu=True, **{name: make() for name, make in given.items()})
    assert not AcceleratorState._shared_state and not PartialState._shared_state
    if variable is not None:  # as the launcher asks for it
        monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
        with pytest.raises(ValueError, match=message):
            Accelerator(cpu=True)
        assert not AcceleratorState._shared_state


def test_a_mesh_fits_the_ranks():
    with pytest.raises(ValueError, match="tp_size 2 = 2 ranks, but 1 processes"):
        Accelerator(cpu=True, parallelism_config=ParallelismConfig(tp_size=2))
    with pytest.raises(ValueError, match="tp_size 2 = 2 ranks, but 1 processes"):
        Accelerator(cpu=True, torch_tp_plugin=TorchTensorParallelPlugin(tp_size=2))


@pytest.mark.parametrize("placeholder", [DummyOptim(()), DummyScheduler(None), MegatronLMDummyScheduler(None)])
def test_what_stands_for_an_engines_objects_needs_the_engine(placeholder):
    with pytest.raises(ValueError, match=rf"{type(placeholder).__name__} stands for .* uses neither"):
        Accelerator(cpu=True).prepare(nn.Linear(1, 1), placeholder)


def test_an_fp8_recipe_is_kept_for_a_run_in_another_precision():
    accelerator = Accelerator(cpu=True, kwargs_handlers=[recipe := FP8RecipeKwargs()])
    assert accelerator.has_fp8_handler and accelerator.fp8_recipe_handler is recipe
    assert not Accelerator().has_fp8_handler and not accelerator.delayed_fp8_autocast


def test_hooks_are_found_by_the_names_that_libraries_use():
    accelerator = Accelerator(cpu=True)
    handle = accelerator.register_save_state_pre_hook(print)
    accelerator.register_load_state_pre_hook(repr)
    assert list(accelerator._save_model_state_pre_hook.values()) == [print]
    assert list(accelerator._load_model_state_pre_hook.values()) == [repr]
    handle.remove()
    assert not accelerator._save_model_state_pre_hook


def test_a_mesh_of_one_process_is_none():
    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig())
    assert accelerator.parallelism_config.total_size == 1 and accelerator.torch_device_mesh is None


def test_older_spellings_are_taken():
    accelerator = Accelerator(cpu=True, split_batches=True, kwarg_handlers=[DistributedDataParallelKwargs()])
    assert accelerator.split_batches and accelerator.ddp_handler is not None
    accelerator.set_breakpoint()
    assert accelerator.check_breakpoint() and not accelerator.check_breakpoint()


# The rest ------------------------------------------------------------------------------------------------------------------


def test_clipping_and_state():
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(nn.Linear(1, 1))
    assert accelerator.clip_grad_norm_(model.parameters(), 1.0).item() == 0.0
    accelerator.backward(model(torch.full((1, 1), 9.0)).sum())
    accelerator.clip_grad_value_(model.parameters(), 0.5)
    assert model.weight.grad.item() == 0.5
    assert sorted(accelerator.get_state_dict(model)) == ["bias", "weight"]
    assert accelerator.unwrap_model(model) is model
    with (
        accelerator.no_sync(model),
        accelerator.trigger_sync_in_backward(model),
        accelerator.join_uneven_inputs([model]),
    ):
        accelerator.backward(model(torch.ones(1, 1)).sum())
    with pytest.raises(ValueError, match="lack them: object"):
        accelerator.register_for_checkpointing(object())
    assert accelerator.free_memory(model, 2) == [None, None] and accelerator._models == []
    assert copy.deepcopy(accelerator) is accelerator


def test_collectives_of_a_lone_process():
    accelerator = Accelerator(cpu=True)
    x = torch.arange(3)
    assert accelerator.gather(x).tolist() == [0, 1, 2]
    assert accelerator.reduce(x, "sum", scale=2.0).tolist() == [0, 2, 4]
    assert accelerator.pad_across_processes(x) is x
    assert accelerator.gather_for_metrics((x, {"a": x}))[1]["a"].tolist() == [0, 1, 2]
    assert accelerator.gather_for_metrics(["a", "b"]) == ["a", "b"]


def test_profile_leaves_a_trace(tmp_path):
    accelerator = Accelerator(cpu=True)
    with accelerator.profile(ProfileKwargs(activities=["cpu"], output_trace_dir=str(tmp_path / "traces"))) as profiler:
        torch.ones(2) + 1
    assert any("add" in event.key for event in profiler.key_averages())
    assert json.loads((tmp_path / "traces" / "profile_0.json").read_text())["traceEvents"]


class ListTracker(GeneralTracker):
    name = "list"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.logs = []

    @property
    def tracker(self):
        return self.logs

    def store_init_configuration(self, values):
        self.logs.append(("config", values))

    def log(self, values, step=None, **kwargs):
        self.logs.append((values, step, kwargs))

    def finish(self):
        self.logs.append("finish")


def test_a_tracker_of_ones_own():
    tracker = ListTracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("project", config={"lr": 1})
    accelerator.log({"x": 1}, step=3)
    accelerator.log({"x": 2}, log_kwargs={"list": {"z": 1}})
    assert accelerator.get_tracker("list") is tracker and accelerator.get_tracker("list", unwrap=True) is tracker.logs
    with pytest.raises(ValueError, match="no tracker 'tensorboard'"):
        accelerator.get_tracker("tensorboard")
    accelerator.end_training()
    assert tracker.logs == [("config", {"lr": 1}), ({"x": 1}, 3, {}), ({"x": 2}, None, {"z": 1}), "finish"]


def test_a_schedule_belongs_to_its_optimizer():
    accelerator = Accelerator(cpu=True)
    models = [nn.Linear(1, 1) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0) for model in models]
    first = torch.optim.lr_scheduler.StepLR(optimizers[0], 1, gamma=0.1)
    a, b, schedule = accelerator.prepare(*optimizers, first)
    assert schedule.optimizers == [a]
    a.step()
    schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(0.1)] and b.param_groups[0]["lr"] == 1.0
    later = accelerator.prepare(torch.optim.lr_scheduler.StepLR(b, 1))
    assert later.optimizers == [b]
    state = schedule.state_dict()
    schedule.step()
    schedule.load_state_dict(state)
    assert schedule.get_last_lr() == [pytest.approx(0.1)]


def test_prepared_optimizers_answer_like_the_one_inside():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(1, 1)
    inner = torch.optim.AdamW(model.parameters(), lr=0.5)
    optimizer = accelerator.prepare(inner)
    assert optimizer.param_groups is inner.param_groups and optimizer.defaults is inner.defaults
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert [group["lr"] for group in inner.param_groups] == [0.25, 0.5]
    optimizer.train()
    optimizer.eval()

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 1)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() is not None
    twin = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(twin)
    assert optimizer.state[model.weight]["step"].item() == 1


def test_copying_logs_why(caplog):
    accelerator = Accelerator(cpu=True)
    with caplog.at_level(logging.INFO, logger="accelerate.accelerator"):
        copy.deepcopy(accelerator)
    assert "represents this process's run" in caplog.text


# fp16 with several optimizers, and what a review found -------------------------------------------------------------------


def two_in_fp16(scale: float = 256.0) -> tuple[Accelerator, list[nn.Linear], list[AcceleratedOptimizer]]:
    handlers = [GradScalerKwargs(init_scale=scale, growth_interval=1)]
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=handlers)
    models = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    for model in models:
        nn.init.zeros_(model.weight)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0) for model in models]
    prepared = accelerator.prepare(*models, *optimizers)
    return accelerator, list(prepared[:2]), list(prepared[2:])


def test_two_optimizers_share_one_loss_scale():
    accelerator, (a, b), optimizers = two_in_fp16()
    x = torch.ones(1, 1)
    for update in (1, 2):  # the scale grows between the updates, never within one
        accelerator.backward((a(x) + b(x)).sum())
        accelerator.clip_grad_norm_([*a.parameters(), *b.parameters()], 100.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert (a.weight.item(), b.weight.item()) == (-update, -update)
    assert accelerator.scaler.get_scale() == 1024.0


def test_an_overflow_of_one_optimizer_leaves_the_other_right():
    accelerator, (a, b), (first, second) = two_in_fp16()
    accelerator.backward((a(torch.ones(1, 1)) * float("inf") + b(torch.ones(1, 1))).sum())
    first.step()
    second.step()
    assert first.step_was_skipped and not second.step_was_skipped and accelerator.optimizer_step_was_skipped
    assert (a.weight.item(), b.weight.item()) == (0.0, -1.0)
    assert accelerator.scaler.state_dict()["scale"] == 128.0, "lower from the next update on"


def test_adversaries_step_in_turns():
    accelerator, (a, b), (first, second) = two_in_fp16()
    x = torch.ones(1, 1)
    for model, optimizer in ((a, first), (b, second)):
        accelerator.backward(model(x).sum())
        accelerator.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
        optimizer.zero_grad()
    assert (a.weight.item(), b.weight.item()) == (-1.0, -1.0)


def test_a_fused_optimizer_reports_skipped_steps():
    handlers = [GradScalerKwargs(init_scale=2.0)]
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=handlers)
    model = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1.0, fused=True))
    before = model.weight.item()
    accelerator.backward(model(torch.ones(1, 1)).sum() * float("inf"))
    optimizer.step()
    assert optimizer.step_was_skipped and model.weight.item() == before


def test_fp16_gradients_are_clipped_only_when_whole():
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", gradient_accumulation_steps=2)
    model = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(1, 1)).sum())
        with pytest.raises(ValueError, match=r"if accelerator\.sync_gradients"):
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(1, 1)).sum())
        accelerator.unscale_gradients()
        accelerator.clip_grad_norm_(model.parameters(), 1.0)  # unscaled once, however often one asks
        assert model.weight.grad.norm() <= 1.0
        optimizer.step()


def test_items_are_divided_once_an_update():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    x = torch.ones(2, 1)
    with accelerator.no_sync(model):
        accelerator.backward(model(x).sum(), num_items=2)
    accelerator.backward(model(x).sum(), num_items=2)
    assert model.weight.grad.item() == 1.0, "accumulated by hand"
    with pytest.raises(ValueError, match="divided the gradients of this update already"):
        accelerator.backward(model(x).sum(), num_items=2)
    optimizer.step()
    optimizer.zero_grad()
    count = torch.tensor(2.0, dtype=torch.float64)
    accelerator.backward(model(x).sum(), num_items=count)
    assert model.weight.grad.item() == 1.0 and count.item() == 2.0, "the caller's tensor is left alone"
    with pytest.raises(ValueError, match="must not be negative"):
        optimizer.step()
        accelerator.backward(model(x).sum(), num_items=torch.tensor(-1))


def test_cpu_may_be_asked_for_again_where_it_is_in_use():
    Accelerator()
    assert Accelerator(cpu=True).device.type == "cpu"


def test_copies_of_prepared_objects_follow_the_run():
    import pickle

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    optimizer, scheduler, loader = accelerator.prepare(
        optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1), small_loader()
    )
    twin = copy.deepcopy(scheduler)
    for _ in loader:
        assert pickle.loads(pickle.dumps(scheduler)).gradient_state.in_dataloader
        accelerator.sync_gradients = False
        assert not twin.gradient_state.sync_gradients
        break
    assert accelerator.prepare(optimizer.optimizer) is optimizer
    assert accelerator.prepare(scheduler.scheduler) is scheduler
    assert len(accelerator._optimizers) == 1


def test_another_precision_after_a_reset():
    from accelerate.state import AcceleratorState

    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x):
            seen.append(torch.get_autocast_dtype("cpu"))
            return self.layer(x)

    model = Model()
    for precision in ("bf16", "fp16"):
        AcceleratorState._reset_state(True)
        Accelerator(cpu=True, mixed_precision=precision).prepare(model)(torch.ones(1, 1))
    assert seen[0] is torch.bfloat16
    assert len(vars(model.forward)["_free"]) == 1 and model.forward._free is not model.forward.__wrapped__._free


def test_an_older_split_batches_wins_whatever_it_says():
    config = DataLoaderConfiguration(split_batches=True)
    assert not Accelerator(cpu=True, split_batches=False, dataloader_config=config).split_batches
    assert Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True)).split_batches


def test_the_end_of_a_loader_ends_the_accumulation_unless_asked_not_to():
    synced = [step[0] for _ in range(2) for step in accumulated(3, num_steps=2)]
    assert synced == [False, True, True] * 2
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    )
    loader = accelerator.prepare(small_loader(6))
    seen = []
    for _ in range(2):
        for _ in loader:
            with accelerator.accumulate():
                seen.append((accelerator.sync_gradients, accelerator.step))
    assert seen == [(False, 1), (True, 2), (False, 3), (True, 4), (False, 5), (True, 6)]


def test_micro_steps_are_counted_from_the_end_of_a_loader():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = accelerator.prepare(small_loader(6))
    seen = []
    for _ in range(2):
        for _ in loader:
            with accelerator.accumulate():
                seen.append((accelerator.sync_gradients, accelerator.step))
    assert seen == [(False, 1), (True, 2), (True, 0)] * 2


def test_freed_memory_leaves_no_micro_steps():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    for _ in range(3):
        with accelerator.accumulate():
            pass
    assert accelerator.step == 3
    accelerator.free_memory()
    assert accelerator.step == 0


def test_the_constructors_profile_handler(tmp_path):
    handler = ProfileKwargs(activities=["cpu"], record_shapes=True, output_trace_dir=str(tmp_path / "traces"))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[handler])
    with accelerator.profile() as profiler:
        torch.ones(2) + 1
    assert [event.input_shapes for event in profiler.events() if event.name == "aten::add"] == [[[2], [], []]]
    assert (tmp_path / "traces" / "profile_0.json").is_file()


@pytest.mark.parametrize(("norm_type", "norm"), [(2, 5.0), (1, 7.0), (float("inf"), 4.0)])
def test_the_norm_that_is_clipped(norm_type, norm):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(nn.Linear(2, 1, bias=False))
    accelerator.backward((model.weight * torch.tensor([3.0, 4.0])).sum())
    assert accelerator.clip_grad_norm_(model.parameters(), norm / 2, norm_type=norm_type).item() == pytest.approx(norm)
    assert model.weight.grad[0].tolist() == pytest.approx([1.5, 2.0], rel=1e-4)


@pytest.mark.parametrize(
    ("rank", "local", "each", "saves"),
    [(0, 0, False, True), (0, 0, True, True), (2, 0, False, False), (2, 0, True, True), (1, 1, True, False)],
)
def test_who_saves_on_several_machines(rank, local, each, saves):
    accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(save_on_each_node=each))
    accelerator.state.process_index, accelerator.state.local_process_index = rank, local
    assert accelerator.should_save_model is saves


def test_autocast_takes_its_handlers():
    handler = AutocastKwargs(enabled=False)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", kwargs_handlers=[handler])
    layer = nn.Linear(2, 2)
    with accelerator.autocast():
        assert layer(torch.ones(1, 2)).dtype is torch.float32
    with accelerator.autocast(AutocastKwargs(enabled=True)):
        assert layer(torch.ones(1, 2)).dtype is torch.bfloat16
    seen = []
    layer.register_forward_hook(lambda *found: seen.append(found[2].dtype))
    accelerator.prepare(nn.Sequential(layer))(torch.ones(1, 2))
    assert seen == [torch.float32]
