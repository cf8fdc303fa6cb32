"""The progress bar of one process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from accelerate.runtime import world
from accelerate.utils import tqdm


@pytest.mark.parametrize(
    ("local_rank", "options", "drawn"),
    [
        (0, {}, True),
        (1, {}, False),
        (1, {"main_process_only": False}, True),
        (0, {"disable": True}, False),
        (1, {"disable": False}, False),
    ],
)
def test_who_draws(local_rank, options, drawn, capsys):
    world.set_current(replace(world.current(), rank=local_rank + 8, local_rank=local_rank))  # of a second machine
    assert list(tqdm(range(3), desc="steps", **options)) == [0, 1, 2]
    assert ("steps" in capsys.readouterr().err) is drawn


def test_without_an_iterable():
    with tqdm(total=2, disable=True) as bar:
        bar.update(2)


@pytest.mark.parametrize("flag", [True, False])
def test_a_bool_where_the_iterable_belongs(flag):
    with pytest.raises(ValueError, match=f"Pass main_process_only={flag} by keyword"):
        tqdm(flag, range(3))
