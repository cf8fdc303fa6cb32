"""Files into fully sharded models: each process takes its part, and a refusal comes on all of them, before any change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn


def plain(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def sharded() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = plain(1)
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    return model


def values(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = model.state_dict()
    return {name: getattr(value, "full_tensor", value.clone)() for name, value in state.items()}


def refused(model: nn.Module, checkpoint: str, **options: Any) -> str:
    import accelerate

    before = values(model)
    try:
        accelerate.load_checkpoint_in_model(model, checkpoint, **options)
    except ValueError as error:
        assert all(torch.equal(value, before[name]) for name, value in values(model).items())
        return str(error)
    return "nothing"


def loaded_in_every_way(folder: str) -> list[Any]:
    import accelerate

    rank, results = torch.distributed.get_rank(), list[Any]()
    for first in (False, True):
        model = sharded()
        accelerate.load_checkpoint_in_model(
            model, f"{folder}/good" if rank == 0 or not first else "/none", broadcast_from_rank0=first, strict=True
        )
        results.append(values(model))
    own = f"{folder}/parts_{rank}"  # each process's own parts, in files of its own
    state: Any = model.state_dict()
    save_file(
        {n: (v.to_local() if hasattr(v, "to_local") else v).clone() for n, v in state.items()}, f"{own}.safetensors"
    )
    model = sharded()
    accelerate.load_checkpoint_in_model(model, f"{own}.safetensors", full_state_dict=False, strict=True)
    results.append(values(model))
    results.append(refused(model, f"{folder}/misshaped"))
    results.append(refused(model, f"{folder}/none", broadcast_from_rank0=True))
    results.append(refused(model, f"{folder}/few", broadcast_from_rank0=True, strict=True))
    results.append(refused(model, f"{folder}/good" if rank == 0 else f"{folder}/none"))  # lost on one machine
    return results


def test_each_process_takes_its_part(run_ranks: Any, tmp_path: Path) -> None:
    state = plain(0).state_dict()
    for name, change in {
        "good": {},
        "misshaped": {"2.weight": torch.zeros(7, 3)},
        "few": {"2.weight": None},
    }.items():
        (tmp_path / name).mkdir()
        kept = {key: value for key, value in {**state, **change}.items() if value is not None}
        save_file(kept, tmp_path / name / "model.safetensors")
    for result in run_ranks(2, loaded_in_every_way, str(tmp_path)):
        *loaded, misshaped, absent, few, lost = result
        for found in loaded:
            assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
        assert "2.weight has shape (7, 3)" in misshaped
        assert "neither a file nor a folder" in absent and "neither a file nor a folder" in lost
        assert "2.weight is missing" in few
