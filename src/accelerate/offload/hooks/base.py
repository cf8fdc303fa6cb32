"""`ModelHook`, the base class of hooks around a module's forward, and functions that add and remove hooks."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from ...runtime.tensors.forward import HookedForward, hook_forward, unhook_forward
from .moving import release_moves

_Module = TypeVar("_Module", bound=nn.Module)
_Method = TypeVar("_Method", bound=Callable[..., Any])


class ModelHook:
    """Runs code around a module's forward. Subclasses override the methods that they need.

    Attributes:
        no_grad: Run the forward under `torch.no_grad`.
    """

    no_grad = False

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Called when the hook is attached.

        Args:
            module: The module.

        Returns:
            The module, or a replacement.
        """
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Called before the forward.

        Args:
            module: The module.
            *args: The forward's positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            The arguments for the forward.
        """
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Called after the forward.

        Args:
            module: The module.
            output: The output of the forward.

        Returns:
            The output for the caller.
        """
        return output

    def after_error(self, module: nn.Module) -> None:
        """Called instead of `post_forward` when the forward raised.

        Args:
            module: The module.
        """

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Called when the hook is removed.

        Args:
            module: The module.

        Returns:
            The module, as it was before.
        """
        return module


class SequentialHook(ModelHook):
    """Runs several hooks in order.

    Args:
        *hooks: The hooks.
    """

    def __init__(self, *hooks: ModelHook) -> None:
        self.hooks = hooks

    @property
    def execution_device(self) -> torch.device | None:
        """The device that the module runs on: that of the last hook that has one."""
        devices = [getattr(hook, "execution_device", None) for hook in self.hooks]
        return next((device for device in reversed(devices) if device is not None), None)

    def init_hook(self, module: nn.Module) -> nn.Module:
        """See `ModelHook.init_hook`."""
        for hook in self.hooks:
            module = hook.init_hook(module)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `ModelHook.pre_forward`."""
        for hook in self.hooks:
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """See `ModelHook.post_forward`."""
        for hook in self.hooks:
            output = hook.post_forward(module, output)
        return output

    def after_error(self, module: nn.Module) -> None:
        """See `ModelHook.after_error`."""
        for hook in self.hooks:
            hook.after_error(module)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """See `ModelHook.detach_hook`."""
        for hook in self.hooks:
            module = hook.detach_hook(module)
        return module


def not_compiled(method: _Method) -> _Method:
    """Excludes a hook's method from ``torch.compile``, which still compiles the code before and after it.

    Equivalent to `torch.compiler.disable`, but does not import the compiler (about a second) unless it is in use.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return method(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(method))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return run  # type: ignore[return-value]


# Adding and removing ---------------------------------------------------------------------------------------------------


class _Hooked(HookedForward):
    """Runs a module's forward inside its hook, which is looked up at each call because it may be replaced."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module
        hook: ModelHook = module._hf_hook  # type: ignore[assignment]  # a plain attribute
        try:
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
            if hook.no_grad:
                with torch.no_grad():
                    output = self.__wrapped__(*args, **kwargs)
            else:
                output = self.__wrapped__(*args, **kwargs)
        except BaseException:
            hook.after_error(module)
            raise
        return hook.post_forward(module, output)


def add_hook_to_module(module: _Module, hook: ModelHook, append: bool = False) -> _Module:
    """Attaches a hook to a module's forward, as ``module._hf_hook``.

    Args:
        module: The module; modified in place.
        hook: The hook.
        append: Keep an existing hook and run this one after it. False: replace it.

    Returns:
        The module.
    """
    present = module.__dict__.get("_hf_hook")
    if present is not None and not append:
        remove_hook_from_module(module)
        present = None
    module = hook.init_hook(module)  # type: ignore[assignment]
    if present is not None:
        before = present.hooks if isinstance(present, SequentialHook) else (present,)
        hook = SequentialHook(*before, hook)
    module._hf_hook = hook  # type: ignore[assignment]  # a plain attribute
    if "_old_forward" not in module.__dict__:
        hook_forward(module, _Hooked(module))
    return module


def remove_hook_from_module(module: _Module, recurse: bool = False) -> _Module:
    """Removes a module's hook and restores the module.

    Args:
        module: The module; modified in place.
        recurse: Include all submodules.

    Returns:
        The module.
    """
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        hook.detach_hook(module)
        del module._hf_hook
    if "_old_forward" in module.__dict__:
        unhook_forward(module)
    release_moves(module)
    if recurse:
        for child in module.children():
            remove_hook_from_module(child, recurse)
    return module


def remove_hook_from_submodules(module: nn.Module) -> None:
    """Removes the hooks of a module and of all its submodules."""
    remove_hook_from_module(module, recurse=True)
