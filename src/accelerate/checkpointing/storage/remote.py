"""Checkpoints at URLs, through fsspec: written and verified in a local folder, uploaded and downloaded as files.

Object stores have no rename. So the manifest is uploaded last, a folder without one is no checkpoint, and an existing
checkpoint is never overwritten.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...runtime.system.file_names import FileNameError, path_inside, short_repr
from ...runtime.world import World
from ..consensus import broadcast_from_rank0, run_on_all_ranks
from ..errors import CheckpointError, LoadError, SaveError
from . import manifest as manifests

INSTALL = (
    'needs fsspec: `pip install "accelerate[remote]"`, and for some stores their own package (s3fs, gcsfs, adlfs …)'
)


class RemoteFolder:
    """A folder at a URL.

    Args:
        url: The URL.

    Raises:
        CheckpointError: if fsspec or the package of the store is not installed, or the protocol does not exist.
    """

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise CheckpointError(f"{url} {INSTALL}.") from None
        try:
            self.files, path = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"{url} cannot be reached: {error}. It {INSTALL}.") from error
        self.url = url
        self.path = str(path).rstrip("/")

    def holds_checkpoint(self) -> bool:
        """Returns True if the folder has a manifest, and so a complete checkpoint."""
        return bool(self.files.exists(f"{self.path}/{manifests.NAME}"))

    def upload(self, folder: Path, last: str = "") -> None:
        """Uploads the files of a folder.

        Args:
            folder: The local folder.
            last: File that is uploaded last, and makes the others count.
        """
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        for name in sorted(names, key=lambda name: name == last):
            there = f"{self.path}/{name}"
            self.files.makedirs(there.rpartition("/")[0], exist_ok=True)
            self.files.put_file(str(folder / name), there)
            size = self.files.info(there)["size"]
            if size != (folder / name).stat().st_size:
                raise OSError(f"{self.url}/{name} has {size} bytes, not the {(folder / name).stat().st_size} written")

    def download(self, folder: Path) -> None:
        """Downloads all files into a new folder; loading finds missing and damaged ones.

        Raises:
            FileNotFoundError: if there are none.
            FileNameError: before any download, if a name leads out of the folder.
            OSError: if they do not fit on the disk.
        """
        found = self.files.find(self.path, detail=True) if self.files.exists(self.path) else {}
        if not found:
            raise FileNotFoundError(f"there is no checkpoint at {self.url}")
        targets = {str(path): path_inside(folder, self._name_of(str(path))) for path in found}
        size = sum(facts.get("size") or 0 for facts in found.values())
        if size > (free := shutil.disk_usage(folder).free):
            raise OSError(
                f"{self.url} has {size} bytes, and {folder} has {free} bytes free: set TMPDIR to a larger disk"
            )
        for path, here in targets.items():
            here.parent.mkdir(parents=True, exist_ok=True)
            self.files.get_file(path, str(here))

    def _name_of(self, path: str) -> str:
        """Returns the name of a file relative to the folder, from its path in a listing."""
        prefix = f"{self.path}/" if self.path else ""
        if not path.startswith(prefix):
            raise FileNameError(f"the listing of {self.url} contains {short_repr(path)}, which is not below it")
        return path.removeprefix(prefix) if prefix else path.removeprefix("/")


class Upload:
    """A checkpoint that is staged locally and then uploaded. Every rank creates one.

    Args:
        world: This process and its peers.
        url: The URL; rank 0's value is used.

    Attributes:
        folder: Local folder to save to.

    Raises:
        SaveError: on every rank, if the URL cannot be used.
    """

    def __init__(self, world: World, url: str) -> None:
        self.url = broadcast_from_rank0(world.collectives, f"preparing {url}", url, SaveError)

        def make() -> str:
            if world.rank != 0:
                return ""
            if RemoteFolder(self.url).holds_checkpoint():
                raise SaveError("there is a checkpoint already, which is not overwritten: choose another name")
            return tempfile.mkdtemp(prefix="accelerate_")

        self._scratch = Path(run_on_all_ranks(world.collectives, f"preparing {self.url}", make, SaveError)[0])
        self.folder = self._scratch / "checkpoint"

    def check_shared_folder(self, group: int) -> None:
        """Raises OSError if machines have separate temporary folders: the manifest would cover one machine's files only."""
        if group != 0:
            raise OSError(
                f"{self.folder}, where files are staged for the upload to {self.url}, is not shared by all machines: "
                "set TMPDIR to a shared folder, or save to a folder"
            )

    def send(self) -> None:
        """Uploads the checkpoint. Called on the rank that committed it."""
        RemoteFolder(self.url).upload(self.folder, last=manifests.NAME)

    def clean_up(self) -> None:
        """Removes the local folder. Called on the rank that created it."""
        shutil.rmtree(self._scratch, ignore_errors=True)


def load_from_url(world: World, url: str, load: Callable[[Path], Any]) -> Any:
    """Loads a checkpoint from a URL; the first rank of each machine downloads it.

    Args:
        world: This process and its peers.
        url: The URL; rank 0's value is used.
        load: Loads a checkpoint from a local folder.

    Returns:
        The result of `load`.

    Raises:
        LoadError: on every rank, if the download fails.
    """
    url = broadcast_from_rank0(world.collectives, f"opening {url}", url, LoadError)
    scratch = tempfile.mkdtemp(prefix="accelerate_") if world.local_rank == 0 else ""

    def get() -> str:
        if scratch:
            RemoteFolder(url).download(Path(scratch))
        return scratch

    try:
        folder = Path(
            run_on_all_ranks(world.collectives, f"fetching {url}", get, LoadError)[world.rank - world.local_rank]
        )
        try:
            loaded = load(folder)
        except LoadError as error:
            raise LoadError(str(error).replace(str(folder), url), error.problems, error.changed) from None
        world.collectives.barrier()  # all ranks have read the files
        return loaded
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


def open_url(url: str) -> Any:
    """Opens a file at a URL for writing, as a context."""
    folder = RemoteFolder(url)
    return folder.files.open(folder.path, "wb")


def upload_folder(url: str, write: Callable[[Path], Any]) -> None:
    """Uploads a folder of files.

    Args:
        url: The URL.
        write: Writes the files into a local folder.
    """
    folder = RemoteFolder(url)
    with tempfile.TemporaryDirectory(prefix="accelerate_") as scratch:
        write(Path(scratch))
        folder.upload(Path(scratch))
