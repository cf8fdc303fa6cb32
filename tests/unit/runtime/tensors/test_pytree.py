"""Trees of tensors: the observed behaviors, properties over nested structures, and the odd containers of real code."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerate.runtime.tensors import pytree
from accelerate.runtime.tensors.pytree import (
    ConvertOutputsToFp32,
    TensorInformation,
    concatenate,
    convert_outputs_to_fp32,
    convert_to_fp32,
    find_batch_size,
    find_device,
    get_data_structure,
    get_shape,
    honor_type,
    ignorant_find_batch_size,
    initialize_tensors,
    is_namedtuple,
    is_tensor_information,
    is_torch_tensor,
    is_torch_xpu_tensor,
    listify,
    recursively_apply,
    send_to_device,
    slice_tensors,
)
from tests.helpers.behaviors import encode, outputs

Point = namedtuple("Point", ["x", "y"])

# Observed behaviors ------------------------------------------------------------------------------------------------


def test_observed_behaviors() -> None:
    t = torch.ones(2)

    def devices(tree: dict[str, torch.Tensor]) -> dict[str, str]:
        return {key: str(value.device) for key, value in tree.items()}

    skipped = [
        devices(send_to_device({"a": t, "b": t}, "meta", skip_keys="a")),
        devices(send_to_device({"a": t, "b": t}, "meta", skip_keys=["b"])),
    ]
    assert [skipped] == outputs("send_to_device.skip_keys")
    assert [type(send_to_device(UserDict(a=t), "cpu")).__name__] == outputs("send_to_device.mapping")
    assert [encode(listify({"a": torch.tensor([1, 2]), "b": (torch.tensor(1.0),)}))] == outputs("listify")
    assert [[ignorant_find_batch_size("x"), ignorant_find_batch_size({})]] == outputs("ignorant_find_batch_size")
    sliced = slice_tensors({"a": torch.arange(6), "b": (torch.arange(6),)}, slice(1, 3))
    assert [encode(sliced)] == outputs("slice_tensors")
    one = torch.ones(1)
    joined = (
        concatenate([{"a": torch.ones(1, 2)}, {"a": torch.zeros(2, 2)}]),
        concatenate([(one,), (one,)]),
    )
    assert [encode(joined)] == outputs("concatenate")
    described = get_data_structure({"a": torch.ones(2, 3, dtype=torch.int64)})
    allocated = initialize_tensors(described)["a"]
    observed = [encode(described), {"a": [list(allocated.shape), str(allocated.dtype)]}]
    assert [observed] == outputs("data_structure")
    assert [[str(find_device([1, {"a": t}])), find_device([1])]] == outputs("find_device")


def test_find_batch_size_refuses_what_holds_no_tensor() -> None:
    with pytest.raises(TypeError, match="no batch size in a str") as raised:
        find_batch_size("x")
    assert [encode(raised.value)["raises"]] == [case["raises"] for case in outputs("find_batch_size.type")]
    with pytest.raises(ValueError, match="an empty dict"):
        find_batch_size({})
    with pytest.raises(TypeError, match="at least one dimension"):
        find_batch_size([torch.tensor(1)])


def half(x: torch.Tensor) -> torch.Tensor:
    """Doc."""
    return x.bfloat16()


def test_convert_outputs_to_fp32_observed() -> None:
    converted = convert_outputs_to_fp32(half)
    observed = {
        "type": type(converted).__name__,
        "has __wrapped__": converted.__wrapped__ is half,  # type: ignore[attr-defined]
        "dtype": str(converted(torch.ones(1)).dtype),
    }
    assert [observed] == outputs("convert_outputs_to_fp32")


# Properties ---------------------------------------------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn, rows: int = 3) -> torch.Tensor:
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]))
    width = draw(st.integers(0, 3))
    values = draw(st.lists(st.integers(-3, 3), min_size=rows * width, max_size=rows * width))
    return torch.tensor(values, dtype=torch.float32).reshape(rows, width).to(dtype)


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.builds(Point, children, children),
        st.dictionaries(st.text(max_size=2), children, max_size=3),
        st.dictionaries(st.text(max_size=2), children, max_size=3).map(OrderedDict),
        st.dictionaries(st.text(max_size=2), children, max_size=3).map(UserDict),
    )


def trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(leaves, containers, max_leaves=6)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (dict, UserDict)):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def leaves(tree: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    recursively_apply(found.append, tree)
    return found


@given(trees(st.one_of(tensors(), st.none(), st.integers(), st.text(max_size=2))))
def test_identity_rebuilds_the_same_tree(tree: Any) -> None:
    assert same(recursively_apply(lambda t: t, tree), tree)
    moved = send_to_device(tree, "cpu")
    assert same(moved, tree)
    assert same(send_to_device(tree, "cpu", skip_keys="a"), tree)
    if isinstance(tree, (list, dict)):
        assert moved is not tree


@given(trees(tensors(rows=4)), st.integers(0, 4))
def test_slices_join_to_the_whole(tree: Any, cut: int) -> None:
    parts = [slice_tensors(tree, slice(None, cut)), slice_tensors(tree, slice(cut, None))]
    assert same(concatenate(parts), tree)


@given(trees(st.one_of(tensors(), st.text(max_size=2))))
def test_a_description_is_enough_to_allocate(tree: Any) -> None:
    described = get_data_structure(tree)
    assert not leaves(described)
    allocated = initialize_tensors(described)
    assert get_shape(allocated) == get_shape(tree)
    assert [t.dtype for t in leaves(allocated)] == [t.dtype for t in leaves(tree)]


@given(trees(st.one_of(tensors(), st.text(max_size=2))))
def test_fp32_touches_halves_only(tree: Any) -> None:
    before, after = leaves(tree), leaves(convert_to_fp32(tree))
    for old, new in zip(before, after, strict=True):
        if old.dtype in (torch.float16, torch.bfloat16):
            assert new.dtype is torch.float32
            assert torch.equal(new, old.float())
        else:
            assert new is old


@given(trees(st.one_of(tensors(rows=3), st.text(max_size=2))))
def test_batch_size_is_that_of_the_first_tensor(tree: Any) -> None:
    expected = 3 if leaves(tree) else None
    assert ignorant_find_batch_size(tree) == expected
    assert (find_device(tree) is None) == (expected is None)


# Containers of real code --------------------------------------------------------------------------------------------


def test_honor_type() -> None:
    assert honor_type([1], iter([2])) == [2]
    assert honor_type(Point(1, 2), iter([3, 4])) == Point(3, 4)
    assert type(honor_type(torch.Size([1]), iter([2]))) is torch.Size
    assert is_namedtuple(Point(1, 2))
    assert not is_namedtuple((1, 2))
    assert not is_namedtuple([1])


def test_mappings_keep_their_class() -> None:
    counted: defaultdict[str, Any] = defaultdict(list, a=torch.ones(1))
    moved = send_to_device(counted, "meta")
    assert isinstance(moved, defaultdict)
    assert moved["new"] == []
    assert moved["a"].device.type == "meta"
    frozen = MappingProxyType({"a": torch.ones(1)})
    assert isinstance(recursively_apply(lambda t: t + 1, frozen), MappingProxyType)

    class NeedsTwo(dict[str, Any]):
        def __init__(self, first: Any, second: Any) -> None:
            super().__init__(first=first, second=second)

    with pytest.raises(TypeError, match="a NeedsTwo cannot be rebuilt.*constructor must accept a mapping"):
        recursively_apply(lambda t: t, NeedsTwo(1, 2))


def test_results_of_torch_operations_and_packed_sequences() -> None:
    best = torch.max(torch.tensor([[1.0, 2.0]]), 1)
    assert type(recursively_apply(lambda t: t + 1, best)) is type(best)
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    moved = send_to_device(packed, "meta")
    assert type(moved) is type(packed)
    assert moved.data.device.type == "meta"


class Plain:
    """Moves, and knows nothing of non_blocking."""

    device = "nowhere"

    def to(self, device: torch.device) -> Plain:
        moved = copy.copy(self)
        moved.device = str(device)
        return moved


class Careful(Plain):
    non_blocking: bool | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> Careful:
        moved = copy.copy(self)
        moved.device, moved.non_blocking = str(device), non_blocking
        return moved


class Anything(Plain):
    def to(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


class Broken:
    def to(self, device: torch.device, non_blocking: bool = False) -> None:
        raise TypeError("my own mistake")


class Encoding(UserDict[str, Any]):
    """As transformers' BatchEncoding: a UserDict that moves itself and answers attributes from its keys."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: Any, *, non_blocking: bool = False) -> Encoding:
        self.data = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.data.items()}
        return self


