"""Collectives on one process: identities, arguments that are wrong on any number of processes, padded batches."""

from __future__ import annotations

import pytest
import torch

from accelerate.runtime import collectives
from accelerate.runtime.collectives import (
    DistributedOperationException,
    GatheredParameters,
    broadcast,
    broadcast_object_list,
    chained_operation,
    copy_tensor_to_devices,
    gather,
    gather_object,
    gather_tensor_shape,
    pad_across_processes,
    pad_input_tensors,
    reduce,
)
from accelerate.runtime.tensors import pytree
from tests.helpers.behaviors import encode, outputs


def test_one_process_gets_back_what_it_gave() -> None:
    tree = {"a": torch.ones(2), "b": [torch.tensor(1)]}
    objects = ["x"]
    assert gather(tree) is tree
    assert broadcast(tree, from_process=0) is tree
    assert pad_across_processes(tree, dim=0) is tree
    assert gather_object(objects) is objects
    assert broadcast_object_list(objects) is objects
    assert reduce(tree, "none") is tree


def test_reduce_on_one_process() -> None:
    tensor = torch.tensor([1.0, 2.0])
    total = reduce({"a": tensor}, "sum", scale=0.5)["a"]
    assert total.tolist() == [0.5, 1.0]
    assert reduce(tensor, "max").tolist() == reduce(tensor, "min").tolist() == [1.0, 2.0]
    copied = reduce(tensor)
    assert copied is not tensor
    assert torch.equal(copied, tensor)
    with pytest.raises(ValueError, match="reduction='product': expected 'sum', 'mean', 'max', 'min' or 'none'"):
        reduce(tensor, "product")


def test_copy_tensor_to_devices_on_one_process() -> None:
    tensor = torch.ones(2, 3)
    assert torch.equal(copy_tensor_to_devices(tensor), tensor)
    shape, code = gather_tensor_shape(tensor)
    assert (shape.tolist(), collectives.TENSOR_INT_TO_DTYPE[code]) == ([2, 3], torch.float32)
    with pytest.raises(ValueError, match="processes none passed one"):
        copy_tensor_to_devices(None)


def test_pad_input_tensors() -> None:
    """Two observed results are decided differences: what is padded must divide, and what divides needs no padding.

    Observed were 10 rows for a batch of 8 over 2 processes, and 7 for 5 over 3.
    """
    observed = outputs("pad_input_tensors")
    ours = [pad_input_tensors(torch.arange(5).view(5, 1), 5, 2), pad_input_tensors(torch.arange(8), 8, 2)]
    assert encode(ours[0]) == observed[0][0]
    assert ours[1].tolist() == list(range(8))
    assert observed[0][1]["tensor"] == [*range(8), 0, 0]
    assert encode(pad_input_tensors(torch.arange(5), 5, 2)) == outputs("pad_input_tensors", P=2)[0]["all_ranks"]
    assert pad_input_tensors(torch.arange(5), 5, 3).tolist() == [0, 1, 2, 3, 4, 0]
    assert outputs("pad_input_tensors", P=3)[0]["all_ranks"]["tensor"] == [0, 1, 2, 3, 4, 0, 0]


def test_pad_input_tensors_leaves_other_tensors_alone() -> None:
    tree = {"ids": torch.ones(2, 3), "scale": torch.tensor(1.0), "table": torch.ones(7)}
    padded = pad_input_tensors(tree, batch_size=3, num_processes=4, dim=1)
    assert padded["ids"].tolist() == [[1, 1, 1, 0]] * 2
    assert padded["scale"] is tree["scale"]
    assert padded["table"] is tree["table"]
    with pytest.raises(ValueError, match="num_processes=0"):
        pad_input_tensors(tree, 3, 0)
    with pytest.raises(TypeError, match="pad_input_tensors was given a str"):
        pad_input_tensors("x", 3, 2)


def test_errors_from_inside_name_the_operation() -> None:
    @chained_operation
    def outer() -> None:
        raise DistributedOperationException("shapes differ")

    with pytest.raises(DistributedOperationException, match="operations.outer`: shapes differ") as raised:
        outer()
    assert isinstance(raised.value.__cause__, DistributedOperationException)


def test_gathered_parameters_leaves_whole_parameters_alone() -> None:
    module = torch.nn.Linear(1, 1)
    for params in (module.parameters(), module.weight, []):
        with GatheredParameters(params, modifier_rank=0, fwd_module=module) as given:
            assert given is None


def test_documented_numbers_of_dtypes() -> None:
    assert collectives.TENSOR_TYPE_TO_INT[torch.bfloat16] == 4
    assert collectives.TENSOR_INT_TO_DTYPE[10] is torch.bool
    assert len(collectives.TENSOR_INT_TO_DTYPE) == len(collectives.TENSOR_TYPE_TO_INT)
    assert pytree.is_torch_tensor(torch.ones(1))
