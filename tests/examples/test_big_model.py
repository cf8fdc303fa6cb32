"""The big-model example on weights that the language model's example trained: the same text from disk as from memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.test_examples import start


@pytest.mark.slow
def test_a_trained_model_writes_the_same_from_disk(tmp_path: Path) -> None:
    folder = str(tmp_path / "weights")
    start("language_model.py", "--characters=20000", "--epochs=1", "--sample=1", "--batch_size=8", f"--save={folder}")
    assert len(list(Path(folder).glob("*.safetensors"))) > 1
    arguments = [folder, "--sample=40", "--prompt=def "]
    spread, resident = (start("big_model.py", *arguments, *more).stdout for more in (["--memory=500KB"], []))
    assert [line.split()[-1] for line in spread.splitlines() if line.startswith("  ")].count("disk") > 1
    assert "everything" in resident and " disk" not in resident
    text = spread[spread.index("def ") :]
    assert text == resident[resident.index("def ") :] and len(text) > 40