def test_objects_move_themselves() -> None:
    moved = send_to_device([Plain(), Careful(), Anything()], "meta", non_blocking=True)
    assert [moved[0].device, moved[1].device, moved[1].non_blocking] == ["meta", "meta", True]
    assert moved[2] == ((torch.device("meta"),), {"non_blocking": True})
    with pytest.raises(TypeError, match="my own mistake"):
        send_to_device(Broken(), "cpu", non_blocking=True)
    assert send_to_device(Plain, "cpu") is Plain  # a class is not an object of that class
    module = torch.nn.Linear(1, 1)
    assert send_to_device({"m": module}, "meta")["m"] is module
    assert module.weight.device.type == "meta"


def test_a_mapping_that_moves_itself_still_skips_keys() -> None:
    whole = send_to_device(Encoding(ids=torch.ones(1), past=torch.ones(1)), "meta")
    assert {str(v.device) for v in whole.values()} == {"meta"}
    part = send_to_device(Encoding(ids=torch.ones(1), past=torch.ones(1)), "meta", skip_keys="past")
    assert isinstance(part, Encoding)
    assert [str(part["ids"].device), str(part["past"].device)] == ["meta", "cpu"]
    deep = send_to_device([{"x": {"past": torch.ones(1)}}], "meta", skip_keys=("past",))
    assert deep[0]["x"]["past"].device.type == "cpu"


