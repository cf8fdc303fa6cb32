"""Damages a small checkpoint in every way and loads it: each must be reported, the file named, and nothing changed or run.

python -m tests.helpers.corruption             every byte of small files flipped, every length truncated to
python -m tests.helpers.corruption --most 20   20 places of each file
python -m tests.helpers.corruption --fresh     loaded into a run that has not begun, whose optimizer has no state yet
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

Damage = tuple[str, str, Callable[[], object]]


class Bomb:
    """Runs a command when it is unpickled."""

    target = ""

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.target}",))


def main() -> None:
    """Tries all damages and prints how many were reported; exits with 1 if any was not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=8192, help="places tried in each file")
    parser.add_argument("--fresh", action="store_true", help="load into a run that has not begun")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        outcome = corrupt(Path(scratch), chosen.most, chosen.fresh)
    print(json.dumps(outcome))
    sys.exit(outcome["tried"] != outcome["reported"] or outcome["executed"])


def corrupt(scratch: Path, most: int, fresh: bool = False) -> dict[str, Any]:
    """Saves a small run and loads it with each damage.

    Args:
        scratch: An empty folder.
        most: Places tried in each file; of larger ones, as many evenly spread.
        fresh: Load into a run that has not begun, and not into the one that saved.

    Returns:
        How many damages of each kind were tried, how many were reported as they must be, and whether code ran.
    """
    from tests.helpers.resuming import Recipe, Training

    run = Training.start(Recipe(str(scratch / "project"))).train(3)
    folder = scratch / "checkpoint"
    run.accelerator.save_state(folder)
    intact = scratch / "intact"
    shutil.copytree(folder, intact)
    Bomb.target = str(scratch / "executed")
    if fresh:
        run = Training.start(Recipe(str(scratch / "project")))
    else:
        run.train(2)
    before = snapshot(run)
    kinds: Counter[str] = Counter()
    reported = 0
    for kind, names, inflict in damages(folder, most):
        inflict()
        kinds[kind.split()[0]] += 1
        if is_reported(run, folder, names.split("|"), before):
            reported += 1
        else:
            print(f"NOT REPORTED: {kind} of {names}", file=sys.stderr)
            before = snapshot(run)
        for name in names.split("|"):
            restore(intact / name, folder / name)
    executed = Path(Bomb.target).exists()
    run.accelerator.load_state(folder)
    sizes = {path.name: path.stat().st_size for path in sorted(intact.iterdir())}
    return {
        "files": sizes,
        "tried": sum(kinds.values()),
        "reported": reported,
        "kinds": dict(kinds),
        "executed": executed,
    }


def snapshot(run: Any) -> list[Any]:
    """What a load would change."""
    import torch

    moments = [value.clone() for state in run.optimizer.optimizer.state.values() for value in state.values()]
    return [run.weights(), torch.get_rng_state(), torch.tensor(run.scheduler.scheduler.last_epoch), *moments]


def is_reported(run: Any, folder: Path, names: list[str], before: list[Any]) -> bool:
    """Whether loading a damaged checkpoint fails, names a damaged file, and changes nothing."""
    import torch

    from accelerate.checkpointing import LoadError

    try:
        run.accelerator.load_state(folder)
    except LoadError as error:
        told = any(problem.file in names for problem in error.problems) and any(name in str(error) for name in names)
        return told and all(map(torch.equal, snapshot(run), before))
    return False


def restore(source: Path, target: Path) -> None:
    """Puts a file back."""
    if target.is_dir():
        target.rmdir()
    shutil.copyfile(source, target)


def damages(folder: Path, most: int) -> Iterator[Damage]:
    """All damages of a checkpoint's files: the kind, the files' names with bars between them, and what inflicts it."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        for kind, inflict in damages_of(path, most):
            yield kind, path.name, inflict
    for one, other in combinations(files, 2):
        yield "swap", f"{one.name}|{other.name}", functools.partial(_swap, one, other)


def damages_of(path: Path, most: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """All damages of one file."""
    import torch

    content = path.read_bytes()
    places = sorted({*range(0, len(content), max(1, len(content) // most)), len(content) - 1})
    for place in places:
        bit = 1 << (place % 8)
        changed = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
        yield f"flip {place}.{bit}", functools.partial(path.write_bytes, changed)
    for size in places:
        yield f"truncate {size}", functools.partial(path.write_bytes, content[:size])
    whole = {
        "append": content + b"\0",
        "zeros": bytes(len(content)),
        "bomb": pickle.dumps(Bomb()),
        "bomb of the same size": pickle.dumps(Bomb()).ljust(len(content), b"\0")[: len(content)],
    }
    for kind, changed in whole.items():
        yield kind, functools.partial(path.write_bytes, changed)
    yield "bomb by torch.save", functools.partial(torch.save, Bomb(), path)
    yield "delete", path.unlink
    yield "folder", functools.partial(_make_folder, path)


def _swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


if __name__ == "__main__":
    main()
