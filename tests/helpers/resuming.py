"""A small training that can be stopped anywhere and resumed, for tests of checkpoints. Nothing here asserts."""

from __future__ import annotations

import datetime
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.settings.handlers import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)


class Counting(Dataset[Any]):
    """Samples that carry their index, and a record of which were fetched in this process.

    Args:
        length: How many.
        augmented: Add to each sample what the generators of torch, numpy and Python give.
    """

    def __init__(self, length: int, augmented: bool = False) -> None:
        self.length = length
        self.augmented = augmented
        self.fetched: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.fetched.append(index)
        generator = torch.Generator().manual_seed(index)
        sample = torch.randn(6, generator=generator)
        if self.augmented:
            sample = sample + torch.rand(6) + np.random.rand() + random.random()
        return torch.tensor(index), sample


class Stream(IterableDataset[Any]):
    """The same as a stream, read by one process or shared out by its workers."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        source = Counting(self.length)
        for index in range(info.id if info else 0, self.length, info.num_workers if info else 1):
            yield source[index]


@dataclass(frozen=True)
class Recipe:
    """How a run is set up; the same recipe gives the same run.

    Attributes:
        folder: The project's folder.
        total_batch: Samples of all ranks at one step.
        length: Samples in the dataset.
        workers, persistent: Of the loader.
        accumulation: Micro-steps per update.
        precision: ``no``, ``bf16`` or ``fp16``.
        seedable: Shuffle by seed and epoch.
        augmented: Samples have something random added when they are read.
        stream, dispatch: What the loader reads, and how.
        limit: `total_limit`.
        sharded: Ranks hold shards (FSDP 2).
    """

    folder: str
    total_batch: int = 8
    length: int = 80
    workers: int = 0
    persistent: bool = False
    accumulation: int = 1
    precision: str = "no"
    seedable: bool = True
    augmented: bool = False
    stream: bool = False
    dispatch: bool | None = None
    limit: int | None = None
    sharded: bool = False


@dataclass
class Training:
    """A prepared run.

    Attributes:
        ids: The sample indices this rank was given, a list a step.
        losses: The losses of this rank.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    loader: Any
    scheduler: Any
    data: Any
    ids: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, recipe: Recipe, seed: int = 0) -> Training:
        """Sets the run up, as a script does; `seed` is the process's own, which a checkpoint overrules."""
        accelerator = Accelerator(
            cpu=True,
            mixed_precision=recipe.precision,
            fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2) if recipe.sharded else None,
            project_config=ProjectConfiguration(
                project_dir=recipe.folder, automatic_checkpoint_naming=True, total_limit=recipe.limit
            ),
            dataloader_config=DataLoaderConfiguration(
                use_stateful_dataloader=True,
                use_seedable_sampler=recipe.seedable,
                data_seed=7 if recipe.seedable else None,
                dispatch_batches=recipe.dispatch,
            ),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=60))],
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=recipe.accumulation, sync_with_dataloader=False
            ),
            schedule_per_update=True,
        )
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
        data = Stream(recipe.length) if recipe.stream else Counting(recipe.length, recipe.augmented)
        loader: Any = DataLoader(
            data,
            batch_size=recipe.total_batch // accelerator.num_processes,
            shuffle=not recipe.stream,
            num_workers=recipe.workers,
            persistent_workers=recipe.persistent,
        )
        prepared: list[Any] = list(accelerator.prepare(model, optimizer, loader, scheduler))
        return cls(accelerator, prepared[0], prepared[1], prepared[2], prepared[3], data)

    def train(self, steps: int, save_at: Collection[int] = (), **options: Any) -> Training:
        """Goes on for that many micro-steps, and saves after those that `save_at` names."""
        if 0 in save_at:
            self.accelerator.save_state(**options)
        while steps:
            for ids, inputs in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = (
                        self.model(inputs).square().mean() + (self.model(inputs) - inputs.sum(1, True)).square().mean()
                    )
                    self.accelerator.backward(loss)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                self.ids.append(ids.tolist())
                self.losses.append(loss.item())
                steps -= 1
                if len(self.ids) in save_at:
                    self.accelerator.save_state(**options)
                if not steps:
                    break
        return self

    def weights(self) -> torch.Tensor:
        """All parameters, in one vector. Collective, where they are sharded."""
        params = [p.detach() for p in self.accelerator.unwrap_model(self.model).parameters()]
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in params]
        return torch.cat([p.flatten().float() for p in whole])
