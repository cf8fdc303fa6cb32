"""Observed results of the documented plugins (tests/data/plugin_behaviors.json), run against ours.

`DECIDED` lists where ours answers differently on purpose, and why.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import enum
import json
import re
from pathlib import Path
from typing import Any

import pytest

from accelerate import utils

CASES = json.loads((Path(__file__).parents[2] / "data" / "plugin_behaviors.json").read_text())

_UNKNOWN_NAME = "an unknown name is a ValueError that lists the known ones, in every field"
_ON_CPU = "FSDP is not for accelerators only: the plugin can be made on a CPU"
# The arguments -> the error that ours raises, or None for no error; and why.
DECIDED: dict[str, tuple[type[Exception] | None, str]] = {
    "{'fsdp_version': 3}": (ValueError, "there are versions 1 and 2"),
    "{'sharding_strategy': 'zz'}": (ValueError, _UNKNOWN_NAME),
    "{'backward_prefetch': 'zz'}": (ValueError, _UNKNOWN_NAME),
    "{'state_dict_type': 'zz'}": (ValueError, _UNKNOWN_NAME),
    "{'cpu_ram_efficient_loading': True, 'sync_module_states': False}": (None, _ON_CPU),
    "{'fsdp_version': 1, 'sharding_strategy': 3}": (None, _ON_CPU),
    "{'mixed_precision_policy': {'param_dtype': 'bf16'}}": (
        None,
        "a dtype may be written as a word, as everywhere else",
    ),
}


# Fields of ours, besides the documented ones.
OURS = {("TorchTensorParallelConfig", "plan")}


def plain(value: Any) -> Any:
    """A value as the file spells it."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if dataclasses.is_dataclass(value):
        kind = type(value).__name__
        names = [field.name for field in dataclasses.fields(value) if (kind, field.name) not in OURS]
        return {"dataclass": kind, **{name: plain(getattr(value, name)) for name in names}}
    if isinstance(value, tuple):
        return {"tuple": [list(item) if isinstance(item, tuple) else item for item in value]}
    return value


def made(case: dict[str, Any]) -> tuple[Any, str]:
    """What the case makes, and its arguments as it writes them."""
    found = re.match(r"(\w+)\((.*)\)", case["call"])
    if found is None:  # the fields after the case's own name
        found = re.match(r"(\w+)\((.*)\)", case["name"])
    name, arguments = found.groups()
    text = arguments.removeprefix("**")
    if text == arguments:  # written as in Python
        text = "{" + re.sub(r"(\w+)=", r"'\1': ", arguments) + "}"
    return lambda: getattr(utils, name)(**ast.literal_eval(text)), text


@pytest.mark.parametrize("case", CASES, ids=[case["call"] for case in CASES])
def test_case(case):
    make, arguments = made(case)
    expected = case["output"]
    if arguments in DECIDED:
        error = DECIDED[arguments][0]
        if error is None:
            make()
            return
        with pytest.raises(error, match="expected one of"):
            make()
        return
    if "raises" in expected:
        with pytest.raises(getattr(builtins, expected["raises"])):
            make()
        return
    have = make()
    for name, value in expected.get("no_error", expected).items():
        if name == "repr":
            assert repr(have) == value
        elif name == "get_mesh":
            assert plain(have._get_mesh()) == value
        else:
            assert plain(getattr(have, name)) == value, name


def test_every_decision_is_about_a_case():
    assert DECIDED.keys() <= {made(case)[1] for case in CASES}
