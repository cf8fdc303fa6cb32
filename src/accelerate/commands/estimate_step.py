"""What a training step holds in memory, found without any: the step is run on tensors that have a shape and no values.

Everything a real step would allocate is counted by its size, when it comes and when it goes, so that activations need no
rule of thumb. What is not seen: the working memory inside a kernel, and what an allocator keeps for later.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step with Adam holds.

    Attributes:
        weights: Parameters and buffers.
        gradients: All gradients, as they are at the end of the backward.
        optimizer: Adam's two moments and its step counts.
        activations: The most that is held beside these three: what the backward needs of the forward, results in between.
        peak: The most that is held at one time; less than the sum, since activations go as gradients come.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int


class CannotFollow(RuntimeError):
    """A step depends on values, or takes inputs that nobody described: its memory cannot be found."""


def follow_step(model: nn.Module, batch_size: int, sequence_length: int, mixed: bool) -> StepMemory:
    """Follows the second of two training steps: from then on Adam has its state.

    Args:
        model: On the meta device; it stays as it is.
        batch_size: Samples in a batch.
        sequence_length: Tokens in a sample, for models of text.
        mixed: Whether the forward runs in a 16-bit format (autocast).

    Raises:
        CannotFollow: when the step cannot be run without values.
    """
    import copy

    from torch._subclasses.fake_tensor import FakeTensorMode

    model = copy.deepcopy(model).train()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Tracker() as tracker:
            _give_storage(model)
            weights = tracker.live
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda p: tracker.hold([p.grad]))
            tracker.held = weights
            inputs = _with_labels(model, _inputs(model, batch_size, sequence_length))
            optimizer = torch.optim.AdamW(model.parameters())
            for _ in range(2):
                tracker.restart()
                gradients = _step(model, optimizer, inputs, mixed, tracker)
                states = _bytes(tree_leaves([list(state.values()) for state in optimizer.state.values()]))
                tracker.held = weights + states
    except CannotFollow:
        raise
    except Exception as error:
        text = str(error).strip().split("\n")[0][:200]
        raise CannotFollow(f"{type(error).__name__}: {text}") from error
    return StepMemory(weights, gradients, states, tracker.most_loose, tracker.peak)


def _give_storage(model: nn.Module) -> None:
    """Puts tensors that count as the CPU's in the place of those of the meta device, tied ones as one. Kernels that look at
    the device are chosen as in a real step then."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers, vars(module)):
            for name, tensor in list(table.items()):
                if isinstance(tensor, torch.Tensor):
                    if id(tensor) not in made:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        learns = tensor.requires_grad
                        made[id(tensor)] = nn.Parameter(empty, learns) if isinstance(tensor, nn.Parameter) else empty
                    table[name] = made[id(tensor)]  # type: ignore[assignment]  # whatever it holds


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, torch.Tensor], mixed: bool, tracker: _Tracker
) -> int:
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        output = model(**inputs)  # loops keep it until the end of the step, its logits with it
        loss = _loss(output)
    loss.backward()
    gradients = _bytes(parameter.grad for parameter in model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    return gradients


def _loss(output: Any) -> torch.Tensor:
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    values = tree_leaves(dict(output) if hasattr(output, "keys") else output)
    parts = [value.float().sum() for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if not parts:
        raise CannotFollow("the model returns no numbers to train on")
    return torch.stack(parts).sum()


def _inputs(model: nn.Module, batch_size: int, sequence_length: int) -> dict[str, torch.Tensor]:
    """A batch for the model: tokens or images, as its configuration describes them."""
    config = getattr(model, "config", None)
    picture = getattr(model, "default_cfg", {}).get("input_size") if config is None else None  # timm's description
    if picture is not None:
        return {"x": torch.zeros(batch_size, *picture)}
    name = getattr(model, "main_input_name", None)
    if name == "input_ids":
        longest = getattr(config, "max_position_embeddings", None)
        if isinstance(longest, int) and sequence_length > longest:
            raise CannotFollow(f"the model takes at most {longest} tokens (--sequence_length {sequence_length})")
        tokens = {"input_ids": torch.zeros(batch_size, sequence_length, dtype=torch.int64)}
        if getattr(config, "is_encoder_decoder", False):
            tokens["decoder_input_ids"] = tokens["input_ids"].clone()
        return tokens
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and size is not None:
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": torch.zeros(batch_size, getattr(config, "num_channels", 3), height, width)}
    raise CannotFollow(f"only batches of tokens and of images are known, and {type(model).__name__} takes {name}")


def _with_labels(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with labels, for a model that computes its own loss: one for each row of logits."""
    if "labels" not in inspect.signature(model.forward).parameters:
        return inputs
    with torch.no_grad():
        logits = getattr(model(**inputs), "logits", None)
    if not isinstance(logits, torch.Tensor):
        return inputs
    inputs.pop("decoder_input_ids", None)  # made from the labels
    return {**inputs, "labels": torch.zeros(logits.shape[:-1], dtype=torch.int64)}


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, torch.Tensor))


class _Tracker(TorchDispatchMode):
    """Counts the bytes of all storages that come out of operations, until they go.

    Attributes:
        live: Bytes that are there now.
        held: Those of them that are weights, gradients and the optimizer's.
        peak: The most there were, since `restart`.
        most_loose: The most there were beside `held`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.held = self.peak = self.most_loose = 0
        self._known: set[int] = set()

    def restart(self) -> None:
        """Forgets the largest figures so far."""
        self.peak = self.live
        self.most_loose = 0

    def hold(self, tensors: Iterable[Any]) -> None:
        """Counts tensors as held from now on."""
        self.held += _bytes(tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.most_loose = max(self.most_loose, self.live - self.held)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
