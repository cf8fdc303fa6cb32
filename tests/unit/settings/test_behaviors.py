"""Observed results of the documented interface (tests/data/settings_behaviors.json), run against ours.

`RUN` says how each case is called here; `DECIDED` lists where ours answers differently on purpose, and why.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import enum
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerate import Accelerator, utils
from accelerate.runtime.system import availability
from accelerate.tracking import GeneralTracker, filter_trackers

CASES = json.loads((Path(__file__).parents[2] / "data" / "settings_behaviors.json").read_text())

DECIDED = {
    "filter_trackers('tensorboard')": "a tracker asked for by name that cannot be used is an error: silence would lose a "
    "run's measurements",
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)


class Blk(Block):
    pass


def net() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([Blk(), Blk()])
    return model


class Recorder(GeneralTracker):
    name = "recorder"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.logs: list[Any] = []

    @property
    def tracker(self) -> list[Any]:
        return self.logs

    def store_init_configuration(self, values):
        self.logs.append(["cfg", values])

    def log(self, values, step=None, **kwargs):
        self.logs.append([values, step, kwargs])

    def finish(self):
        self.logs.append("finish")


def custom_tracker() -> dict[str, Any]:
    tracker = Recorder()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("project", config={"lr": 1})
    accelerator.log({"x": 1}, step=3)
    accelerator.log({"x": 2}, log_kwargs={"recorder": {"z": 1}})
    found = accelerator.get_tracker("recorder")
    unwrapped = accelerator.get_tracker("recorder", unwrap=True)
    accelerator.end_training()
    return {"logs": tracker.logs, "get_tracker is t": found is tracker, "unwrap type": type(unwrapped).__name__}


def patched_environment() -> dict[str, Any]:
    os.environ["ZZ_A"] = "old"
    with utils.patch_environment(zz_a="new", ZZ_B=2):
        inside = [os.environ["ZZ_A"], os.environ["ZZ_B"]]
    after = [os.environ["ZZ_A"], os.environ.get("ZZ_B")]
    with utils.clear_environment():
        os.environ["ZZ_C"] = "1"
        length = len(os.environ) - 1
    return {"inside": inside, "after": after, "len_in_clear": length, "leaked": os.environ.get("ZZ_C")}


def dynamo_plugin() -> tuple[Any, ...]:
    plain = utils.TorchDynamoPlugin()
    with utils.patch_environment(
        ACCELERATE_DYNAMO_BACKEND="inductor",
        ACCELERATE_DYNAMO_MODE="max-autotune",
        ACCELERATE_DYNAMO_USE_FULLGRAPH="true",
        ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION="true",
    ):
        launched = utils.TorchDynamoPlugin()
    return dataclasses.asdict(plain), dataclasses.asdict(launched), launched.to_kwargs()


def directories() -> list[list[Any]]:
    late = utils.ProjectConfiguration()
    late.set_directories("z")
    made = [utils.ProjectConfiguration("p"), utils.ProjectConfiguration("p", "l"), late]
    return [[made_.project_dir, made_.logging_dir] for made_ in made]


def unwrapped_models() -> tuple[str, ...]:
    compiled = torch.compile(nn.Linear(1, 1), backend="eager")
    unwrap = utils.extract_model_from_parallel
    models = [unwrap(nn.DataParallel(nn.Linear(1, 1))), unwrap(compiled, keep_torch_compile=False), unwrap(compiled)]
    return tuple(type(model).__name__ for model in models)


RUN = {
    "patch_environment": patched_environment,
    "compare_versions": lambda: (
        utils.compare_versions("packaging", ">=", "1.0"),
        utils.is_torch_version(">=", "2.0"),
        utils.is_torch_version("<", "2.0"),
    ),
    "compare_versions.op": lambda: utils.compare_versions("packaging", "=>", "1.0"),
    "log.no_tracker": lambda: type(Accelerator(cpu=True).get_tracker("tensorboard")),
    "get_tracker.blank": lambda: (
        type(Accelerator().get_tracker("tensorboard")).__name__,
        Accelerator().get_tracker("tensorboard").tracker,
    ),
    "custom_tracker": custom_tracker,
    "filter_trackers": lambda: (filter_trackers(None), filter_trackers("all")),
    "filter_trackers.needs_dir": lambda: filter_trackers("tensorboard"),
    "GradientAccumulationPlugin": lambda: (
        dataclasses.asdict(utils.GradientAccumulationPlugin()),
        utils.GradientAccumulationPlugin(num_steps=2).to_kwargs(),
    ),
    "TorchDynamoPlugin": dynamo_plugin,
    "KwargsHandler.to_kwargs": lambda: (
        utils.DistributedDataParallelKwargs(bucket_cap_mb=1).to_kwargs(),
        utils.GradScalerKwargs().to_kwargs(),
        utils.InitProcessGroupKwargs().to_kwargs(),
        utils.AutocastKwargs(enabled=False).to_kwargs(),
    ),
    "ProjectConfiguration.dirs": directories,
    "get_module_class_from_name": lambda: (
        utils.dataclasses.get_module_class_from_name(net(), "Blk").__name__,
        utils.dataclasses.get_module_class_from_name(net(), "Other"),
    ),
    "extract_model_from_parallel": unwrapped_models,
    "merge_dicts": lambda: utils.merge_dicts({"a": {"x": 1}}, {"a": {"y": 2}, "b": 3}),
    "recursive_getattr": lambda: type(utils.recursive_getattr(net(), "layers.0.a")).__name__,
    "get_pretty_name": lambda: (
        utils.get_pretty_name(nn.Linear),
        utils.get_pretty_name(nn.Linear(1, 1)),
        utils.get_pretty_name(utils.get_pretty_name),
    ),
}
EVALUATED = {"convert_bytes", "str_to_bool", "plugin.DataLoaderConfiguration", "plugin.AORecipeKwargs"}


def plain(value: Any) -> Any:
    """A value as the file spells it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def evaluate(case: dict[str, Any]) -> Any:
    if case["name"] == "str_to_bool":
        word = case["call"].split("'")[1]
        return (utils.str_to_bool(word), utils.str_to_bool(word, to_bool=True))
    if case["name"] in EVALUATED:
        name, argument = re.fullmatch(r"(\w+)\((.*)\)(?: -> fields)?", case["call"]).groups()
        function, value = getattr(utils, name), ast.literal_eval(argument.removeprefix("**"))
        return function(**value) if argument.startswith("**") else function(value)
    return RUN[case["name"]]()


