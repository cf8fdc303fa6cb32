"""Wraps and unwraps forwards, and unwraps containers such as DistributedDataParallel; no other module replaces a forward.

Wrappers are objects, not closures: `copy.deepcopy` of a module copies them with the module, where a closure would still
call the original's forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

_Model = TypeVar("_Model")


class ForwardWrapper:
    """Base class of wrappers for `wrap_forward`.

    Attributes:
        __wrapped__: The wrapped forward; `inspect.signature` follows it.
    """

    __wrapped__: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)


def wrap_forward(module: nn.Module, wrapper: ForwardWrapper) -> None:
    """Wraps the module's forward; the first wrapped forward is stored as ``_original_forward``."""
    forward = module.forward
    # Sets __wrapped__ too; without `updated=()` it would copy the attributes of an inner wrapper.
    functools.update_wrapper(wrapper, forward, updated=())
    if "_original_forward" not in module.__dict__:
        module._original_forward = forward  # type: ignore[assignment]  # a method, not a submodule
    module.forward = wrapper


def unwrap_forward(module: nn.Module) -> None:
    """Removes every wrapper of `wrap_forward` from the module's forward, and no other."""
    if "_original_forward" not in module.__dict__:
        return
    del module.__dict__["_original_forward"]
    forward = _strip_wrappers(module.__dict__.get("forward"))
    if isinstance(forward, HookedForward):
        module._old_forward = forward.__wrapped__  # type: ignore[assignment]
    _restore(module, forward)


class HookedForward:
    """Base class of hooked forwards for `hook_forward`; a `ForwardWrapper` may be outside or inside of it.

    Attributes:
        __wrapped__: The hooked forward; `inspect.signature` follows it.
    """

    __wrapped__: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)


def hook_forward(module: nn.Module, hooked: HookedForward) -> None:
    """Replaces the module's forward, which is stored as ``_old_forward``.

    Does nothing to a module without a forward, such as `ModuleList`.
    """
    forward = module.forward
    if getattr(forward, "__func__", None) is nn.Module.forward:
        return
    functools.update_wrapper(hooked, forward, updated=())
    module._old_forward = forward  # type: ignore[assignment]  # a method, not a submodule
    module.forward = hooked


def unhook_forward(module: nn.Module) -> None:
    """Removes the hooked forward of `hook_forward`, and keeps wrappers outside and inside of it."""
    module.__dict__.pop("_old_forward", None)
    forward = module.__dict__.get("forward")
    if forward is not None:
        _restore(module, _strip_hook(forward))


def _strip_wrappers(forward: Any) -> Any:
    while isinstance(forward, ForwardWrapper):
        forward = forward.__wrapped__
    if isinstance(forward, HookedForward):
        forward.__wrapped__ = _strip_wrappers(forward.__wrapped__)
    return forward


def _strip_hook(forward: Any) -> Any:
    if isinstance(forward, HookedForward):
        return forward.__wrapped__
    if isinstance(forward, ForwardWrapper):
        forward.__wrapped__ = _strip_hook(forward.__wrapped__)
    return forward


def _restore(module: nn.Module, forward: Any) -> None:
    # The class's forward needs no instance attribute; any other was set by the user.
    if getattr(forward, "__func__", None) is type(module).forward:
        module.__dict__.pop("forward", None)
    else:
        module.forward = forward


def is_compiled_module(module: object) -> bool:
    """Returns whether a module is the result of ``torch.compile(module)``."""
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule) if _dynamo_is_loaded() else False


def _dynamo_is_loaded() -> bool:
    # Importing dynamo takes a second, and without it no module is compiled.
    import sys

    return "torch._dynamo.eval_frame" in sys.modules


def extract_model_from_parallel(
    model: _Model, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True, recursive: bool = False
) -> _Model:
    """Unwraps a module from the containers of a strategy.

    Args:
        model: A module, which may be in ``DistributedDataParallel`` or ``DataParallel``, compiled, or several of these.
        keep_fp32_wrapper: Keep the mixed-precision wrapper of the forward; False removes it.
        keep_torch_compile: Return a compiled module compiled; False returns the original module.
        recursive: Unwrap submodules too.
    """
    compiled: Any = model if is_compiled_module(model) else None
    inner: Any = compiled._orig_mod if compiled is not None else model
    inner = _strip_containers(inner)
    if recursive:
        _unwrap_children(inner)
    if not keep_fp32_wrapper and isinstance(inner, nn.Module):
        unwrap_forward(inner)
    if compiled is None or not keep_torch_compile:
        return inner
    # A new compiled module: the compiled container is still in use for training.
    return compiled if inner is compiled._orig_mod else type(compiled)(inner, compiled.dynamo_ctx)


def unwrap_module(model: nn.Module) -> nn.Module:
    """Unwraps a module from containers and `torch.compile`, but keeps its mixed-precision wrapper."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _strip_containers(module: Any) -> Any:
    while isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        module = module.module
        if is_compiled_module(module):
            module = module._orig_mod
    return module


def _unwrap_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        plain = _strip_containers(child)
        if plain is not child:
            setattr(module, name, plain)
        _unwrap_children(plain)
