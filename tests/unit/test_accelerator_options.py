"""Options of `Accelerator`'s methods that have an effect on one process: each test fails if its option is ignored."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.tracking import GeneralTracker, registry
from accelerate.utils import AutocastKwargs, GradScalerKwargs, ProfileKwargs, ProjectConfiguration
from tests.helpers.simulated_devices import simulated_cuda


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(8.0)), batch_size=2, **options)


def test_clipping_takes_the_norm_that_is_asked_for():
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert Accelerator(cpu=True).clip_grad_norm_(model.parameters(), 100.0, norm_type=1).item() == pytest.approx(7)


def test_backward_hands_its_arguments_on():
    weight = torch.ones(1, requires_grad=True)
    loss, accelerator = (weight * 2).sum(), Accelerator(cpu=True)
    accelerator.backward(loss, retain_graph=True)
    accelerator.backward(loss)
    assert weight.grad.item() == 4


def test_clear_forgets_what_it_is_given():
    assert Accelerator(cpu=True).clear(nn.Linear(1, 1), None) == [None, None]


@pytest.mark.parametrize("name", ["on_main_process", "on_local_main_process", "on_process", "on_local_process"])
@pytest.mark.parametrize("kind", [Accelerator, PartialState])
def test_a_decorator_may_be_called_with_the_function(name, kind):
    decorate = getattr(kind(cpu=True), name)
    options = {"on_process": {"process_index": 0}, "on_local_process": {"local_process_index": 0}}.get(name, {})
    assert decorate(lambda: "ran", **options)() == "ran"


@pytest.mark.parametrize("option", ["local_process_index", "local_process_idx"])
@pytest.mark.parametrize("kind", [Accelerator, PartialState])
def test_a_function_runs_on_the_process_that_is_named(kind, option):
    one = kind(cpu=True)
    assert one.on_local_process(**{option: 0})(lambda: "ran")() == "ran"
    assert one.on_local_process(**{option: 1})(lambda: "ran")() is None
    assert one.on_process(process_index=0)(lambda: "ran")() == "ran"
    assert one.on_process(process_index=1)(lambda: "ran")() is None


def test_print_prints_what_it_is_given(capsys):
    Accelerator(cpu=True).print("a", "b", sep="-")
    PartialState().print("c", "d", sep="-")
    Accelerator().state.print("e", "f", sep="-")
    assert capsys.readouterr().out == "a-b\nc-d\ne-f\n"


@pytest.mark.parametrize("wanted", [True, False])
def test_objects_are_moved_only_where_that_is_asked_for(wanted):
    """The general setting is the other one."""
    with simulated_cuda(1):
        accelerator = Accelerator(device_placement=not wanted)
        device = "cuda" if wanted else "cpu"
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        weight = torch.nn.Parameter(torch.ones(1, device="cuda"))
        optimizer.add_param_group({"params": weight})
        optimizer.state[weight]["momentum_buffer"] = torch.ones(1)
        prepared = accelerator.prepare_optimizer(optimizer, device_placement=wanted)
        assert prepared.state[weight]["momentum_buffer"].device.type == device
        (batch,) = next(iter(accelerator.prepare_data_loader(loader(), device_placement=wanted)))
        assert batch.device.type == device
        assert accelerator.prepare_model(model, device_placement=wanted).weight.device.type == device


@pytest.mark.parametrize("wanted", [True, False])
def test_an_accelerator_moves_objects_or_does_not(wanted):
    with simulated_cuda(1):
        model, data = Accelerator(device_placement=wanted).prepare(nn.Linear(1, 1), loader())
        device = "cuda" if wanted else "cpu"
        assert model.weight.device.type == next(iter(data))[0].device.type == device


@pytest.mark.parametrize("kind", [Accelerator, PartialState])
def test_the_cpu_is_used_where_there_is_an_accelerator(kind):
    with simulated_cuda(1):
        assert kind(cpu=True).device.type == "cpu"


def test_batches_are_skipped():
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(loader())
    assert [batch[0].tolist() for batch in accelerator.skip_first_batches(prepared, num_batches=2)] == [[4, 5], [6, 7]]


def test_the_signals_that_stop_are_those_named():
    accelerator, before = Accelerator(cpu=True), signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        accelerator.stop_on(signal.SIGUSR1)
        assert not accelerator.should_stop
        os.kill(os.getpid(), signal.SIGUSR1)
        assert accelerator.should_stop
    finally:
        signal.signal(signal.SIGUSR1, before)


class Recording(GeneralTracker):
    """A tracker that keeps its arguments."""

    name = "recording"
    requires_logging_directory = False

    def __init__(self, _run: str, color: str = "none") -> None:
        super().__init__()
        self.color = color
        self.logged: list[Any] = []

    @property
    def tracker(self) -> str:
        return "the library's own"

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.logged.append((values, step, kwargs))


def test_trackers_get_their_arguments(monkeypatch):
    monkeypatch.setitem(registry._registered, "recording", Recording)
    accelerator = Accelerator(cpu=True, log_with="recording")
    accelerator.init_trackers("run", config={"lr": 1}, init_kwargs={"recording": {"color": "red"}})
    tracker = accelerator.get_tracker("recording")
    accelerator.log({"loss": 1}, step=3, log_kwargs={"recording": {"more": True}})
    assert tracker.color == "red" and tracker.config == {"lr": 1}
    assert tracker.logged == [({"loss": 1}, 3, {"more": True})]
    assert accelerator.get_tracker("recording", unwrap=True) == "the library's own"


def test_checkpoints_take_the_models_own_arguments(tmp_path):
    """`load_model_func_kwargs` goes to each model's ``load_state_dict``, `load_kwargs` to ``torch.load``."""
    seen: list[dict[str, Any]] = []

    class Model(nn.Linear):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs)
            return super().load_state_dict(*args, **kwargs)

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(Model(1, 1))
    accelerator.save_state(tmp_path / "saved", safe_serialization=False)
    accelerator.load_state(tmp_path / "saved", assign=True)
    assert seen[-1]["assign"] is True
    with pytest.raises(Exception, match="no_such_option"):
        accelerator.load_state(tmp_path / "saved", load_kwargs={"no_such_option": 1})


