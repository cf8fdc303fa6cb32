"""Saves to full, read-only, failing and slow disks, simulated by a preloaded library: an error on every rank, or none."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("torchdata.stateful_dataloader")

from accelerate.checkpointing import CheckpointError, SaveError
from accelerate.checkpointing.discovery import problems_of
from accelerate.utils.fsdp_utils import save_fsdp_model
from tests.helpers.crash import Ballast
from tests.helpers.ranks import RankPool
from tests.helpers.releases import FSDP2_ON_CPU
from tests.helpers.resuming import Recipe, Training

SOURCE = Path(__file__).parents[1] / "helpers" / "failing_disk.c"
PLAN = "FAILING_DISK_PLAN"
SHORT = 0
FULL, FORBIDDEN, BROKEN = errno.ENOSPC, errno.EACCES, errno.EIO
# Which ranks' disk fails; the first call that does; how. Rank 1 writes its random states only.
FAILURES: list[tuple[tuple[int, ...], str, int, int]] = [
    *(((0,), "open", number, FORBIDDEN) for number in (1, 2, 4, 8)),
    *(((0,), "write", number, FULL) for number in (1, 2, 3, 4, 6, 8, 10)),
    *(((0,), "fsync", number, BROKEN) for number in (1, 3, 6, 8, 9)),
    ((0,), "mkdir", 1, FORBIDDEN),
    ((0,), "rename", 1, FULL),
    ((1,), "open", 1, FORBIDDEN),
    ((1,), "write", 1, FULL),
    ((1,), "fsync", 1, BROKEN),
    ((0, 1), "open", 1, FORBIDDEN),
    ((0, 1), "write", 1, FULL),
    ((0, 1), "write", 2, SHORT),
    ((0,), "write", 1, SHORT),
]


@pytest.fixture(scope="module")
def pool_on_a_failing_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: the library that makes calls fail cannot be built")
    library = tmp_path_factory.mktemp("library") / "failing_disk.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl", "-lpthread"], check=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        pool = RankPool()
        yield pool
        pool.close()


def folders(recipe: Recipe) -> list[str]:
    return sorted(name for name in os.listdir(Path(recipe.folder) / "checkpoints") if "." not in name)


def one_save(run: Training, plan: Path, text: str, asynchronous: bool) -> str:
    """Saves while calls fail according to a plan; returns the error message, or an empty string."""
    accelerator = run.accelerator
    plan.write_text(text)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(asynchronous=asynchronous)
        accelerator.wait_for_checkpoint()
        return ""
    except SaveError as error:
        return str(error)
    finally:
        accelerator.wait_for_everyone()
        plan.unlink()


def saves(recipe: Recipe, plans: str) -> list[str]:
    """Tries all failures, synchronously and asynchronously; returns the outcome of each save."""
    run = Training.start(recipe).train(2)
    accelerator = run.accelerator
    accelerator.register_for_checkpointing(Ballast())
    accelerator.save_state()
    plan = Path(plans) / str(accelerator.process_index)
    os.environ[PLAN] = str(plan)
    messages = []
    for number, (victims, *failure) in enumerate(FAILURES):
        before = folders(recipe)
        run.train(1)
        mine = f"{recipe.folder} {' '.join(map(str, failure))}\n" if accelerator.process_index in victims else ""
        message = one_save(run, plan, mine, asynchronous=bool(number % 2))
        assert (folders(recipe) == before) == bool(message), (failure, message)
        assert problems_of(Path(recipe.folder) / "checkpoints" / folders(recipe)[-1]) == [], failure
        accelerator.wait_for_everyone()
        messages.append(message)
    weights = run.train(1).weights()
    accelerator.save_state()
    run.train(1)
    assert not accelerator.resume().problems
    assert torch.equal(run.weights(), weights)
    return messages


def test_disk_failures_raise_on_every_rank_and_lose_nothing(pool_on_a_failing_disk: RankPool, tmp_path: Path) -> None:
    (tmp_path / "plans").mkdir()
    recipe = Recipe(str(tmp_path / "project"), limit=1)
    ranks = pool_on_a_failing_disk.run(2, saves, recipe, str(tmp_path / "plans"), timeout=240)
    for failure, *messages in zip(FAILURES, *ranks, strict=True):
        if failure[-1] == SHORT:
            assert messages == ["", ""], failure
        else:
            assert all(os.strerror(failure[-1]) in message for message in messages), (failure, messages)


TIMEOUT, SLOW = 2.0, 3.0
"""Seconds: timeout of the training group, and duration of one call of rank 0's disk (or of one object)."""


