"""A training script with types; never run. `assert_type` fails under mypy and pyright where the package loses one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import assert_type

from accelerate import Accelerator, PartialState, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import (
    extract_model_from_parallel,
    find_executable_batch_size,
    gather,
    pad_across_processes,
    reduce,
    send_to_device,
)

Rows = tuple[torch.Tensor, ...]


class Classifier(nn.Module):
    def classify(self, images: torch.Tensor) -> torch.Tensor:
        return images


def prepared(accelerator: Accelerator) -> None:
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader: DataLoader[Rows] = DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2)
    scheduler = StepLR(optimizer, 1)
    assert_type(accelerator.prepare(model), Classifier)
    assert_type(accelerator.prepare(model, optimizer), tuple[Classifier, torch.optim.SGD])
    three = accelerator.prepare(model, optimizer, loader, device_placement=[True, None, False])
    assert_type(three, tuple[Classifier, torch.optim.SGD, DataLoader[Rows]])
    four = accelerator.prepare(model, optimizer, loader, scheduler)
    assert_type(four, tuple[Classifier, torch.optim.SGD, DataLoader[Rows], StepLR])
    five = accelerator.prepare(model, optimizer, loader, loader, scheduler)
    assert_type(five, tuple[Classifier, torch.optim.SGD, DataLoader[Rows], DataLoader[Rows], StepLR])
    six = accelerator.prepare(model, model, optimizer, loader, loader, scheduler)
    assert_type(six[1], Classifier)
    assert_type(six[5], StepLR)
    assert_type(accelerator.prepare(model, model, model, optimizer, loader, loader, scheduler), Any)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for (images,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model.classify(images).sum())
            optimizer.step()
            scheduler.step()


def one_by_one(accelerator: Accelerator, model: Classifier, loader: DataLoader[Rows]) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    assert_type(accelerator.prepare_model(model, evaluation_mode=True), Classifier)
    assert_type(accelerator.prepare_optimizer(optimizer), AcceleratedOptimizer)
    assert_type(accelerator.prepare_scheduler(StepLR(optimizer, 1)), AcceleratedScheduler)
    assert_type(accelerator.prepare_data_loader(loader), DataLoader[Rows])
    assert_type(prepare_data_loader(loader, split_batches=True), DataLoader[Rows])
    assert_type(accelerator.skip_first_batches(loader, 2), DataLoader[Rows])
    assert_type(skip_first_batches(loader, 2), DataLoader[Rows])
    assert_type(accelerator.unwrap_model(model), Classifier)
    assert_type(extract_model_from_parallel(model), Classifier)


def trees(accelerator: Accelerator, batch: dict[str, torch.Tensor]) -> None:
    assert_type(accelerator.gather(batch["a"]), torch.Tensor)
    assert_type(accelerator.gather((batch, batch["a"])), tuple[dict[str, torch.Tensor], torch.Tensor])
    assert_type(accelerator.gather_for_metrics(batch), dict[str, torch.Tensor])
    assert_type(accelerator.reduce(batch, "mean"), dict[str, torch.Tensor])
    assert_type(accelerator.pad_across_processes(batch["a"], dim=1), torch.Tensor)
    assert_type(send_to_device(batch, accelerator.device), dict[str, torch.Tensor])
    assert_type(gather(batch), dict[str, torch.Tensor])
    assert_type(reduce(batch["a"]), torch.Tensor)
    assert_type(pad_across_processes(batch), dict[str, torch.Tensor])


def decorated(accelerator: Accelerator, state: PartialState) -> None:
    @accelerator.on_main_process
    def report(loss: float, *, digits: int = 2) -> str:
        return f"{loss:.{digits}f}"

    @state.on_process(process_index=1)
    def of_one(loss: float) -> str:
        return report(loss) or ""

    @state.on_local_main_process()
    def of_each_machine(path: str) -> int:
        return len(path)

    @find_executable_batch_size(starting_batch_size=64)
    def train(batch_size: int, epochs: int) -> float:
        return batch_size / epochs

    assert_type(report(0.5, digits=3), str | None)
    assert_type(of_one(0.5), str | None)
    assert_type(of_each_machine("a"), int | None)
    assert_type(train(3), float)
    with accelerator.split_between_processes(["a", "b"], apply_padding=True) as prompts:
        assert_type(prompts, list[str])
    with accelerator.main_process_first() as nothing:
        assert_type(nothing, None)
