"""Names and files that nobody should trust, and files of ours that name them: manifests, indexes, descriptions of shards."""

from __future__ import annotations

import json
import os
import pickle
import socket
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = {
    "parent": "../../victim.bin",
    "hidden parent": "a/../../../victim.bin",
    "absolute": "{outside}/victim.bin",
    "dots": "..",
    "empty": "",
    "dot": ".",
    "dot in front": "./victim.bin",
    "two slashes": "a//victim.bin",
    "NUL": "victim\0.bin",
    "backslashes": "..\\..\\victim.bin",
    "drive": "C:victim.bin",
    "newline": "victim\n.bin",
    "long": "x" * 5000,
    "long part": "y" * 300,
    "surrogate": "victim\ud800.bin",
}
"""What may stand where a name is expected; ``{outside}`` is a folder elsewhere."""


def special_files(folder: Path) -> dict[str, Callable[[Path], object]]:
    """Ways to put something at a path that is no regular file, or one without end. None can be read to its end."""

    def unix_socket(path: Path) -> None:
        # A relative address: those of sockets are short.
        before = os.getcwd()
        os.chdir(path.parent)
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        finally:
            os.chdir(before)

    def pipe_behind_a_link(path: Path) -> None:
        os.mkfifo(folder / f"pipe{len(list(folder.iterdir()))}")
        path.symlink_to(max(folder.glob("pipe*"), key=os.path.getctime))

    return {
        "pipe": os.mkfifo,
        "link to a pipe": pipe_behind_a_link,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "socket": unix_socket,
        "folder": os.mkdir,
        "link to itself": lambda path: path.symlink_to(path.name),
    }


def write_manifest(folder: Path, **changes: Any) -> None:
    """Changes a manifest and gives it the checksum of what it says then.

    Args:
        folder: The checkpoint.
        **changes: New values by key; None removes one.
    """
    path = folder / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["checksum"]
    body.update(changes)
    write_body(path, {key: value for key, value in body.items() if value is not None})


def write_body(path: Path, body: Any) -> None:
    """Writes a manifest of any content, with its checksum."""
    plain = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    whole = {**body, "checksum": f"{zlib.crc32(plain):08x}"}
    path.write_bytes(json.dumps(whole, sort_keys=True, indent=1).encode() + b"\n")


def name_in_manifest(folder: Path, name: str, content: bytes) -> None:
    """Has a manifest list one more file, truthfully but for where it is."""
    body = json.loads((folder / "manifest.json").read_bytes())
    record = {"crc32": [f"{zlib.crc32(content):08x}"], "size": len(content)}
    write_manifest(folder, files={**body["files"], name: record})


def name_in_description(folder: Path, name: str) -> None:
    """Has the description of a folder of shards say that its values are in another file."""
    with open(folder / ".metadata", "rb") as file:
        found = pickle.load(file)
    for info in found.storage_data.values():
        info.relative_path = name
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(found, file)


def index_naming(folder: Path, file: str, suffix: str = "safetensors") -> Path:
    """An index of weights that names one file."""
    path = folder / f"model.{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"weight": file, "bias": file}}))
    return path