class SlowToLoad(Ballast):
    def load_state_dict(self, state: Any) -> None:
        if dist.get_rank() == 0:
            time.sleep(SLOW)


OPERATIONS = [
    *("save_state", "asynchronous", "save_model", "load_state", "resume"),
    *(
        pytest.param(operation, marks=FSDP2_ON_CPU)
        for operation in ("save_state shards", "save_state whole", "save_model whole", "save_fsdp_model")
    ),
]


def operation_on_a_slow_disk(operation: str, folder: str) -> Any:
    """Runs an operation with a call that outlasts the training group's timeout, then a collective of that group."""
    sharded = operation.endswith((" shards", " whole", "fsdp_model"))
    run = Training.start(Recipe(f"{folder}/project", sharded=sharded)).train(1)
    accelerator = run.accelerator
    plugin = accelerator.state.fsdp_plugin if sharded else None
    if plugin is not None:
        plugin.set_state_dict_type("SHARDED_STATE_DICT" if operation.endswith("shards") else "FULL_STATE_DICT")
    if operation in ("load_state", "resume"):
        accelerator.register_for_checkpointing(SlowToLoad())
        accelerator.save_state()
    plan = Path(folder) / f"plan {accelerator.process_index}"
    os.environ[PLAN] = str(plan)
    if accelerator.process_index == 0:
        plan.write_text(f"{folder}/project fsync 1 {-int(SLOW * 1000)}\n")
    accelerator.wait_for_everyone()
    dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=TIMEOUT))
    if operation == "save_fsdp_model":
        save_fsdp_model(plugin, accelerator, run.model, f"{folder}/project")
    elif operation.startswith("save_model"):
        accelerator.save_model(run.model, f"{folder}/project/model")
    elif operation == "load_state":
        accelerator.load_state()
    elif operation == "resume":
        assert accelerator.resume() is not None
    else:
        accelerator.save_state(asynchronous=operation == "asynchronous")
        accelerator.wait_for_checkpoint()
    accelerator.wait_for_everyone()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_ranks_wait_for_slow_disks_beyond_the_training_groups_timeout(
    pool_on_a_failing_disk: RankPool, tmp_path: Path, operation: str
) -> None:
    pool_on_a_failing_disk.run(2, operation_on_a_slow_disk, operation, str(tmp_path))


def killed_while_writing(folder: str, sharded: bool, victim: int) -> str:
    run = Training.start(Recipe(folder, sharded=sharded)).train(1)
    accelerator = run.accelerator

    def die(*_: Any) -> None:
        if accelerator.process_index == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    accelerator.register_save_state_pre_hook(die)
    accelerator.save_state()
    return ""


@pytest.mark.parametrize(
    ("sharded", "victim"), [(False, 0), *(pytest.param(True, rank, marks=FSDP2_ON_CPU) for rank in (0, 1))]
)
def test_a_killed_rank_fails_the_save_on_other_ranks_at_once(
    run_ranks: Any, tmp_path: Path, sharded: bool, victim: int
) -> None:
    # Must fail long before the timeout for disks, which is hours.
    results = run_ranks(3, killed_while_writing, str(tmp_path), sharded, victim, raises=True, timeout=60)
    assert results[victim].kind == "died"
    for failure in (results[rank] for rank in range(3) if rank != victim):
        assert isinstance(failure.exception, CheckpointError), failure
        assert "do not answer" in failure.text
