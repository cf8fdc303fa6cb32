"""`HfDeepSpeedConfig`: DeepSpeed's configuration (nested mappings), read and changed by dotted keys."""

from __future__ import annotations

import base64
import binascii
import copy
import json
import os
from typing import Any

# Devices to which parameters or optimizer states can be offloaded.
_OFFLOAD_DEVICES = frozenset({"cpu", "nvme"})


class HfDeepSpeedConfig:
    """DeepSpeed's configuration.

    Attributes:
        config: The nested mapping, a copy of the given one.

    Args:
        config_file_or_dict: A mapping, the path of a JSON file, or JSON text in base64.

    Raises:
        ValueError: if it is none of these, or not valid JSON.
    """

    config: dict[str, Any]

    def __init__(self, config_file_or_dict: dict[str, Any] | str | os.PathLike[str]) -> None:
        if isinstance(config_file_or_dict, dict):
            self.config = copy.deepcopy(config_file_or_dict)
        else:
            self.config = _read(config_file_or_dict)
        self.set_stage_and_offload()

    def set_stage_and_offload(self) -> None:
        """Updates the ZeRO stage and whether anything is offloaded, from the configuration."""
        stage = self.get_value("zero_optimization.stage", -1)
        self._stage = stage if isinstance(stage, int) else -1  # "auto" is not resolved yet
        devices = {self.get_value(f"zero_optimization.offload_{what}.device") for what in ("optimizer", "param")}
        self._offload = self._stage in (2, 3) and bool(devices & _OFFLOAD_DEVICES)

    def find_config_node(self, ds_key_long: str) -> tuple[dict[str, Any] | None, str]:
        """Returns the mapping that holds a key, and the key's last part.

        Args:
            ds_key_long: The dotted key, ``"zero_optimization.stage"``.

        Returns:
            The mapping, or None if a parent is missing, and the last part.
        """
        *parents, last = ds_key_long.split(".")
        node: Any = self.config
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        return (node if isinstance(node, dict) else None), last

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """Returns the value of a dotted key, or `default` if it is missing."""
        node, last = self.find_config_node(ds_key_long)
        return default if node is None else node.get(last, default)

    def set_value(self, ds_key_long: str, value: Any) -> None:
        """Sets the value of a dotted key, creating its parents."""
        *parents, last = ds_key_long.split(".")
        node = self.config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value

    def del_config_sub_tree(self, ds_key_long: str, must_exist: bool = False) -> None:
        """Removes a key and everything below it.

        Raises:
            ValueError: if it is missing and `must_exist` is True.
        """
        node, last = self.find_config_node(ds_key_long)
        if node is not None and last in node:
            del node[last]
        elif must_exist:
            raise ValueError(f"the DeepSpeed configuration has no {ds_key_long!r} to remove: {self.config}.")

    def is_true(self, ds_key_long: str) -> bool:
        """Returns whether a key is present and true."""
        return bool(self.get_value(ds_key_long))

    def is_false(self, ds_key_long: str) -> bool:
        """Returns whether a key is present and false."""
        value = self.get_value(ds_key_long)
        return value is not None and not value

    def is_zero2(self) -> bool:
        """Returns whether gradients and optimizer states are partitioned (ZeRO stage 2)."""
        return self._stage == 2

    def is_zero3(self) -> bool:
        """Returns whether parameters are partitioned as well (ZeRO stage 3)."""
        return self._stage == 3

    def is_offload(self) -> bool:
        """Returns whether parameters or optimizer states are offloaded to the CPU or NVMe."""
        return self._offload


def _read(source: Any) -> dict[str, Any]:
    expected = "expected a mapping, the path of a json file, or its text in base64"
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"the DeepSpeed configuration is {source!r}: {expected}.")
    where = f"DeepSpeed configuration file {os.fspath(source)}"
    if os.path.exists(source):
        try:
            with open(source, encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} cannot be read: {error}") from None
    else:
        try:
            text = base64.urlsafe_b64decode(os.fspath(source)).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError):
            raise ValueError(f"{where} does not exist; {expected}.") from None
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not valid json: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected keys and values at the top, found {type(content).__name__}.")
    return content
