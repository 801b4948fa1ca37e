"""Whether code that relies on a denoiser's own order of tokens sees or keeps its tensors.

Step caches keep hidden states of one forward and add them to those of another. Such code is found
in hooks, in a `forward` that stands before the class's own, and in blocks and processors of other
packages. Tokens are only put in another order where no such code is found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import torch

from diffattn import _compat
from diffattn.attach.backend import Group

# Packages whose modules keep no tensors from call to call: layers of torch, models of diffusers,
# layers with a LoRA or with quantised weights, and hooks that move weights.
_KNOWN = {
    "torch",
    "diffusers",
    "diffattn",
    "accelerate",
    "peft",
    "bitsandbytes",
    "torchao",
    "optimum",
}


def is_watched(model: torch.nn.Module, groups: Iterable[Group], gates: Set[int]) -> bool:
    """Whether foreign code may see or keep tensors between the modules of a denoiser.

    Args:
        model: the denoiser, which has diffattn's hooks and perhaps others.
        groups: the groups of the denoiser's attached sites.
        gates: the numbers of diffattn's hooks on modules of the denoiser.
    """
    return (
        # Outputs of the denoiser itself are in the model's own order again.
        any(_is_foreign(hook) for hook in model._forward_pre_hooks.values())
        or torch.nn.modules.module._has_any_global_hook()
        or any(_is_foreign(_compat.backend_function(group.previous)) for group in groups)
        or any(
            module is not model
            and (module._forward_pre_hooks or module._forward_hooks.keys() - gates)
            for module in model.modules()
        )
        or any(_is_of_others(module) for module in model.modules())
    )


def _is_of_others(module: torch.nn.Module) -> bool:
    """Whether foreign code runs a module, or runs before or after the module."""
    return (
        _compat.is_watched(module)
        or any(_is_foreign(forward) for forward in _forwards(module))
        or not all(_is_known(type(hook).__module__) for hook in _hooks_of_accelerate(module))
        or _has_foreign_attention(module)
    )


def _forwards(module: torch.nn.Module) -> Iterator[Callable[..., Any]]:
    """The `forward` of a module, and those that hooks of accelerate and diffusers call in turn."""
    yield module.__dict__.get("forward") or type(module).forward
    yield from _compat.hidden_forwards(module)
    if "_old_forward" in module.__dict__:
        yield module.__dict__["_old_forward"]


def _hooks_of_accelerate(module: torch.nn.Module) -> tuple[Any, ...]:
    """The hooks that accelerate has in a module; several are parts of one."""
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else (hook, *getattr(hook, "hooks", ()))


def _is_foreign(function: Callable[..., Any]) -> bool:
    """Whether a function, or a function that it is wrapped around, is of an unknown package."""
    current: Any = function
    while current is not None:
        wrapped = getattr(current, "__wrapped__", None)
        while isinstance(current, functools.partial):
            current = current.func
        current = getattr(current, "__func__", current)
        # Wrappers copy `__module__`, but cannot copy the globals of a function.
        names = getattr(current, "__globals__", None)
        module = type(current).__module__ if names is None else names.get("__name__", "")
        if not _is_known(module):
            return True
        current = wrapped
    return False


def _is_known(module: str) -> bool:
    return module.partition(".")[0] in _KNOWN


def _has_foreign_attention(module: torch.nn.Module) -> bool:
    """Whether a module attends by a processor or a backend of neither diffusers nor diffattn."""
    processor = module.__dict__.get("processor") or module._modules.get("processor")
    if processor is None:
        return False
    package = type(processor).__module__.partition(".")[0]
    return package not in ("diffusers", "diffattn") or (
        _compat.uses_dispatch(processor)
        and _is_foreign(_compat.backend_function(_compat.processor_backend(processor)))
    )
