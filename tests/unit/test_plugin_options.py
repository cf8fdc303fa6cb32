"""Fields of handlers and plugins in a run of one process: each test fails if the field is ignored where it is to be used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import ProfileKwargs, ProjectConfiguration, TorchDynamoPlugin, send_to_device
from tests.helpers.simulated_devices import simulated_cuda


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backend", "eager"),
        ("mode", "max-autotune"),
        ("fullgraph", True),
        ("dynamic", True),
        ("options", {"trace.enabled": True}),
        ("disable", True),
    ],
)
def test_models_are_compiled_as_the_plugin_says(field, value, monkeypatch):
    seen: dict[str, Any] = {}

    def compiler(model: nn.Module, **options: Any) -> nn.Module:
        seen.update(options)
        return model

    monkeypatch.setattr(torch, "compile", compiler)
    plugin = TorchDynamoPlugin(**{"backend": "aot_eager", field: value})
    Accelerator(cpu=True, dynamo_plugin=plugin).prepare(nn.Linear(1, 1))
    assert seen[field] == value


def test_the_backend_alone_compiles(monkeypatch):
    seen: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda model, **options: seen.update(options) or model)
    Accelerator(cpu=True, dynamo_backend="eager").prepare(nn.Linear(1, 1))
    assert seen["backend"] == "eager"


@pytest.mark.parametrize("regional", [True, False])
def test_regions_are_compiled_or_the_whole(regional):
    model = nn.Sequential(nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)]))
    plugin = TorchDynamoPlugin(backend="eager", use_regional_compilation=regional)
    prepared = Accelerator(cpu=True, dynamo_plugin=plugin).prepare(model)
    assert (prepared is model) == regional


class Batch:
    """A batch that keeps how it was moved."""

    def __init__(self) -> None:
        self.moves: list[dict[str, Any]] = []

    def to(self, device: Any, **options: Any) -> Batch:
        self.moves.append(options)
        return self


@pytest.mark.parametrize("how", ["configuration", "function", "loader"])
def test_batches_are_moved_without_waiting_if_asked(how):
    batch = Batch()
    loader = DataLoader([0], collate_fn=lambda _: batch)
    with simulated_cuda(1):
        if how == "configuration":
            configuration = DataLoaderConfiguration(non_blocking=True)
            next(iter(Accelerator(dataloader_config=configuration).prepare(loader)))
        elif how == "loader":
            device = Accelerator().device
            next(iter(prepare_data_loader(loader, device, put_on_device=True, non_blocking=True)))
        else:
            send_to_device(batch, "cuda", non_blocking=True)
    assert batch.moves == [{"non_blocking": True}]


def test_checkpoints_are_numbered_from_where_asked(tmp_path):
    project = ProjectConfiguration(project_dir=tmp_path, automatic_checkpoint_naming=True, iteration=3)
    accelerator = Accelerator(cpu=True, project_config=project)
    accelerator.prepare(nn.Linear(1, 1))
    assert accelerator.save_state().name == "checkpoint_3"


def test_checkpoints_are_kept_where_and_as_many_as_asked(tmp_path):
    project = ProjectConfiguration(project_dir=tmp_path, automatic_checkpoint_naming=True, total_limit=1)
    accelerator = Accelerator(cpu=True, project_config=project)
    accelerator.prepare(nn.Linear(1, 1))
    for _ in range(2):
        accelerator.save_state()
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_1"]


def test_a_profiler_is_set_up_as_asked(tmp_path, monkeypatch):
    given: dict[str, Any] = {}
    real = torch.profiler.profile

    def profile(**options: Any) -> Any:
        given.update(options)
        return real(**options)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    traces: list[Any] = []
    handler = ProfileKwargs(
        activities=["cpu"],
        schedule_option={"wait": 0, "warmup": 1, "active": 1},
        on_trace_ready=traces.append,
        record_shapes=True,
        profile_memory=True,
        with_stack=True,
        with_flops=True,
        with_modules=True,
    )
    with Accelerator(cpu=True).profile(handler) as profiler:
        profiler.step()
        profiler.step()
    flags = ("record_shapes", "profile_memory", "with_stack", "with_flops", "with_modules")
    assert all(given[name] is True for name in flags)
    assert given["activities"] == [torch.profiler.ProfilerActivity.CPU]
    assert given["schedule"](1) == torch.profiler.ProfilerAction.RECORD_AND_SAVE
    assert traces
