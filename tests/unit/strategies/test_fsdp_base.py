"""Which modules of a model become units of their own."""

from __future__ import annotations

from torch import nn

from accelerate import FullyShardedDataParallelPlugin
from accelerate.strategies.fsdp_base import find_units, without_shared_params


class Layer(nn.Sequential):
    pass


def model() -> nn.Module:
    whole = nn.Module()
    whole.first = nn.Linear(2, 2)
    whole.layers = nn.ModuleList([Layer(nn.Linear(4, 4), nn.Linear(4, 4)), Layer(nn.Linear(4, 4))])
    whole.again = whole.layers[1]
    return whole


def found(built: nn.Module, **fields: object) -> list[str]:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **fields)
    plugin.set_auto_wrap_policy(built)
    names = {module: name for name, module in built.named_modules()}
    return [names[unit] for unit in find_units(built, plugin.auto_wrap_policy)]


def test_layers_each_once():
    named = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["Layer"]}
    assert found(model(), **named) == ["layers.0", "layers.1"]


def test_inner_ones_come_first():
    named = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["Layer", "Linear"]}
    assert found(model(), **named)[-3:] == ["layers.0", "layers.1.0", "layers.1"]


def test_by_size_a_list_of_layers_is_passed_over():
    # A list has no forward for which it could be gathered; what is too small stays with the whole.
    assert found(model(), auto_wrap_policy="size_based_wrap", min_num_params=30) == ["layers.0"]


def test_what_shares_a_parameter_with_others_stays_with_the_whole():
    built = model()
    assert without_shared_params(built, [built.layers[0], built.layers[1]]) == [built.layers[0], built.layers[1]]
    built.first = nn.Linear(4, 4)
    built.first.weight = built.layers[0][1].weight
    assert without_shared_params(built, [built.layers[0][0], built.layers[0], built.layers[1]]) == [
        built.layers[0][0],
        built.layers[1],
    ]
