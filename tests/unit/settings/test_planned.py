"""Names of features that this version does not have: they import, and say so when they are used."""

from __future__ import annotations

import importlib
import inspect

import pytest

from accelerate.settings import planned

NAMES = [
    name for name, value in vars(planned).items() if inspect.isclass(value) and value.__mro__[1] is planned.Placeholder
]


@pytest.mark.parametrize("name", NAMES)
def test_a_placeholder_is_a_class_that_refuses_to_be_called(name: str) -> None:
    placeholder = getattr(planned, name)
    assert not isinstance(object(), placeholder)
    with pytest.raises(NotImplementedError, match=f"{name} belongs to .*not part of this version: "):
        placeholder("any", argument=1)


def test_placeholders_are_found_where_libraries_import_them_from() -> None:
    for path in (
        "accelerate.utils.DeepSpeedSchedulerWrapper",
        "accelerate.utils.deepspeed.DeepSpeedEngineWrapper",
        "accelerate.utils.megatron_lm.GPTTrainStep",
        "accelerate.utils.ao.has_ao_layers",
        "accelerate.utils.transformer_engine.convert_model",
        "accelerate.tracking.WandBTracker",
    ):
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name) is getattr(planned, name)
