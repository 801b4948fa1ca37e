"""Checks that attached sites are still called, and names the call that disconnected them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffattn import _compat
from diffattn.attach.sites import AttachedSite


def complaint(
    model: torch.nn.Module,
    sites: Mapping[str, AttachedSite],
    calls: int,
    called: int,
    *,
    first_forward: bool,
) -> str:
    """A message about lost or skipped sites of a denoiser after a forward; empty without any.

    Args:
        calls: attention calls of the forward that went through diffattn.
        called: sites that such a forward calls.
        first_forward: whether the forward is the first since attaching.
    """
    lost = {name: why for name, site in sites.items() if (why := why_lost(model, name, site))}
    if lost:
        name, why = next(iter(lost.items()))
        return (
            f"{len(lost)} of {len(sites)} attention sites of {type(model).__name__} are no"
            f" longer attached: {why} ({name})"
        )
    # Several calls of each site are fine: FreeNoise's split inference calls a site part by part.
    if first_forward and _uneven(calls, called) and not _has_compiled(model):
        return (
            f"{type(model).__name__} made {calls} attention calls through diffattn where it has"
            f" {called} attached sites"
        )
    return ""


def why_lost(model: torch.nn.Module, name: str, site: AttachedSite) -> str:
    """The reason that a site is no longer connected, for a message; empty while it is."""
    module: Any = site.module
    if not _is_in_place(model, name, module):
        return "its block was exchanged"
    if module.processor is not site.processor:
        return (
            f"it was given a {type(module.processor).__name__}{_culprit(model, module.processor)}"
        )
    if _compat.processor_backend(site.processor) is not site.member:
        return "set_attention_backend gave it another backend"
    return ""


def _is_in_place(model: torch.nn.Module, name: str, module: torch.nn.Module) -> bool:
    """Whether a site is still part of the model.

    FreeNoise's split inference wraps modules around a site, which changes the site's name.
    """
    try:
        if model.get_submodule(name) is module:
            return True
    except AttributeError:
        pass
    return any(part is module for part in model.modules())


def _culprit(model: torch.nn.Module, processor: Any) -> str:
    """The call of diffusers that sets processors of this class, for a message; may be empty."""
    name = type(processor).__name__
    if name.startswith("Fused"):
        return " by fuse_qkv_projections"
    if "XFormers" in name:
        return " by enable_xformers_memory_efficient_attention"
    if "Sliced" in name:
        return " by enable_attention_slicing"
    # load_ip_adapter gives self-attention a new processor of the class that it had.
    others = [type(getattr(module, "processor", None)) for module in model.modules()]
    return " by load_ip_adapter" if any("IPAdapter" in o.__name__ for o in others) else ""


def _uneven(calls: int, sites: int) -> bool:
    """Whether, by the number of calls, some sites were called less often than others."""
    return calls == 0 or calls % sites != 0


def _has_compiled(model: torch.nn.Module) -> bool:
    """Whether a part of the model is compiled, so that its calls are not counted."""
    return any(module._compiled_call_impl is not None for module in model.modules())
