"""The hook: what is done before and after a module's forward, and how it gets there."""

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
    """What is done around a module's forward. Subclass it and override what is needed.

    Attributes:
        no_grad: Run the forward under `torch.no_grad`.
    """

    no_grad = False

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Called when the hook is attached.

        Args:
            module: The module.

        Returns:
            The module, or what takes its place.
        """
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Called before the forward.

        Args:
            module: The module.
            *args: The forward's positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            The arguments that the forward is to get.
        """
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Called after the forward.

        Args:
            module: The module.
            output: What the forward returned.

        Returns:
            What the caller is to get.
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
    """Several hooks as one, in order.

    Args:
        *hooks: The hooks.
    """

    def __init__(self, *hooks: ModelHook) -> None:
        self.hooks = hooks

    @property
    def execution_device(self) -> torch.device | None:
        """Where the module runs: the device of the last hook that has one."""
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
    """Has a hook's method run as it is under ``torch.compile``, which then compiles what is before and behind it.

    As `torch.compiler.disable` does; but that imports the compiler, which takes a second, for everybody.
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
    """A forward with the module's hook around it. The hook is looked up at every call: it may be exchanged."""

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
    """Has a hook act around a module's forward, as ``module._hf_hook``.

    Args:
        module: The module; changed in place.
        hook: The hook.
        append: Keep a hook that is there, and act after it. False: replace it.

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
    """Removes a module's hook, and puts back what it changed.

    Args:
        module: The module; changed in place.
        recurse: Do the same for every module inside it.

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
    """Removes the hooks of a module and of every module inside it."""
    remove_hook_from_module(module, recurse=True)
