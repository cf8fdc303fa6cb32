"""Checkpoints and models at URLs: round trips, rejected targets, uploads that are complete or absent."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from accelerate import Accelerator
from accelerate.checkpointing import CheckpointError, LoadError, SaveError
from accelerate.checkpointing.storage.filenames import is_url
from accelerate.settings.handlers import ProjectConfiguration


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Yields a URL for checkpoints, with a space in it."""
    base = "memory://bucket/my runs" if request.param == "memory" else f"file://{tmp_path}/my runs"
    yield base
    files, path = fsspec.core.url_to_fs(base)
    if files.exists(path):
        files.rm(path, recursive=True)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yields the staging folder of uploads, which is empty afterwards."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    assert [name for name in os.listdir(folder) if name.startswith("accelerate_")] == []


def run() -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(4, 4)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(torch.ones(1, 4)).sum())
    optimizer.step()
    return accelerator, model, optimizer


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip(url: str, asynchronous: bool) -> None:
    accelerator, model, _ = run()
    before = model.weight.detach().clone()
    assert accelerator.save_state(f"{url}/step 1", asynchronous=asynchronous) == f"{url}/step 1"
    with torch.no_grad():
        model.weight.zero_()
    report = accelerator.load_state(f"{url}/step 1")
    assert report.url == f"{url}/step 1" and not report.folder.exists() and torch.equal(model.weight, before)
    files, path = fsspec.core.url_to_fs(f"{url}/step 1")
    assert {name.rpartition("/")[2] for name in files.ls(path, detail=False)} >= {"manifest.json", "model.safetensors"}


def test_existing_checkpoints_are_not_overwritten(url: str) -> None:
    accelerator, model, _ = run()
    accelerator.save_state(f"{url}/x")
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    with pytest.raises(SaveError, match="there is a checkpoint already"):
        accelerator.save_state(f"{url}/x")
    accelerator.load_state(f"{url}/x")
    assert torch.equal(model.weight, before)


def test_unfinished_and_damaged_checkpoints_are_rejected(url: str) -> None:
    accelerator, model, _ = run()
    accelerator.save_state(f"{url}/x")
    files, path = fsspec.core.url_to_fs(f"{url}/x")
    files.pipe(f"{path}/optimizer.bin", files.cat(f"{path}/optimizer.bin")[:-9] + b"!" * 9)
    before = model.weight.detach().clone()
    with pytest.raises(LoadError, match=r"x cannot be loaded(.|\n)*optimizer.bin") as caught:
        accelerator.load_state(f"{url}/x")
    assert f"{url}/x cannot be loaded" in str(caught.value)
    files.rm(f"{path}/manifest.json")
    with pytest.raises(LoadError, match="manifest.json: missing"):
        accelerator.load_state(f"{url}/x")
    assert torch.equal(model.weight, before)
    accelerator.save_state(f"{url}/x")  # files of an unfinished upload are overwritten
    accelerator.load_state(f"{url}/x")


def test_failed_uploads_leave_no_manifest(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, _, _ = run()
    files, path = fsspec.core.url_to_fs(f"{url}/x")
    whole = type(files).put_file

    def full(self: Any, here: str, there: str, **options: Any) -> None:
        if there.endswith("random_states_0.pkl"):
            raise OSError("the bucket is full")
        whole(self, here, there, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(files), "put_file", full)
        with pytest.raises(SaveError, match="sending the checkpoint to .*the bucket is full"):
            accelerator.save_state(f"{url}/x")
    assert not files.exists(f"{path}/manifest.json")
    accelerator.save_state(f"{url}/x")


def test_save_model_and_save(url: str) -> None:
    accelerator, model, _ = run()
    accelerator.save_model(model, f"{url}/model", max_shard_size=64)
    accelerator.save({"a": torch.ones(2)}, f"{url}/object.bin")
    files, path = fsspec.core.url_to_fs(url)
    names = {name.rpartition("/")[2] for name in files.ls(f"{path}/model", detail=False)}
    assert "model.safetensors.index.json" in names and len(names) == 3
    with files.open(f"{path}/object.bin") as file:
        assert torch.load(file)["a"].tolist() == [1, 1]


def test_unsupported_protocols() -> None:
    accelerator, _, _ = run()
    before = os.listdir()
    with pytest.raises(SaveError, match="nosuch://a/b cannot be reached: Protocol not known"):
        accelerator.save_state("nosuch://a/b")
    with pytest.raises(LoadError, match="there is no checkpoint at memory://nowhere"):
        accelerator.load_state("memory://nowhere")
    with pytest.raises(CheckpointError, match="cannot be reached"):
        accelerator.save({}, "nosuch://a/b")
    assert os.listdir() == before


def test_without_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, _, _ = run()
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(SaveError, match=r"accelerate\[remote\]"):
        accelerator.save_state("memory://x")


def test_project_dir_must_be_local() -> None:
    accelerator = Accelerator(
        cpu=True,
        project_config=ProjectConfiguration(project_dir="memory://project", automatic_checkpoint_naming=True),
    )
    for call in (accelerator.save_state, accelerator.load_state, accelerator.resume):
        with pytest.raises(ValueError, match="is a URL, and checkpoints are numbered below local folders only"):
            call()
    accelerator.save_state("memory://project/one")
    accelerator.load_state("memory://project/one")


@pytest.mark.parametrize("path", ["C:\\runs", "c://runs", "runs/a:b", "/abs", "~/x", Path("memory://x"), None])
def test_is_url(path: Any) -> None:
    assert not is_url(path)
    assert is_url("s3://bucket") and is_url("simplecache::s3://bucket")
