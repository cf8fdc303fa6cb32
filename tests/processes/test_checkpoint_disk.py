"""Saves on a disk that is full, read-only or fails: an error on every rank, and nothing lost (by a preloaded library)."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchdata.stateful_dataloader")

from accelerate.checkpointing import SaveError
from accelerate.checkpointing.finding import problems_of
from tests.helpers.crash import Ballast
from tests.helpers.ranks import RankPool
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
    """Saves while calls fail as the plan says; returns the error's message, or nothing."""
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
    """Tries all failures, in the background and not; returns what each save said."""
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


def test_a_failing_disk_is_an_error_on_every_rank_and_loses_nothing(
    pool_on_a_failing_disk: RankPool, tmp_path: Path
) -> None:
    (tmp_path / "plans").mkdir()
    recipe = Recipe(str(tmp_path / "project"), limit=1)
    ranks = pool_on_a_failing_disk.run(2, saves, recipe, str(tmp_path / "plans"), timeout=240)
    for failure, *messages in zip(FAILURES, *ranks, strict=True):
        if failure[-1] == SHORT:
            assert messages == ["", ""], failure
        else:
            assert all(os.strerror(failure[-1]) in message for message in messages), (failure, messages)
