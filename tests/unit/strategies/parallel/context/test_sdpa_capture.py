"""Code that holds a function itself is found, by whichever road it comes to it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as by_name

from accelerate.strategies.parallel.context.sdpa_capture import find_captured_function

here = sys.modules[__name__]


def helper(x: Any) -> Any:
    return by_name(x, x, x)


class Through(nn.Module):
    """As it should be."""

    def forward(self, x: Any) -> Any:
        return functional.scaled_dot_product_attention(x, x, x) + torch.nn.functional.scaled_dot_product_attention(
            x, x, x
        )


class ByName(nn.Module):
    def forward(self, x: Any) -> Any:
        return by_name(x, x, x)


class ByHelper(nn.Module):
    def forward(self, x: Any) -> Any:
        return [helper(part) for part in x]


class ByModule(nn.Module):
    def forward(self, x: Any) -> Any:
        return here.helper(x)


class ByDefault(nn.Module):
    def forward(self, x: Any, attend: Any = by_name) -> Any:
        return attend(x, x, x)


class ByAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = by_name


class OfTheClass(nn.Module):
    attend = staticmethod(by_name)


def closed() -> nn.Module:
    attend = by_name

    class Closed(nn.Module):
        def forward(self, x: Any) -> Any:
            return (lambda: attend(x, x, x))()

    return Closed()


@pytest.mark.parametrize("make", [ByName, ByHelper, ByModule, ByDefault, ByAttribute, OfTheClass, closed])
def test_roads_to_the_function(make):
    model = nn.Sequential(Through(), make())
    assert find_captured_function(by_name, model) is not None
    fine = nn.Sequential(Through(), nn.TransformerEncoderLayer(4, 2), nn.MultiheadAttention(4, 2))
    assert find_captured_function(by_name, fine) is None


def test_it_says_where():
    assert find_captured_function(by_name, nn.Sequential(ByHelper())) == f"{__name__}.ByHelper.forward (as 'helper')"
    assert find_captured_function(by_name, nn.Sequential(ByAttribute())) == "0.attend"