def test_what_is_there_already_is_not_copied() -> None:
    tensor, parameter = torch.ones(1), torch.nn.Parameter(torch.ones(1))
    moved = send_to_device({"t": tensor, "p": parameter, "s": "text", "n": None}, torch.device("cpu"))
    assert moved["t"] is tensor
    assert moved["p"] is parameter
    assert (moved["s"], moved["n"]) == ("text", None)
    with pytest.raises(RuntimeError, match="(?i)device"):
        send_to_device(tensor, "no such device")


# Functions ----------------------------------------------------------------------------------------------------------


def test_a_foreign_leaf_is_named_with_its_place() -> None:
    tree = {"a": [torch.ones(1), {"b": "text"}]}
    with pytest.raises(TypeError, match=r"double was given a str \('text'\) at \['a'\]\[1\]\['b'\]; it takes a tensor"):

        def double(t: torch.Tensor) -> torch.Tensor:
            return t * 2

        recursively_apply(double, tree, error_on_other_type=True)
    with pytest.raises(TypeError, match="gather was given a NoneType"):
        pytree.map_tensors("gather", lambda t: t, None)


def test_arguments_and_tests_of_ones_own() -> None:
    def scaled(t: float, factor: float, *, plus: float = 0) -> float:
        return t * factor + plus

    tree = {"a": [1.0, "text"], "b": (2.0,)}
    applied = recursively_apply(scaled, tree, 10, plus=1, test_type=lambda leaf: isinstance(leaf, float))
    assert applied == {"a": [11.0, "text"], "b": (21.0,)}
    with pytest.raises(TypeError, match="leaves that pass `is_tensor_information`"):
        recursively_apply(scaled, 1, test_type=is_tensor_information, error_on_other_type=True)


def test_questions() -> None:
    assert is_torch_tensor(torch.nn.Parameter(torch.ones(1)))
    assert not is_torch_tensor([1])
    assert not is_torch_xpu_tensor(torch.ones(1))
    assert is_tensor_information(TensorInformation(torch.Size([1]), torch.float32))
    assert find_batch_size(["text", {"scalar": torch.tensor(1), "ids": torch.ones(5, 2)}]) == 5


def test_listify_takes_every_dtype() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    tree = (torch.ones(1, 1).bfloat16(), {"a": torch.tensor(True), "p": parameter, "s": "text"})
    assert listify(tree) == ([[1.0]], {"a": True, "p": [1.0], "s": "text"})


def test_concatenate_refuses_what_does_not_match() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="given none"):
        concatenate([])
    with pytest.raises(ValueError, match=r"lengths \[1, 2\]"):
        concatenate([[one], [one, one]])
    with pytest.raises(ValueError, match=r"keys are \['a'\] and \['b'\]"):
        concatenate([{"a": one}, {"b": one}])
    with pytest.raises(TypeError, match="a str \\('x'\\)"):
        concatenate(["x", "y"])
    assert concatenate([torch.ones(2, 1), torch.ones(2, 2)], dim=1).shape == (2, 3)


def test_the_converting_function_can_be_pickled_and_copied() -> None:
    converted = ConvertOutputsToFp32(half)
    assert (converted.__name__, converted.__doc__, converted.model_forward) == ("half", "Doc.", half)  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(converted))(torch.ones(1)).dtype is torch.float32
    out = convert_outputs_to_fp32(lambda: {"a": [torch.ones(1).half(), torch.tensor([1])]})()
    assert [t.dtype for t in out["a"]] == [torch.float32, torch.int64]