def test_objects_are_saved_as_safetensors_if_asked(tmp_path):
    Accelerator(cpu=True).save({"x": torch.ones(1)}, tmp_path / "saved", safe_serialization=True)
    assert load_file(tmp_path / "saved")["x"].tolist() == [1]


def test_resuming_may_be_lenient(tmp_path):
    def started() -> Accelerator:
        project = ProjectConfiguration(project_dir=tmp_path, automatic_checkpoint_naming=True)
        return Accelerator(cpu=True, project_config=project)

    first = started()
    first.prepare(nn.Linear(1, 1))
    first.save_state()
    second = started()
    second.prepare(nn.Linear(1, 1), nn.Linear(2, 2))
    assert second.resume(strict=False) is not None


def test_one_optimizers_gradients_are_unscaled():
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (first, second)]
    handlers = [GradScalerKwargs(init_scale=1024.0)]
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=handlers)
    first, second, *prepared = accelerator.prepare(first, second, *optimizers)
    accelerator.backward((first(torch.ones(1, 1)) + second(torch.ones(1, 1))).sum())
    accelerator.unscale_gradients(prepared[0])
    assert (first.bias.grad.item(), second.bias.grad.item()) == (1, 1024)


def test_a_loss_scale_backs_off_and_grows_as_asked():
    model = nn.Linear(1, 1)
    scaling = GradScalerKwargs(init_scale=64.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=1)
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=[scaling])
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    scales = []
    for factor in (1.0, float("inf")):
        accelerator.backward((model(torch.ones(1, 1)) * factor).sum())
        optimizer.step()
        optimizer.zero_grad()
        scales.append(accelerator.scaler.get_scale())
    assert scales == [256, 64]


def test_a_scaler_may_be_switched_off():
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(enabled=False)])
    assert accelerator.scaler is None or not accelerator.scaler.is_enabled()


def test_autocast_keeps_casts_or_does_not():
    """Seen by a weight that is changed between two products."""
    weight, inputs = torch.ones(1, 1, requires_grad=True), torch.ones(1, 1)

    def second_product(cached: bool) -> float:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        with torch.no_grad():
            weight.fill_(1)
        with accelerator.autocast(AutocastKwargs(cache_enabled=cached)):
            inputs @ weight
            weight.data.fill_(2)
            return (inputs @ weight).item()

    assert second_product(cached=False) == 2
    assert second_product(cached=True) == 1


def test_a_profile_records_what_is_asked_for():
    options = dict.fromkeys(("record_shapes", "profile_memory", "with_stack", "with_flops", "with_modules"), True)
    with Accelerator(cpu=True).profile(ProfileKwargs(activities=["cpu"], **options)) as profile:
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert {name: getattr(profile, name) for name in options} == options


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # that is what the option is for
@pytest.mark.parametrize(("option", "steps"), [({}, 1), ({"step_scheduler_with_optimizer": False}, 2)])
def test_schedulers_step_with_their_optimizers_or_by_themselves(option, steps):
    """One update of two micro-steps."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 + step)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **option)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 1)).sum())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert scheduler.get_last_lr() == [1 + steps]


def test_a_scheduler_gets_its_arguments(capsys):
    Accelerator(cpu=True)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = AcceleratedOptimizer(torch.optim.SGD([parameter], lr=1.0))

    class Scheduler:
        seen: list[Any] = []

        def step(self, *args: Any, **kwargs: Any) -> None:
            self.seen.append((args, kwargs))

        def print_lr(self, *args: Any, **kwargs: Any) -> None:
            self.seen.append((args, kwargs))

    scheduler = AcceleratedScheduler(Scheduler(), optimizer)
    scheduler.step(0.5, epoch=2)
    scheduler.print_lr(True, group=0)
    assert Scheduler.seen == [((0.5,), {"epoch": 2}), ((True,), {"group": 0})]
    lone = AcceleratedScheduler(Scheduler(), optimizer, step_with_optimizer=False)
    optimizer.gradient_state._set_sync_gradients(False)
    lone.step()
    assert len(Scheduler.seen) == 3


def test_an_optimizers_state_stays_where_it_is_or_moves():
    with simulated_cuda(1):
        Accelerator()
        weight = nn.Parameter(torch.ones(1, device="cuda"))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        optimizer.state[weight]["momentum_buffer"] = torch.ones(1)
        AcceleratedOptimizer(optimizer, device_placement=False)
        assert optimizer.state[weight]["momentum_buffer"].device.type == "cpu"
        AcceleratedOptimizer(optimizer)
        assert optimizer.state[weight]["momentum_buffer"].device.type == "cuda"
