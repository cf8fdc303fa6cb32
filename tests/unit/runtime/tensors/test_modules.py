"""Which modules a model has."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

from torch import nn

from accelerate.runtime.tensors.modules import get_module_children_bottom_up, get_module_class_from_name, is_peft_model


def test_children_come_before_their_parents():
    shared = nn.Linear(1, 1)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared, nn.Sequential(nn.Sequential(nn.Tanh())))
    order = get_module_children_bottom_up(model)
    assert order[-1] is model
    assert len(order) == len(set(map(id, order))) == len(list(model.modules()))
    place = {id(module): index for index, module in enumerate(order)}
    for module in order:
        assert all(place[id(child)] < place[id(module)] for child in module.children())


def test_names_come_along():
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU()))
    named = get_module_children_bottom_up(model, return_fqns=True)
    assert [name for name, _ in named] == ["1.0", "1", "0", ""]
    assert all(model.get_submodule(name) is module for name, module in named)


def test_a_class_by_name():
    model = nn.Sequential(nn.Linear(1, 1))
    assert get_module_class_from_name(model, "Linear") is nn.Linear
    assert get_module_class_from_name(model, "Sequential") is nn.Sequential
    assert get_module_class_from_name(model, "Conv2d") is None


def test_peft_is_not_imported_to_ask():
    code = (
        "import sys; from torch import nn; from accelerate.runtime.tensors.modules import is_peft_model\n"
        "print(is_peft_model(nn.Linear(1, 1)), 'peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"


def test_a_peft_model_in_its_wrapping(monkeypatch):
    class PeftModel(
        nn.Module
    ):  # peft itself cannot be imported before accelerate has all that transformers wants of it
        def __init__(self, base):
            super().__init__()
            self.base = base

    monkeypatch.setitem(sys.modules, "peft", SimpleNamespace(PeftModel=PeftModel))
    base = nn.Sequential(nn.Linear(2, 2))
    assert not is_peft_model(base)
    assert is_peft_model(PeftModel(base)) and is_peft_model(nn.DataParallel(PeftModel(base)))
