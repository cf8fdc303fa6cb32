"""Paths from untrusted files, validated before anything is opened, written or removed.

A manifest, an index, the metadata of a sharded checkpoint and the listing of a remote folder name other files, and may be
damaged or hostile. `path_inside` is the only function that joins such a name to its folder; `file_size` and `read_bytes`
read, `path_for_write` and `replace_file` change. Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import stat
import threading
from pathlib import Path, PureWindowsPath
from typing import Any

MAX_METADATA_BYTES = 256 * 2**20
"""Largest size of a manifest, an index or other metadata: some hundred times that of the largest models."""

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LONGEST_PART, _LONGEST = 255, 4096  # NAME_MAX and PATH_MAX, in bytes


class FileNameError(ValueError):
    """A name is not that of a file inside its folder, or the file is not a regular one. Nothing was read or changed."""


def path_inside(folder: Path, name: object) -> Path:
    """Joins an untrusted name to its folder.

    Checks the name only: the file may be a link to a file elsewhere, as in the cache of the Hugging Face Hub.

    Args:
        folder: The folder.
        name: The name: parts separated by slashes, none of them empty, ``.`` or ``..``.

    Returns:
        The path in `folder`.

    Raises:
        FileNameError: for any other name.
    """
    if isinstance(name, str) and _PLAIN.fullmatch(name):
        return folder / name
    if not isinstance(name, str):
        raise FileNameError(f"{short_repr(name)} is not a file name: expected a string, found {type(name).__name__}")
    if reason := _invalid_reason(name):
        raise FileNameError(
            f"{short_repr(name)} is not the name of a file in the folder: {reason}. Expected a relative path, such as "
            "'a/b.bin'; the source may be malicious"
        )
    return folder / name


def _invalid_reason(name: str) -> str:
    parts = name.split("/")
    if not name:
        return "it is empty"
    if _CONTROL.search(name):
        return "it has control characters"
    if name.startswith("/") or PureWindowsPath(name).drive:
        return "it is an absolute path"
    if "\\" in name:
        return "it has a backslash, which separates folders on some systems"
    if not {"", ".", ".."}.isdisjoint(parts):
        return "a part of it is empty, '.' or '..'"
    try:
        lengths = [len(os.fsencode(part)) for part in parts]
    except UnicodeEncodeError:
        return "it has characters that are invalid in file names"
    return "it is too long" if max(lengths) > _LONGEST_PART or sum(lengths) + len(parts) > _LONGEST else ""


def short_repr(name: object) -> str:
    """Returns the repr of an untrusted value for a message, shortened to one line."""
    text = repr(name)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def path_for_write(folder: Path, name: object) -> Path:
    """Joins an untrusted name to its folder like `path_inside`, for a file to be replaced or removed.

    No folder of the path may be a link. The file may be one: the link is replaced, and its target is not.

    Raises:
        FileNameError: if the name, or a link, leads out of the folder.
    """
    path = path_inside(folder, name)
    for parent in path.parents:
        if parent == folder:
            break
        if parent.is_symlink():
            raise FileNameError(f"{short_repr(name)} lies behind {parent}, a link that leads out of {folder}")
    return path


def file_size(path: Path) -> int | None:
    """Returns the size of a regular file, or of a link's target, in bytes; None if it does not exist.

    Raises:
        FileNameError: for a folder, a pipe, a socket or a device, which are not opened.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a loop of links, an invalid name
        raise FileNameError(f"{path} cannot be accessed: {error}") from error
    return regular_file_size(status, path)


def regular_file_size(status: os.stat_result, path: Path) -> int:
    """Returns the size in bytes of a file with this status; raises as `file_size` does."""
    if not stat.S_ISREG(status.st_mode):
        raise FileNameError(f"{path} is not a regular file, but {_kind(status.st_mode)}")
    return status.st_size


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def require_regular_file(path: Path) -> int:
    """Returns the size of a regular file in bytes.

    Raises:
        FileNotFoundError: if it does not exist.
        FileNameError: if it is not a regular file.
    """
    size = file_size(path)
    if size is None:
        raise FileNotFoundError(f"{path} does not exist")
    return size


def read_bytes(path: Path, most: int = MAX_METADATA_BYTES) -> bytes:
    """Reads a regular file of limited size.

    Args:
        path: The file.
        most: The limit in bytes.

    Raises:
        FileNotFoundError: if it does not exist.
        FileNameError: if it is not a regular file, or larger.
    """
    size = require_regular_file(path)
    if size > most:
        raise FileNameError(f"{path} has {size} bytes; the limit for such a file is {most}")
    with open(path, "rb") as file:
        return file.read(most + 1)[:most]


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is not a regular file, too large, or not JSON.
    """
    return parse_json(read_bytes(path))


def parse_json(content: bytes) -> Any:
    """Parses JSON text, in UTF-8.

    Raises:
        ValueError: if it is not JSON.
    """
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def replace_file(path: Path, content: Any) -> None:
    """Replaces a file atomically by rename; a link or a pipe at its path is replaced, not written to.

    Args:
        path: The file.
        content: A bytes-like object.
    """
    unfinished = path.with_name(f".{os.getpid()}.{threading.get_ident()}.unfinished")
    unfinished.unlink(missing_ok=True)
    try:
        with open(unfinished, "xb") as file:
            file.write(content)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        if error.filename == str(unfinished) or error.filename is None:  # name the caller's file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
