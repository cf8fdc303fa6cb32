"""Wraps and unwraps a module's forward, and the containers around a module: the only place that does.

A wrapper is an object, not a closure: a copy of the module then carries a wrapper around its own forward, where a
closure would still call the original's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

_Model = TypeVar("_Model")


class ForwardWrapper:
    """Base of what `wrap_forward` puts in place of ``module.forward``: calls the wrapped forward.

    Attributes:
        __wrapped__: The forward underneath; `inspect.signature` follows it.
    """

    __wrapped__: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)


def wrap_forward(module: nn.Module, wrapper: ForwardWrapper) -> None:
    """Puts `wrapper` in place of the module's forward; the first forward is kept as ``_original_forward``."""
    forward = module.forward
    # Sets __wrapped__ too; `updated` would hand on the attributes of a wrapper underneath.
    functools.update_wrapper(wrapper, forward, updated=())
    if "_original_forward" not in module.__dict__:
        module._original_forward = forward  # type: ignore[assignment]  # a method, not a submodule
    module.forward = wrapper


def unwrap_forward(module: nn.Module) -> None:
    """Takes off every wrapper that `wrap_forward` put around the module's forward, and no other."""
    if "_original_forward" not in module.__dict__:
        return
    del module.__dict__["_original_forward"]
    forward = _strip_wrappers(module.__dict__.get("forward"))
    if isinstance(forward, HookedForward):
        module._old_forward = forward.__wrapped__  # type: ignore[assignment]
    _restore(module, forward)


class HookedForward:
    """What `hook_forward` puts in place of ``module.forward``; wrappers of precision go over it or under it.

    Attributes:
        __wrapped__: The forward underneath; `inspect.signature` follows it.
    """

    __wrapped__: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)


def hook_forward(module: nn.Module, hooked: HookedForward) -> None:
    """Puts `hooked` in place of the module's forward, which is kept as ``_old_forward``.

    A module without one, such as a list of modules, is left as it is: nobody calls it.
    """
    forward = module.forward
    if getattr(forward, "__func__", None) is nn.Module.forward:
        return
    functools.update_wrapper(hooked, forward, updated=())
    module._old_forward = forward  # type: ignore[assignment]  # a method, not a submodule
    module.forward = hooked


def unhook_forward(module: nn.Module) -> None:
    """Takes off what `hook_forward` put around the module's forward, and leaves wrappers over or under it."""
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
    # The class's own forward needs no entry on the instance; anything else was there before us.
    if getattr(forward, "__func__", None) is type(module).forward:
        module.__dict__.pop("forward", None)
    else:
        module.forward = forward


def is_compiled_module(module: object) -> bool:
    """Whether `module` is what ``torch.compile(module)`` returned."""
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule) if _dynamo_is_loaded() else False


def _dynamo_is_loaded() -> bool:
    # Nothing can be compiled before dynamo is imported, and importing it costs a second.
    import sys

    return "torch._dynamo.eval_frame" in sys.modules


def extract_model_from_parallel(
    model: _Model, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True, recursive: bool = False
) -> _Model:
    """The module inside the containers that a strategy put around it.

    Args:
        model: A module, perhaps in ``DistributedDataParallel``, ``DataParallel``, compiled, or several of these.
        keep_fp32_wrapper: Leave the mixed-precision wrapper on the forward; False takes it off.
        keep_torch_compile: Give a compiled module back compiled; False gives the plain module.
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
    # Another compiled module around the inner one: the container that was compiled is still being trained with.
    return compiled if inner is compiled._orig_mod else type(compiled)(inner, compiled.dynamo_ctx)


def unwrap_module(model: nn.Module) -> nn.Module:
    """The module inside containers and inside what compiles it as a whole, with its wrappers of precision."""
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
