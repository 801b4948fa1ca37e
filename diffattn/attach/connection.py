"""Whether what was attached to a denoiser is still called, and who has disconnected it if not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffattn import _compat
from diffattn.attach.sites import AttachedSite


def complaint(
    model: torch.nn.Module, sites: Mapping[str, AttachedSite], calls: int, *, first_forward: bool
) -> str:
    """What is wrong with the sites of a denoiser after a forward; empty if nothing is.

    Args:
        calls: attention calls of the forward that went through diffattn.
        first_forward: whether the forward is the first since attaching.
    """
    lost = {name: why for name, site in sites.items() if (why := why_lost(model, name, site))}
    if lost:
        name, why = next(iter(lost.items()))
        return (
            f"{len(lost)} of {len(sites)} attention sites of {type(model).__name__} are no"
            f" longer attached: {why} ({name})"
        )
    # Several calls of each site are right: FreeNoise's split inference makes them in parts.
    if first_forward and _uneven(calls, len(sites)) and not _has_compiled(model):
        return (
            f"{type(model).__name__} made {calls} attention calls through diffattn where it has"
            f" {len(sites)} attached sites"
        )
    return ""


def why_lost(model: torch.nn.Module, name: str, site: AttachedSite) -> str:
    """What has disconnected a site since it was attached; empty while it is connected."""
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
    """Is a site still part of the model? FreeNoise's split inference wraps what it is in."""
    try:
        if model.get_submodule(name) is module:
            return True
    except AttributeError:
        pass
    return any(part is module for part in model.modules())


def _culprit(model: torch.nn.Module, processor: Any) -> str:
    """Which call of diffusers has put a processor of this kind in place, if it can be told."""
    name = type(processor).__name__
    if name.startswith("Fused"):
        return " by fuse_qkv_projections"
    if "XFormers" in name:
        return " by enable_xformers_memory_efficient_attention"
    if "Sliced" in name:
        return " by enable_attention_slicing"
    # Self-attention gets a new processor of the class it had.
    others = [type(getattr(module, "processor", None)) for module in model.modules()]
    return " by load_ip_adapter" if any("IPAdapter" in o.__name__ for o in others) else ""


def _uneven(calls: int, sites: int) -> bool:
    """Have some sites not been called, or fewer times than others?"""
    return calls == 0 or calls % sites != 0


def _has_compiled(model: torch.nn.Module) -> bool:
    """Is a part of the model compiled? Its calls are not counted."""
    return any(module._compiled_call_impl is not None for module in model.modules())