# Those of the probes are run by tests/unit/runtime/system/test_availability.py.
HERE = [case for case in CASES if case["name"] != "is_available_functions_cpu_box"]


@pytest.mark.parametrize("case", HERE, ids=[case["call"] for case in HERE])
def test_case(case):
    expected = case["output"]
    if case["call"] in DECIDED:
        with pytest.raises(ValueError, match="no built-in tracker 'tensorboard' yet"):
            evaluate(case)
        return
    if isinstance(expected, dict) and "raises" in expected:
        with pytest.raises(getattr(builtins, expected["raises"])):
            evaluate(case)
        return
    have = evaluate(case)
    if isinstance(expected, dict) and "no_error" in expected:
        expected = expected["no_error"]
        if case["name"] == "log.no_tracker":
            assert have is GeneralTracker
            return
    if isinstance(expected, dict) and "tuple" in expected:
        expected = expected["tuple"]
    if case["name"] == "plugin.DataLoaderConfiguration":
        assert expected.setdefault("seed_samples", None) is None  # a field of ours, besides the documented ones
    assert plain(have) == expected


def test_every_case_is_run():
    known = {*RUN, *EVALUATED, "str_to_bool", "is_available_functions_cpu_box"}
    assert {case["name"] for case in CASES} == known
    assert set(DECIDED) <= {case["call"] for case in CASES}
    assert all(
        hasattr(availability, name) for case in CASES if case["name"].startswith("is_avail") for name in case["output"]
    )
